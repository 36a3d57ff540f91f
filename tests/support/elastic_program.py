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
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from crosstrain import backends
from crosstrain.ci import TraceRecorder
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    LogicalShards,
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
        prediction: torch.Tensor = self.head(found)
        return prediction


def words() -> tuple[Any, list[Any], Any]:
    model = Words()
    draws = torch.Generator().manual_seed(1)
    x = torch.randint(1, 20, (SAMPLES, 7), generator=draws)
    y = torch.where(torch.rand(x.shape, generator=draws) < 0.3, 0, x)
    return model, [torch.optim.AdamW(model.parameters(), 1e-2)], TensorDataset(x, y)


def loss_of_words(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # One row a word: of more dimensions, torch has no deterministic loss on CUDA.
    return nn.functional.cross_entropy(y_pred.flatten(0, 1), y.flatten(), ignore_index=0)


def count_words(batch: Any) -> Any:
    return (batch[1] != 0).sum()


# What there is to train: model, optimizers and data; precision, shards, and window.
KINDS: dict[str, Any] = {
    "images": (images, "fp32", 4, 1),
    "overflows": (images, "fp16", 4, 3),
    "words": (words, "bf16", 4, 1),
    "eight": (words, "fp32", 8, 3),
    "own": (images, "fp16", 4, 1),
}
SPECS = {
    "cpu": {"fp32": "cpu", "bf16": "cpu:bf16", "fp16": "cpu:fp16"},
    "cuda": {"fp32": "cuda", "bf16": "cuda-amp:bf16", "fp16": "cuda-amp"},
}


def own_step(make: Any, settings: dict[str, Any]) -> tuple[Any, Any, list[Any], Any]:
    """A process function of the user's own, over `LogicalShards`."""
    model, optimizers, data = make
    backend = backends.get(settings["spec"], **settings["backend"]).open()
    shards = LogicalShards(settings["shards"], backend, model, optimizers)

    def loss_of(part: Any) -> torch.Tensor:
        x, y = backend.put(part)
        with backend.autocast():
            return nn.functional.cross_entropy(model(x), y)

    def step(engine: Any, batch: Any) -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = shards.backward(engine, batch, loss_of)
        for optimizer in optimizers:
            backend.step(optimizer, 0.5)
        return loss

    trainer = DeterministicEngine(step, backend, shards=settings["shards"])
    return trainer, model, optimizers, data


def trainer_of(kind: str, device: str) -> tuple[Any, Any, list[Any], Any]:
    torch.manual_seed(3)
    make, precision, shards, window = KINDS[kind]
    spec = SPECS[device][precision]
    model, optimizers, data = make()
    settings: dict[str, Any] = {}
    if precision == "fp16":
        settings["scaler"] = GradScaler(device, init_scale=2.0**18, growth_interval=4)
    if kind == "own":
        chosen = {"spec": spec, "shards": shards, "backend": settings}
        return own_step((model, optimizers, data), chosen)
    is_words = isinstance(model, Words)
    trainer = create_supervised_trainer(
        model,
        optimizers,
        loss_of_words if is_words else nn.functional.cross_entropy,
        backend=backends.get(spec, **settings),
        deterministic=True,
        gradient_accumulation_steps=window,
        max_norm=0.5,
        shards=shards,
        loss_reduction=count_words if is_words else "mean",
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 3, 0.7)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: schedule.step())
    trainer.objects["schedule"] = schedule
    return trainer, model, optimizers, data


def train(
    kind: str,
    folder: Path | None,
    kill_after: int,
    trace: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Trains to the end, or until it kills itself; returns what the training has come to."""
    manual_seed(3)
    trainer, model, optimizers, data = trainer_of(kind, device)
    state: Any = trainer.state
    state.drawn = []
    trainer.state_dict_user_keys.append("drawn")
    objects = {
        "model": model,
        **{f"optimizer {n}": one for n, one in enumerate(optimizers)},
        **{name: one for name, one in trainer.objects.items() if name == "schedule"},
    }
    losses: list[str] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        losses.append(float(state.output).hex())
        # What handlers draw is the same, too.
        state.drawn = [*state.drawn, torch.rand(()).item()]

    if folder is not None:
        run = resume_or_start(trainer, objects, folder, every=1)

        @trainer.on(Events.ITERATION_STARTED)
        def kill() -> None:
            if kill_after and state.iteration > kill_after:
                run.checkpoint.wait()
                os.kill(os.getpid(), signal.SIGKILL)

    if trace is not None:
        TraceRecorder(trace, every_sync=4).attach(trainer, objects)
    trainer.run(DataLoader(data, BATCH, shuffle=True), max_epochs=EPOCHS)
    whole = [thing.state_dict() for thing in objects.values()]
    buffers = [buffer for _, buffer in model.named_buffers()]
    found = digest([whole, buffers, state.drawn, trainer.backend.state_dict()])
    return {"digest": found, "losses": losses, "skipped": getattr(state, "skipped_steps", None)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--device", choices=sorted(SPECS), default="cpu")
    parser.add_argument("--kill-after", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    folder: Path = args.folder
    told = {
        kind: train(
            kind, folder / kind if args.save else None, args.kill_after, args.trace, args.device
        )
        for kind in args.kinds
    }
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    (folder / f"{rank}-of-{size}.json").write_text(json.dumps(told))


def digest(value: Any) -> str:
    """A digest of a nest of tensors and plain values, to the bit."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            found.update(
                part.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
            )
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
    main()
