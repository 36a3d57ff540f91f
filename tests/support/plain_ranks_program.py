"""A program for several processes: plain Engines that go on at the end of an epoch."""

from __future__ import annotations

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from crosstrain.backends import Backend, get
from crosstrain.engine import (
    Checkpoint,
    DiskSaver,
    Engine,
    Events,
    manual_seed,
    resume_or_start,
)


class Rows(Dataset[torch.Tensor]):
    """Rows that are augmented by all three generators, or not."""

    def __init__(self, noisy: bool) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.zeros(4)
        if self.noisy:
            noise = random.random() + float(numpy.random.rand()) + torch.rand(4)
        return noise + index


def _saved_by_hand(trainer: Engine, objects: dict[str, Any], folder: Path, rank: int) -> None:
    """As ported scripts do: one rank saves, and all load."""
    objects = {**objects, "trainer": trainer}
    if saved := sorted(folder.glob("*.pt")):
        Checkpoint.load_objects(objects, saved[-1])
    if rank == 0:
        handler = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=None)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)


def trained(
    backend: Backend, folder: Path, epochs: int, seed: int, case: str = "one call"
) -> list[float]:
    """Trains, or goes on in a folder; returns the weights and what batch norm has kept."""
    rank = backend.world.rank
    folder.mkdir(exist_ok=True)
    manual_seed(1)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5 if case != "still" else 0)]
    model: Any = nn.Sequential(*layers, nn.Linear(4, 1))
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = backend.prepare(model, optimizer)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    data = Rows(noisy=case != "still")
    sampler = DistributedSampler(data, shuffle=True)
    trainer = Engine(step, backend)

    @trainer.on(Events.EPOCH_STARTED)
    def begin() -> None:
        sampler.set_epoch(trainer.state.epoch)
        if case == "seeded":
            manual_seed(7 * trainer.state.epoch + rank)

    objects = {"model": model, "optimizer": optimizer}
    if case == "one call":
        resume_or_start(
            trainer, objects, folder, every=Events.EPOCH_COMPLETED, n_saved=None, signals=()
        )
    else:
        _saved_by_hand(trainer, objects, folder, rank)
    # What is drawn between the start and the run is nothing to the run that goes on.
    manual_seed(100 * seed + rank)
    trainer.run(DataLoader(data, batch_size=4, sampler=sampler), max_epochs=epochs)
    return [value for one in model.state_dict().values() for value in one.flatten().tolist()]


def tried(folder: Path, backend: Backend, case: str) -> dict[str, Any]:
    """A run that does not stop, and one in three parts; what was told of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = trained(backend, folder / f"{case} whole", 3, 1, case)
        for epochs in (1, 2, 3):
            parts = trained(backend, folder / f"{case} parts", epochs, epochs, case)
    return {"same": whole == parts, "told": [str(one.message) for one in caught]}


if __name__ == "__main__":
    place, opened = Path(sys.argv[1]), get("cpu").open()
    world = opened.world
    found = {
        case: tried(place, opened, case) for case in ("one call", "by hand", "still", "seeded")
    }
    (place / f"{world.rank}-of-{world.size}.json").write_text(json.dumps(found))
