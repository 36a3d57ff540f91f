"""What a step or a handler draws from and no checkpoint holds is told when a state is taken."""

from __future__ import annotations

import csv
import io
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
    ResumeError,
    ResumeWarning,
    create_supervised_trainer,
)

GENERATOR = torch.Generator()


def _endless() -> Iterator[int]:
    while True:
        yield 1


ENDLESS = _endless()


class Holder:
    """A user's object with a method as the step or a handler."""

    def __init__(self, source: Any) -> None:
        self.parts = {"source": source}

    def step(self, engine: Any, batch: Any) -> Any:
        return self.parts["source"]


def _module_level(engine: Any, batch: Any) -> Any:
    return torch.rand((), generator=GENERATOR)


SOURCES: dict[str, Callable[[], Any]] = {
    "torch": torch.Generator,
    "numpy": np.random.default_rng,
    "numpy, legacy": np.random.RandomState,
    "python": random.Random,
    "generator": _endless,
    "loader": lambda: iter(DataLoader([1, 2, 3])),
    "cycle": lambda: itertools.cycle([1]),
    "list": lambda: iter([1, 2]),
    "array": lambda: iter(np.ones(2)),
    "nditer": lambda: np.nditer(np.ones(2)),
    "backwards": lambda: reversed([1, 2]),
    "calls": lambda: iter(lambda: 1, 2),
    "table": lambda: csv.reader(["1,2"]),
}


def _steps(source: Any) -> dict[str, Callable[..., Any]]:
    def closure(engine: Any, batch: Any) -> Any:
        return source

    def default(engine: Any, batch: Any, source: Any = source) -> Any:
        return source

    def inner(engine: Any, batch: Any) -> Any:
        return closure(engine, batch)

    def argument(source: Any, engine: Any, batch: Any) -> Any:
        return source

    return {
        "closure": closure,
        "default": default,
        "inner": inner,
        "partial": partial(argument, source),
        "method": Holder(source).step,
    }


def _take(engine: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run([1, 2])
        engine.state_dict()
        engine.state_dict()
    return [str(w.message) for w in caught if w.category is ResumeWarning]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("place", _steps(None))
def test_it_is_told_once_wherever_it_is(kind: str, place: str) -> None:
    said = _take(DeterministicEngine(_steps(SOURCES[kind]())[place], seed=1))
    assert len(said) == 1, said
    assert "the step" in said[0]
    assert "to_save" in said[0]


def test_a_global_and_a_handler_are_told_by_name() -> None:
    engine = DeterministicEngine(_module_level, seed=1)
    source = random.Random()
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: source.random())
    (said,) = _take(engine)
    assert "the step, its 'GENERATOR' (a Generator)" in said
    assert "a handler of ITERATION_COMPLETED" in said
    assert "'source' (a Random)" in said


class Helper:
    """An object of the user's whose method draws from a generator that it does not hold."""

    def draw(self) -> Any:
        return torch.rand((), generator=GENERATOR)

    def unused(self) -> Any:
        return next(ENDLESS)


def test_what_a_method_draws_from_is_told_where_it_is_called() -> None:
    helper = Helper()
    (said,) = _take(DeterministicEngine(lambda engine, batch: helper.draw(), seed=1))
    assert "the step, its 'GENERATOR' (a Generator)" in said
    assert "ENDLESS" not in said


def test_the_options_of_a_step_are_looked_into() -> None:
    source = np.random.default_rng(1)

    def prepare(batch: Any, **_: Any) -> Any:
        x, y = batch
        return x + float(source.random()), y

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, prepare_batch=prepare, deterministic=True
    )
    trainer.run([(torch.ones(1, 2), torch.ones(1, 1))])
    with pytest.warns(ResumeWarning, match="'source' \\(a Generator\\)"):
        trainer.state_dict()


def test_what_is_no_source_of_draws_is_not_told() -> None:
    model, loader, history = nn.Linear(2, 2), DataLoader([1, 2]), [1.0]
    log = io.StringIO()

    def step(engine: Any, batch: Any) -> Any:
        torch.manual_seed(3)
        np.random.rand()
        random.random()
        log.write("step")
        return model, loader, Events

    engine = DeterministicEngine(step, seed=1)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: history.append(2.0))
    assert not _take(engine)


@pytest.mark.parametrize("strictness", ["off", "error"])
def test_how_strict_it_is_can_be_chosen(strictness: Any) -> None:
    source = random.Random()
    engine = DeterministicEngine(
        lambda engine, batch: source.random(), seed=1, checks=Checks(unnamed=strictness)
    )
    if strictness == "off":
        assert not _take(engine)
    else:
        with pytest.raises(ResumeError, match="'source' \\(a Random\\)"):
            _take(engine)
