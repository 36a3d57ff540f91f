"""A dataset that refers to what others change goes on with it: the same object, and its contents.

A table of weights by index that the step writes, labels that a handler refines, memory that
processes share, indices to which samples are added: drawn at random, run straight and resumed.
"""

from __future__ import annotations

import multiprocessing
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import get
from crosstrain.engine import DeterministicEngine, Events, ResumeWarning, manual_seed
from crosstrain.engine import resume_or_start as start
from crosstrain.engine.digest import digest

SAMPLES = 24
KINDS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(SAMPLES),
    "an array": lambda: numpy.ones(SAMPLES),
    "a list": lambda: [1.0] * SAMPLES,
    "a dictionary": lambda: dict.fromkeys(range(SAMPLES), 1.0),
    "tensors in a tuple": lambda: (torch.ones(SAMPLES), 3),
    "shared memory": lambda: multiprocessing.Array("d", [1.0] * SAMPLES),
    "a shared tensor": lambda: torch.ones(SAMPLES).share_memory_(),
}
EVENTS = (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.EPOCH_COMPLETED(every=2))


class _Weighted(Dataset[Any]):
    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        weights = self.weights[0] if isinstance(self.weights, tuple) else self.weights
        return torch.full((3,), float(weights[index]) + index), torch.ones(1)


class _Growing(Dataset[Any]):
    """As long as its level says."""

    def __init__(self) -> None:
        self.level = 1

    def __len__(self) -> int:
        return 4 * self.level

    def __getitem__(self, index: int) -> Any:
        return torch.full((3,), float(index)), torch.ones(1)


class Ran(NamedTuple):
    """What a run did: digests of its batches and weights; and from which iteration on."""

    batches: list[str]
    final: str
    told: list[str]
    began: int


def _run(
    folder: Path,
    data: Any,
    attach: Callable[[Any], None],
    seed: int,
    limit: int | None = None,
    length: int | None = None,
) -> Ran:
    """Runs once, from the newest checkpoint of a folder on."""
    manual_seed(seed)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    backend = get("cpu").open()
    backend.prepare(model, optimizer)
    batches: list[str] = []

    def step(engine: Any, batch: Any) -> float:
        x, y = batch
        batches.append(digest(batch))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss)

    trainer = DeterministicEngine(step, backend)
    attach(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(trainer, {"model": model, "optimizer": optimizer}, folder, 1, signals=())
        began = trainer.state.iteration
        if limit is not None:
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED(once=limit), lambda: trainer.interrupt()
            )
        trainer.run(data, max_epochs=4, epoch_length=length)
    told = [str(one.message) for one in caught if one.category is ResumeWarning]
    return Ran(batches, digest(model.state_dict()), told, began)


def _compare(once: Callable[[str, int | None], Ran], stop: int) -> None:
    straight, stopped = once("straight", None), once("stopped", stop)
    resumed = once("stopped", None)
    # What ends a run with an epoch's last iteration ends it before that epoch's end is saved.
    assert resumed.began in (stop, stop - 1)
    assert stopped.batches == straight.batches[:stop]
    assert resumed.batches == straight.batches[resumed.began :]
    assert resumed.final == straight.final
    assert resumed.told == []


def _draws() -> list[tuple[str, int, int, int]]:
    choose = random.Random(3)
    return [
        (kind, choose.randrange(len(EVENTS)), choose.choice((0, 0, 2)), choose.randrange(1, 15))
        for kind in KINDS
        for _ in range(2)
    ]


@pytest.mark.parametrize(("kind", "event", "workers", "stop"), _draws())
def test_what_somebody_else_writes_reaches_the_dataset_of_a_resumed_run(
    kind: str, event: int, workers: int, stop: int, tmp_path: Path
) -> None:
    def once(folder: str, limit: int | None) -> Ran:
        weights = KINDS[kind]()
        # Who writes knows nothing of the dataset.
        table = weights[0] if isinstance(weights, tuple) else weights

        def write(engine: Any) -> None:
            for index in range(0, SAMPLES, 2):
                table[index] = 0.5 * engine.state.epoch

        def attach(trainer: Any) -> None:
            trainer.add_event_handler(EVENTS[event], write)

        loader = DataLoader(_Weighted(weights), 6, shuffle=True, num_workers=workers)
        return _run(tmp_path / folder, loader, attach, 5, limit)

    _compare(once, stop)


@pytest.mark.parametrize("kind", ["shared memory", "a shared tensor"])
def test_workers_leave_alone_what_they_share(kind: str, tmp_path: Path) -> None:
    """Each asks what the dataset keeps, while others fetch."""
    for stop in (5, 13):
        test_what_somebody_else_writes_reaches_the_dataset_of_a_resumed_run(
            kind, 1, 2, stop, tmp_path / str(stop)
        )


@pytest.mark.parametrize("stop", [2, 6, 9, 13])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_dataset_whose_length_follows_from_what_a_handler_sets_goes_on(
    shuffle: bool, stop: int, tmp_path: Path
) -> None:
    def once(folder: str, limit: int | None) -> Ran:
        dataset = _Growing()

        def grow() -> None:
            dataset.level += 1

        def attach(trainer: Any) -> None:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, grow)

        loader = DataLoader(dataset, 2, shuffle=shuffle)
        return _run(tmp_path / folder, loader, attach, 5, limit, length=5)

    _compare(once, stop)


def test_shared_memory_that_changes_while_workers_fetch_is_told(tmp_path: Path) -> None:
    weights = multiprocessing.Array("d", [1.0] * SAMPLES)

    def attach(trainer: Any) -> None:
        def write() -> None:
            weights[0] += 1

        trainer.add_event_handler(Events.ITERATION_COMPLETED, write)

    loader = DataLoader(_Weighted(weights), 6, num_workers=1)
    told = _run(tmp_path, loader, attach, 5).told
    assert len(told) == 1
    assert "dataset.weights" in told[0]
    assert "while workers fetch" in told[0]
