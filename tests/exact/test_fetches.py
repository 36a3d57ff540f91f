"""A handler that fetches from the training's dataset is told where other workers draw otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine import Checks, DeterministicEngine, Engine, Events, ResumeWarning

Fetch = Callable[[Any], Any]


class _Data(Dataset[float]):
    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return index + (float(torch.rand(())) if self.draws else 0.0)


class _Lazy(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(8, ())) for _ in range(8))

    def __len__(self) -> int:
        return 8


def _loader(kind: str, workers: int) -> Any:
    more: dict[str, Any] = {
        "own generator": {"shuffle": True, "generator": torch.Generator().manual_seed(3)},
        "lazy": {"sampler": _Lazy()},
        "draws": {},
        "shuffled": {"shuffle": True},
    }[kind]
    return DataLoader(_Data(kind == "draws"), batch_size=2, num_workers=workers, **more)


def _evaluate(data: Any) -> Any:
    evaluator = Engine(lambda engine, batch: None)
    return lambda: evaluator.run(data, epoch_length=2)


def _ask_length(data: Any) -> Any:
    return lambda engine: setattr(engine.state, "share", engine.state.iteration / len(data))


class _Harness:
    """Holds the loader that is trained with, and fetches from another."""

    def __init__(self, data: Any) -> None:
        self.data, self.others = data, [1, 2]

    def own(self) -> None:
        list(self.data)

    def other(self) -> None:
        list(self.others)


def _play(kind: str, workers: int, fetch: Fetch, state: Any = None, **options: Any) -> list[str]:
    data = _loader(kind, workers)
    engine = DeterministicEngine(lambda engine, batch: batch + torch.rand(()), seed=1, **options)
    states: list[Any] = []
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), fetch(data))
    if state is None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: states.append(engine.state_dict())
        )
    else:
        engine.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run(data, max_epochs=2)
    said = [str(item.message) for item in caught if item.category is ResumeWarning]
    return states if state is None else said


@pytest.mark.parametrize("kind", ["own generator", "lazy", "draws"])
def test_a_handler_that_fetches_is_told_of_other_workers(kind: str) -> None:
    (state,) = _play(kind, 0, _evaluate)
    (said,) = _play(kind, 1, _evaluate, state)
    assert "_evaluate.<locals>.<lambda>" in said
    assert "num_workers, which was 0 and is 1" in said
    assert not _play(kind, 1, _evaluate, state, checks=Checks(unnamed="off"))


def test_a_method_that_fetches_is_told() -> None:
    (state,) = _play("own generator", 0, lambda data: _Harness(data).own)
    (said,) = _play("own generator", 1, lambda data: _Harness(data).own, state)
    assert "_Harness.own" in said
    assert "'object.data'" in said


@pytest.mark.parametrize(
    ("kind", "workers", "fetch"),
    [
        ("shuffled", 1, _evaluate),
        ("own generator", 0, _evaluate),
        ("own generator", 1, _ask_length),
        ("own generator", 1, lambda data: _Harness(data).other),
    ],
)
def test_what_draws_the_same_is_not_told(kind: str, workers: int, fetch: Fetch) -> None:
    (state,) = _play(kind, 0, fetch)
    assert not _play(kind, workers, fetch, state)
