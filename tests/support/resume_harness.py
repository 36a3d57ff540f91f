"""Trainings that are recorded, resumed in another process at any iteration, and compared.

Its functions run in the children of a `ForkServer`, which have nothing but imports in common.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, Dataset

from crosstrain import backends
from crosstrain.backends import random_state
from crosstrain.backends.placement import map_tensors
from crosstrain.engine import (
    Engine,
    Events,
    ResumeWarning,
    StepEvents,
    create_supervised_trainer,
    current_sample,
    manual_seed,
)

# Scikit-learn's digits: 1797 images of 64 grey values from 0 to 1, and what they show. Read when
# this is imported, so that children of a fork server have them at once.
_DIGITS = load_digits()
IMAGES = torch.tensor(_DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(_DIGITS.target)


def augmented(image: torch.Tensor) -> torch.Tensor:
    """The image, changed by draws from each global generator and from the sample's own."""
    own = current_sample()
    image = torch.roll(image.view(8, 8), random.randint(-1, 1), 1).view(64)
    image = image * float(np.random.uniform(0.9, 1.1)) + float(np.random.normal(0, 0.01))
    image = image + 0.05 * torch.randn(64) + 0.01 * torch.rand(64, generator=own.torch())
    return image + float(own.numpy().normal(0, 0.01)) + own.python(1).uniform(-0.01, 0.01)


class Digits(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The first images, augmented, with their labels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return augmented(IMAGES[index]).view(1, 8, 8), LABELS[index]


def digest(value: Any) -> str:
    """The same for the same bits, types and order only."""
    found = hashlib.sha256()
    for path, leaf in leaves(value):
        found.update(path.encode())
        if isinstance(leaf, torch.Tensor):
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            bits = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
            found.update(bits.numpy().tobytes())
        else:
            found.update(f"{type(leaf).__name__}{leaf!r}".encode())
    return found.hexdigest()[:16]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def differences(left: Any, right: Any) -> list[str]:
    """Where two nests differ in a bit; nothing if they are the same."""
    a, b = dict(leaves(left)), dict(leaves(right))
    return [path for path in {**a, **b} if path not in a or path not in b or _differ(a, b, path)]


def _differ(a: dict[str, Any], b: dict[str, Any], path: str) -> bool:
    return digest(a[path]) != digest(b[path])


class Record:
    """What a run does at each iteration: batch, output, and random states after it."""

    def __init__(self, engine: Engine) -> None:
        self.rows: dict[int, list[Any]] = {}
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._take)

    def _take(self, engine: Engine) -> None:
        state = engine.state
        output = state.output.hex() if isinstance(state.output, float) else state.output
        found = [state.epoch, digest(state.batch), output, digest(random_state.capture())]
        self.rows[state.iteration] = found

    def after(self, iteration: int) -> dict[int, list[Any]]:
        return {key: row for key, row in self.rows.items() if key > iteration}


def saved(objects: Mapping[str, Any]) -> bytes:
    """The states of objects as a file has them."""
    file = io.BytesIO()
    states = {name: thing.state_dict() for name, thing in objects.items()}
    torch.save(map_tensors(states, lambda tensor: tensor.cpu()), file)
    return file.getvalue()


def read(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), weights_only=True)


def restore(objects: Mapping[str, Any], content: bytes) -> None:
    states = read(content)
    for name, thing in objects.items():
        thing.load_state_dict(states[name])


# ---------------------------------------------------------------------- the factory's trainer

EPOCHS = 2
SAMPLES, BATCH = 200, 16
# 13 batches an epoch, the last of 8 samples; windows of 3, of which one crosses the epochs and the
# last has 2.
ITERATIONS = EPOCHS * -(-SAMPLES // BATCH)

# From a name to a backend, and the loss scaler's settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("cpu", {}),
    "bf16": ("cpu:bf16", {}),
    "fp16": ("cpu:fp16", {"init_scale": 256.0, "growth_interval": 3}),
    "fp16-overflow": ("cpu:fp16", {"init_scale": 2.0**18, "growth_interval": 2}),
    "xla": ("xla", {}),
    "xla-bf16": ("xla:bf16", {}),
    "spmd-2": ("xla-spmd", {}),
    "spmd-4": ("xla-spmd", {}),
    "spmd-2-bf16": ("xla-spmd:bf16", {}),
}

# Those of XLA are not: they run where torch_xla is installed.
ON_HOST = ("fp32", "bf16", "fp16", "fp16-overflow")

# Variables that a variant's process sets before it starts its device.
VARIABLES = {
    "spmd-2": {"CPU_NUM_DEVICES": "2"},
    "spmd-4": {"CPU_NUM_DEVICES": "4"},
    "spmd-2-bf16": {"CPU_NUM_DEVICES": "2"},
}


class Training:
    """What a script would hold: a trainer, all that it changes, and its data."""

    def __init__(self, variant: str, workers: int, seed: int, dropout: float = 0.3) -> None:
        spec, scaling = VARIANTS[variant]
        os.environ.update(VARIABLES.get(variant, {}))
        manual_seed(seed)
        settings = {"scaler": GradScaler("cpu", **scaling)} if scaling else {}
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(216, 10),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        self.trainer = create_supervised_trainer(
            model,
            optimizer,
            nn.functional.cross_entropy,
            backend=backends.get(spec, **settings).open(),
            deterministic=True,
            gradient_accumulation_steps=3,
            max_norm=0.5,
        )
        self.skipped: list[int] = []
        self.trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
        self.trainer.add_event_handler(
            StepEvents.OPTIM_STEP_SKIPPED,
            lambda: self.skipped.append(self.trainer.state.iteration),
        )
        self.objects = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "trainer": self.trainer,
        }
        # States are taken by hand here: the trainer cannot know of which objects.
        self.trainer.checks = dataclasses.replace(self.trainer.checks, unnamed="off")
        self.record = Record(self.trainer)
        self.loader = DataLoader(Digits(SAMPLES), BATCH, shuffle=True, num_workers=workers)

    def run(self) -> None:
        self.trainer.run(self.loader, max_epochs=EPOCHS)

    def end(self) -> dict[str, Any]:
        return read(saved(self.objects))


def train_straight(file: str, variant: str, workers: int, seed: int) -> None:
    """Trains to the end; writes a snapshot of each iteration and of each epoch's end."""
    training = Training(variant, workers, seed)
    trainer, kept = training.trainer, {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep() -> None:
        kept[f"{trainer.state.iteration}"] = saved(training.objects)

    @trainer.on(Events.EPOCH_COMPLETED)
    def keep_epoch() -> None:
        kept[f"epoch {trainer.state.epoch}"] = saved(training.objects)

    training.run()
    result = {
        "snapshots": kept,
        "end": training.end(),
        "rows": training.record.rows,
        "skipped": training.skipped,
    }
    torch.save(result, file)


def train_on(file: str, variant: str, snapshot: str, workers: int, seed: int, report: str) -> None:
    """Goes on from a snapshot to the end; writes which bits differ from the straight run."""
    straight = torch.load(file, weights_only=True)
    training = Training(variant, workers, seed)
    restore(training.objects, straight["snapshots"][snapshot])
    start = training.trainer.state.iteration
    training.run()
    wanted = {key: row for key, row in straight["rows"].items() if key > start}
    found = differences(wanted, training.record.rows)
    found += differences(straight["end"], training.end())
    Path(report).write_text(json.dumps(found))


def train_leg(
    source: str | None, variant: str, stop: int | None, target: str, dropout: float = 0.0
) -> None:
    """Trains on from where another leg has stopped, on a device of its own choice.

    Args:
        source: the file of that leg; None: from the beginning.
        variant: what to train on.
        stop: the iteration to stop after; None: the last.
        target: where to write states, what was done, and the warnings.
        dropout: of the network. What it draws depends on the kind of device.
    """
    training = Training(variant, 0, 7, dropout)
    if source is not None:
        restore(training.objects, torch.load(source, weights_only=True)["states"])
    states: list[bytes] = []
    trainer, objects = training.trainer, training.objects

    @trainer.on(Events.ITERATION_COMPLETED(once=stop or ITERATIONS))
    def leave() -> None:
        states.append(saved(objects))
        if stop is not None:
            trainer.terminate()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        training.run()
    found = [str(one.message) for one in caught if one.category is ResumeWarning]
    rows = training.record.rows
    torch.save({"states": states[0], "rows": rows, "warnings": found}, target)
