"""A plain Engine that goes on at the end of an epoch draws what it would have drawn."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import (
    Checkpoint,
    DiskSaver,
    Engine,
    Events,
    ResumeWarning,
    manual_seed,
    resume_or_start,
)


class Noisy(Dataset[torch.Tensor]):
    """Rows that are augmented by all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() + float(numpy.random.rand()) + torch.rand(4)
        return noise + index


def _by_hand(trainer: Engine, objects: dict[str, Any], folder: Path) -> None:
    """Saves and loads as scripts for pytorch-ignite do."""
    objects = {**objects, "trainer": trainer}
    saved = sorted(folder.glob("*.pt"))
    if saved:
        Checkpoint.load_objects(objects, saved[-1])
    handler = Checkpoint(objects, DiskSaver(folder, require_empty=False), n_saved=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)


def _by_one_call(trainer: Engine, objects: dict[str, Any], folder: Path) -> None:
    resume_or_start(trainer, objects, folder, every=Events.EPOCH_COMPLETED, n_saved=None)


def trained(
    folder: Path,
    epochs: int,
    seed: int,
    workers: int = 0,
    keep: bool = False,
    attach: Any = _by_one_call,
) -> Any:
    """Goes on in a folder; returns the weights, and how many iterations were done."""
    manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    done: list[int] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        done.append(engine.state.iteration)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    trainer = Engine(step)
    # The evaluation draws too, and so does a handler of the epoch's beginning.
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: random.random())
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: [*DataLoader(Noisy())])
    data = DataLoader(
        Noisy(), batch_size=4, shuffle=True, num_workers=workers, persistent_workers=keep
    )
    attach(trainer, {"model": model, "optimizer": optimizer}, folder)
    # What is drawn between the start and the run is nothing to the run that goes on.
    manual_seed(seed)
    trainer.run(data, max_epochs=epochs)
    return [one.detach().clone() for one in model.parameters()], done


@pytest.mark.parametrize("attach", [_by_hand, _by_one_call])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_with_the_same_bits(tmp_path: Path, workers: int, attach: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        whole, _ = trained(tmp_path / "whole", 3, 5, workers, attach=attach)
        trained(tmp_path / "parts", 1, 5, workers, attach=attach)
        trained(tmp_path / "parts", 2, 6, workers, attach=attach)
        parts, done = trained(tmp_path / "parts", 3, 7, workers, attach=attach)
    assert done == [7, 8, 9]
    assert all(map(torch.equal, whole, parts))


def test_workers_that_stay_are_told(tmp_path: Path) -> None:
    with pytest.warns(ResumeWarning, match="persistent_workers, and a plain Engine"):
        trained(tmp_path, 1, 5, 1, True)
