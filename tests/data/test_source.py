"""ResumableSource: second loaders, streams and generators that are named resume exactly."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from crosstrain.engine import (
    Checks,
    DataUsedUp,
    DeterministicEngine,
    Events,
    ResumableSource,
    ResumeError,
    ResumeWarning,
    manual_seed,
    resume_or_start,
)


class Noisy(Dataset[Any]):
    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, self.offset + random.random(), np.random.rand()])


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < 7:
            self.place += 1
            yield torch.tensor([self.place, torch.rand(())])
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def _endless() -> Iterator[Any]:
    while True:
        yield torch.rand(2) + np.random.rand()


DATA: dict[str, Callable[[], Any]] = {
    "loader": lambda: ResumableSource(DataLoader(Noisy(), 3, shuffle=True)),
    "workers": lambda: ResumableSource(DataLoader(Noisy(), 3, shuffle=True, num_workers=1)),
    "stateful stream": lambda: ResumableSource(DataLoader(Stream(), 2)),
    "function": lambda: ResumableSource(_endless),
    "iterator": lambda: ResumableSource(_endless()),
    "list": lambda: ResumableSource([torch.ones(1) * n for n in range(3)]),
    "pairs": lambda: ResumableSource(
        lambda: zip(
            DataLoader(Noisy(), 3, shuffle=True),
            itertools.cycle(DataLoader(Noisy(), 2, shuffle=True)),
            strict=False,
        )
    ),
}
GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "torch": (torch.Generator, lambda g: float(torch.rand((), generator=g))),
    "numpy": (lambda: np.random.default_rng(3), lambda g: float(g.normal())),
    "numpy, legacy": (lambda: np.random.RandomState(3), lambda g: float(g.normal())),
    "python": (lambda: random.Random(3), lambda g: g.gauss(0, 1)),
}


def _run(
    folder: Path, source: ResumableSource, draw: Callable[[], Any], seed: int, stop: int = 0
) -> dict[int, Any]:
    """Runs six iterations, or goes on; returns what each of them drew, from all streams."""
    manual_seed(seed)
    seen: dict[int, Any] = {}

    def step(engine: Any, batch: Any) -> None:
        seen[engine.state.iteration] = repr(draw()), batch, random.random(), float(torch.rand(()))

    engine = DeterministicEngine(step, checks=Checks(unnamed="error"))
    resume_or_start(engine, {"source": source}, folder, every=1, background=False, signals=())
    if stop:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=stop), lambda: engine.terminate(goes_on=True)
        )
    engine.run([0, 1, 2], max_epochs=3)
    return seen


def _resumes(
    folder: Path, make: Callable[[], ResumableSource], draw: Callable[[ResumableSource], Any]
) -> None:
    def play(name: str, seed: int, stop: int = 0) -> dict[int, Any]:
        source = make()
        return _run(folder / name, source, lambda: draw(source), seed, stop)

    manual_seed(5)
    straight = play("straight", 1)
    for stop in (1, 3, 4, 7):
        manual_seed(5)
        first = play(f"at {stop}", 1, stop)
        manual_seed(6)
        assert {**first, **play(f"at {stop}", 2)} == straight


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
@pytest.mark.parametrize("kind", DATA)
def test_named_data_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    _resumes(tmp_path, DATA[kind], next)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_named_generator_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    make, draw = GENERATORS[kind]
    _resumes(tmp_path, lambda: ResumableSource(make()), lambda source: draw(source.source))


def test_fetching_leaves_the_global_streams_alone() -> None:
    manual_seed(1)
    source = DATA["loader"]()
    before = random.random(), np.random.rand(), float(torch.rand(()))
    manual_seed(1)
    source = DATA["loader"]()
    for _ in range(9):
        next(source)
    assert before == (random.random(), np.random.rand(), float(torch.rand(())))


def test_a_pass_can_have_an_end() -> None:
    source = ResumableSource(DataLoader(Noisy(), 4, shuffle=True), endless=False, seed=3)
    passes = [[batch.tolist() for batch in source] for _ in range(2)]
    assert len(source) == len(passes[0]) == len(passes[1]) == 3
    assert passes[0] != passes[1]
    state = source.state_dict()
    fresh = ResumableSource(DataLoader(Noisy(), 4, shuffle=True), endless=False)
    fresh.load_state_dict(state)
    assert [batch.tolist() for batch in fresh] == [batch.tolist() for batch in source]


def test_other_data_is_an_error_before_it_is_given() -> None:
    source = ResumableSource(DataLoader(Noisy(), 4), seed=3)
    next(source)
    for checks in (Checks(), Checks(batch_before="warn")):
        other = ResumableSource(DataLoader(Noisy(1.0), 4), checks=checks)
        other.load_state_dict(source.state_dict())
        if checks == Checks():
            with pytest.raises(ResumeError, match="has other contents"):
                next(other)
        else:
            with pytest.warns(ResumeWarning, match="has other contents"):
                next(other)


def test_what_is_not_named_is_told() -> None:
    source = DATA["loader"]()
    engine = DeterministicEngine(lambda engine, batch: next(source))
    engine.run([1])
    with pytest.warns(ResumeWarning, match=r"'source' \(a ResumableSource\).* to_save"):
        engine.state_dict()


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a random generator, data, or a function"):
        ResumableSource(3)
    with pytest.raises(TypeError, match=r"use \.source"):
        next(ResumableSource(torch.Generator()))
    with pytest.raises(ValueError, match="The state is that of a random generator"):
        ResumableSource([1]).load_state_dict(ResumableSource(torch.Generator()).state_dict())
    used = ResumableSource(iter([1]))
    assert next(used) == 1
    with pytest.raises(DataUsedUp, match="endless=False"):
        next(used)


def test_nothing_is_told_of_what_is_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = DATA["loader"]()
        next(source)
        source.load_state_dict(source.state_dict())
        next(source)
