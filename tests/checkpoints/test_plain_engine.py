"""A plain Engine that goes on at the end of an epoch draws what it would have drawn."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from processes import results, run_world
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found; one world for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_world(2, "plain_ranks_program.py", str(folder), CROSSTRAIN_TIMEOUT="30")
    return results(folder, 2)


def test_each_rank_goes_on_with_its_own_random_states_and_statistics(ranks: Any) -> None:
    assert [rank["one call"] for rank in ranks] == [{"same": True, "told": []}] * 2


def test_where_one_rank_saves_alone_it_is_told_what_is_not_saved(ranks: Any) -> None:
    saving, other = (rank["by hand"] for rank in ranks)
    assert not saving["same"]
    assert not other["told"]
    assert "has not the random states of each" in saving["told"][0]


@pytest.mark.parametrize("case", ["still", "seeded"])
def test_where_one_rank_saves_alone_it_is_not_told_in_vain(ranks: Any, case: str) -> None:
    """Where nothing is drawn, or each epoch is seeded."""
    assert ranks[0][case] == {"same": True, "told": []}


class Stream:
    """Batches without end, and without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(100.0).split(1))


class Short(Stream):
    """Batches without a length, which end."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(3.0).split(1))


@pytest.mark.parametrize("data", [list(range(6)), Stream()])
def test_a_pass_that_goes_on_into_the_next_epoch_is_told(tmp_path: Path, data: Any) -> None:
    trainer = Engine(lambda engine, batch: None)
    resume_or_start(trainer, {}, tmp_path, every=Events.EPOCH_COMPLETED)
    with pytest.warns(ResumeWarning, match="inside a pass over the data, after 4 batches of it"):
        trainer.run(data, max_epochs=2, epoch_length=4)


@pytest.mark.parametrize(
    ("data", "length"), [([1, 2, 3], None), ([1, 2, 3], 3), ([1, 2, 3], 6), (Short(), None)]
)
def test_a_pass_that_ends_with_the_epoch_is_not_told(
    tmp_path: Path, data: Any, length: int | None
) -> None:
    trainer = Engine(lambda engine, batch: None)
    resume_or_start(trainer, {}, tmp_path, every=Events.EPOCH_COMPLETED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        trainer.run(data, max_epochs=3, epoch_length=length)
