"""Trainings on several devices of XLA's CPU; children of a fork server, of any number each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crosstrain import backends
from crosstrain.backends import BackendError
from crosstrain.engine import Events, create_supervised_trainer


class Batch(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def batches(sizes: list[int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randn(size, 1, 8, 8, generator=generator),
            torch.randint(10, (size,), generator=generator),
        )
        for size in sizes
    ]


def train(report: str, spec: str, devices: int, sizes: list[int]) -> None:
    """Trains with batch norm, dropout and clipping; writes numbers, counts and what is where."""
    os.environ["CPU_NUM_DEVICES"] = str(devices)
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(216, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    backend: Any = backends.get(spec).open()
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.cross_entropy, backend=backend, max_norm=1.0
    )
    backend.sync()
    backend.seed(11)
    losses: list[torch.Tensor] = []
    counts: list[dict[str, int]] = []
    divided: list[str] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note() -> None:
        # Unread: nothing here waits for a value.
        losses.append(trainer.state.raw_output.tensor)
        counts.append(backend.counts())

    @trainer.on(Events.ITERATION_STARTED)
    def look() -> None:
        divided.append(sharding(backend.put(trainer.state.batch).x))

    trainer.run(batches(sizes), max_epochs=1)
    found = {
        "losses": [loss.item() for loss in losses],
        "counts": counts,
        "divided": divided,
        "parameters": sorted({sharding(one) for one in model.state_dict().values()}),
        "state": sorted({sharding(s["momentum_buffer"]) for s in optimizer.state.values()}),
        "random": backend.rng_state(),
        "weights": [p.flatten().tolist() for p in model.parameters()],
    }
    Path(report).write_text(json.dumps(found))


def sharding(tensor: torch.Tensor) -> str:
    """How XLA has divided a tensor among the devices."""
    import torch_xla

    found: str = torch_xla._XLAC._get_xla_sharding_spec(tensor)
    return found


def move(report: str, devices: int) -> None:
    """Puts tensors of many shapes on the devices; writes which came back as they were, and how."""
    os.environ["CPU_NUM_DEVICES"] = str(devices)
    found: list[tuple[list[int], bool, str]] = []
    with backends.get("xla-spmd") as backend:
        for shape in ((8,), (8, 3), (4, 1, 2, 2), (6, 2), (7, 2), (1,), (), (0,), (0, 4)):
            tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
            moved = backend.put({"nest": [tensor]})["nest"][0]
            # A second time it is there already.
            again = backend.put(moved)
            backend.sync()
            same = torch.equal(moved.cpu(), tensor) and torch.equal(again.cpu(), tensor)
            found.append((list(shape), same, sharding(moved)))
    Path(report).write_text(json.dumps(found))


def refuse(report: str, first: str, then: str) -> None:
    """Opens a backend, uses it, and opens another; writes the message of its refusal."""
    os.environ["CPU_NUM_DEVICES"] = "2"
    with backends.get(first) as backend:
        backend.put(torch.ones(2))
        backend.sync()
    try:
        backends.get(then).open()
        message = ""
    except BackendError as error:
        message = str(error)
    Path(report).write_text(json.dumps(message))
