"""A program for torchrun: a training in logical shards, on any number of processes.

It goes on from the newest checkpoint of its folder, if there is one, kills itself after an
iteration, if it is told one, and prints a digest of all that the training has come to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from crosstrain import backends
from crosstrain.engine import (
    Events,
    StepEvents,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

SAMPLES, BATCH, EPOCHS = 50, 16, 4
# Batches of 16, 16, 16 and 2 samples: the last leaves shards without one.
ITERATIONS = EPOCHS * 4


def images() -> tuple[Any, list[Any], Any]:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(6 * 64, 10),
    ).to(memory_format=torch.channels_last)
    optimizers = [
        torch.optim.AdamW(model[:4].parameters(), 1e-2),
        torch.optim.SGD(model[4:].parameters(), 1e-2, momentum=0.9),
    ]
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 1, 8, 8, generator=draws)
    y = torch.randint(0, 10, (SAMPLES,), generator=draws)
    return model, optimizers, TensorDataset(x, y)


class Words(nn.Module):
    """A small transformer over words, one of whose layers is used in some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.sometimes = nn.Linear(16, 16)
        self.never = nn.Linear(4, 4)
        self.head = nn.Linear(16, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(self.embedding(x))
        if int(x[0, 0]) % 2:
            found = found + self.sometimes(found)
        prediction: torch.Tensor = self.head(found).transpose(1, 2)
        return prediction


def words() -> tuple[Any, list[Any], Any]:
    model = Words()
    draws = torch.Generator().manual_seed(1)
    x = torch.randint(1, 20, (SAMPLES, 7), generator=draws)
    y = torch.where(torch.rand(x.shape, generator=draws) < 0.3, 0, x)
    return model, [torch.optim.AdamW(model.parameters(), 1e-2)], TensorDataset(x, y)


def arguments() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="images")
    parser.add_argument("--spec", default="cpu")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--window", type=int, default=1)
    parser.add_argument("--kill-after", type=int, default=0)
    return parser.parse_args()


def loss_of_words(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(y_pred, y, ignore_index=0)


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    manual_seed(3)
    model, optimizers, data = (images if args.kind == "images" else words)()
    settings: dict[str, Any] = {}
    if args.spec == "cpu:fp16":
        settings["scaler"] = GradScaler("cpu", init_scale=2.0**18, growth_interval=4)
    reduction: dict[str, Any] = {}
    loss: Any = nn.functional.cross_entropy
    if args.kind == "words":
        loss, reduction = loss_of_words, {"loss_reduction": lambda batch: (batch[1] != 0).sum()}
    trainer = create_supervised_trainer(
        model,
        optimizers,
        loss,
        backend=backends.get(args.spec, **settings),
        deterministic=True,
        gradient_accumulation_steps=args.window,
        max_norm=0.5,
        shards=args.shards,
        **reduction,
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 3, 0.7)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: schedule.step())
    losses: list[str] = []
    drawn: list[float] = []
    told: Any = trainer.state
    told.drawn = drawn
    trainer.state_dict_user_keys.append("drawn")
    objects = {
        "model": model,
        "schedule": schedule,
        **{f"optimizer {n}": one for n, one in enumerate(optimizers)},
    }
    run = resume_or_start(trainer, objects, args.folder, every=1)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        state: Any = trainer.state
        losses.append(float(state.output).hex())
        # What handlers draw is the same, too.
        state.drawn = [*state.drawn, torch.rand(()).item()]

    @trainer.on(Events.ITERATION_STARTED)
    def kill() -> None:
        if args.kill_after and trainer.state.iteration > args.kill_after:
            run.checkpoint.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.run(DataLoader(data, BATCH, shuffle=True), max_epochs=EPOCHS)
    state: Any = trainer.state
    whole = {name: thing.state_dict() for name, thing in objects.items()}
    rank = int(os.environ.get("RANK", "0"))
    found = {
        "digest": digest([whole, state.drawn, trainer.backend.state_dict()]),
        "losses": losses,
        "parts": [
            digest(v)[:8] for v in (*[one.state_dict() for one in objects.values()], state.drawn)
        ],
        "skipped": state.skipped_steps,
    }
    (args.folder / f"{rank}.json").write_text(json.dumps(found))


def digest(value: Any) -> str:
    """A digest of a nest of tensors and plain values, to the bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, dict):
            for key, item in part.items():
                found.update(repr(key).encode())
                add(item)
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
