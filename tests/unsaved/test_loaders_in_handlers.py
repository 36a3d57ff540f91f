"""A handler that fetches from the training's dataset is told where other workers draw otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

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


def _run(engine: DeterministicEngine, data: Any, state: Any) -> tuple[list[Any], list[str]]:
    """Runs two epochs; returns the state after two iterations, or what going on from one says."""
    states: list[Any] = []
    if state is None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: states.append(engine.state_dict())
        )
    else:
        engine.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run(data, max_epochs=2)
    return states, [str(item.message) for item in caught if item.category is ResumeWarning]


def _play(kind: str, workers: int, fetch: Fetch, state: Any = None, **options: Any) -> list[str]:
    data = _loader(kind, workers)
    engine = DeterministicEngine(lambda engine, batch: batch + torch.rand(()), seed=1, **options)
    engine.add_event_handler(Events.EPOCH_STARTED(once=2), fetch(data))
    states, said = _run(engine, data, state)
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


class _Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return iter([1.0, 2.0])


def _noisy(samples: list[float]) -> Any:
    return torch.tensor(samples) + torch.rand(())


OTHERS: dict[str, tuple[Callable[[int], Any], str | None]] = {
    "a dataset that draws": (lambda n: DataLoader(_Data(True), 2, num_workers=n), "_Data"),
    "a collator that draws": (
        lambda n: DataLoader(_Data(False), 2, num_workers=n, collate_fn=_noisy),
        "_Data or what collates its samples",
    ),
    "a sampler that draws late": (
        lambda n: DataLoader(_Data(False), sampler=_Lazy(), num_workers=n),
        "BatchSampler",
    ),
    "a stream": (lambda n: DataLoader(_Stream(), num_workers=n), "_Stream"),
    "nothing draws": (lambda n: DataLoader(_Data(False), 2, num_workers=n, shuffle=True), None),
    "nothing can be fetched": (lambda n: DataLoader(_Keys(), num_workers=n), "_Keys"),
}


class _Keys(_Data):
    """Its indices are no numbers."""

    def __init__(self) -> None:
        super().__init__(False)

    def __getitem__(self, index: Any) -> float:
        return {"a": 1.0}[index]


def _play_with_others(name: str, workers: int, state: Any = None) -> tuple[Any, list[Any]]:
    """Trains on a list, and iterates over another loader after the epoch."""
    others = OTHERS[name][0](workers)
    engine = DeterministicEngine(lambda engine, batch: float(torch.rand(())), seed=1)
    rows: list[Any] = []
    # No worker is started here: what matters is that the handler could.
    handler = (lambda: engine.state.epoch > 9 and list(others)) if workers else lambda: list(others)
    if name == "nothing can be fetched":
        handler = lambda: engine.state.epoch > 9 and list(others)  # noqa: E731
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: rows.append(engine.state.output))
    states, told = _run(engine, [1.0, 2.0, 3.0], state)
    said = [message for message in told if "num_workers" in message]
    return (states[0] if states else said), rows


@pytest.mark.parametrize("name", OTHERS)
def test_a_loader_of_another_dataset_is_told_where_it_draws(name: str) -> None:
    told = OTHERS[name][1]
    state, rows = _play_with_others(name, 0)
    said, rest = _play_with_others(name, 1, state)
    if told is None:
        assert not said
    else:
        (message,) = said
        assert f"'others', has been iterated over: what its {told}" in message
        assert "num_workers, which was 0 and is 1" in message
    # Looking at it has changed nothing; with as many workers nothing is said.
    said, rest = _play_with_others(name, 0, state)
    assert (said, rest) == ([], rows[2:])


def _evaluated(loader: Any, states: list[Any], state: Any = None) -> tuple[list[Any], list[str]]:
    """Trains on a list, and iterates over a loader after each second iteration."""
    engine = DeterministicEngine(lambda engine, batch: float(torch.rand(())), seed=1)
    rows: list[Any] = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: list(loader))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: rows.append(engine.state.output))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: states.append(engine.state_dict()))
    if state is not None:
        engine.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run([1.0] * 7, max_epochs=1)
    # A collector would wait 5 s for each of its workers.
    loader._iterator = None
    return rows, [str(item.message) for item in caught if "_workers" in str(item.message)]


def _persistent(draws: bool = False, workers: int = 1, **more: Any) -> Any:
    return DataLoader(
        _Data(draws), 4, num_workers=workers, persistent_workers=workers > 0, shuffle=True, **more
    )


@pytest.mark.parametrize("own", [False, True])
def test_persistent_workers_of_an_evaluation_draw_their_seed_once(own: bool) -> None:
    """They had drawn it before the run was stopped: dropout would be another one after it."""

    def make() -> Any:
        return _persistent(generator=torch.Generator().manual_seed(2) if own else None)

    states: list[Any] = []
    rows, _ = _evaluated(make(), states)
    for done in (1, 3, 5):
        assert _evaluated(make(), [], states[done - 1]) == (rows[done:], [])


def test_what_draws_in_persistent_workers_is_told() -> None:
    states: list[Any] = []
    _evaluated(_persistent(True), states)
    _, (said,) = _evaluated(_persistent(True), [], states[2])
    assert "its 'loader', has been iterated over: what its _Data or what collates" in said
    assert "draws in its persistent workers" in said
    assert _evaluated(_persistent(True), [], states[0])[1] == []


def test_workers_that_stay_no_longer_are_told() -> None:
    states: list[Any] = []
    _evaluated(_persistent(), states)
    _, (said,) = _evaluated(_persistent(workers=0), [], states[2])
    assert "had num_workers=1, persistent_workers=True and has num_workers=0" in said


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
