"""What users keep on the trainer, its state, an evaluator, a model or an optimizer is told."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    ResumeWarning,
    create_supervised_evaluator,
    create_supervised_trainer,
    resume_or_start,
)

Attach = Callable[[Any, Any, Any], None]
CASES: dict[str, tuple[str, Attach]] = {}


def _case(told: str) -> Callable[[Attach], Attach]:
    def add(function: Attach) -> Attach:
        CASES[function.__name__.strip("_")] = (told, function)
        return function

    return add


class _Turns:
    """Gives a rate by how often it was asked."""

    def __init__(self) -> None:
        self.turns = 0

    def next(self) -> float:
        self.turns += 1
        return 0.1 / self.turns


def _turning() -> Callable[[], float]:
    kept = [0]

    def turn() -> float:
        kept[0] += 1
        return 0.1 / kept[0]

    return turn


def _each(trainer: Any, handler: Callable[[Any], Any]) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)


def _set(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@_case("optimizer, its 'counts'")
def _collection_of_the_optimizer(trainer: Any, model: Any, optimizer: Any) -> None:
    optimizer.counts = Counter()

    def turn(engine: Any) -> None:
        optimizer.counts["turns"] += 1
        _set(optimizer, 0.1 / optimizer.counts["turns"])

    _each(trainer, turn)


@_case("model.0, its 'helper.turns'")
def _object_of_a_layer(trainer: Any, model: Any, optimizer: Any) -> None:
    model[0].helper = _Turns()
    _each(trainer, lambda engine: _set(optimizer, model[0].helper.next()))


@_case("trainer, its 'helper.turns'")
def _object_of_the_trainer(trainer: Any, model: Any, optimizer: Any) -> None:
    trainer.helper = _Turns()
    _each(trainer, lambda engine: _set(optimizer, engine.helper.next()))


@_case("trainer, its turn, its 'kept'")
def _closure_of_the_trainer(trainer: Any, model: Any, optimizer: Any) -> None:
    trainer.turn = _turning()
    _each(trainer, lambda engine: _set(optimizer, engine.turn()))


@_case("trainer, its 'turns'")
def _number_of_the_trainer(trainer: Any, model: Any, optimizer: Any) -> None:
    def turn(engine: Any) -> None:
        setattr(engine, "turns", getattr(engine, "turns", 0) + 1)  # noqa: B009, B010
        _set(optimizer, 0.1 / vars(engine)["turns"])

    _each(trainer, turn)


@_case("trainer.state.helper.turns")
def _object_of_the_state(trainer: Any, model: Any, optimizer: Any) -> None:
    trainer.state.helper = _Turns()

    def turn(engine: Any) -> None:
        state = engine.state
        _set(optimizer, state.helper.next())

    _each(trainer, turn)


@_case("evaluator', its 'helper.turns'")
def _object_of_an_evaluator(trainer: Any, model: Any, optimizer: Any) -> None:
    evaluator = create_supervised_evaluator(model, backend="cpu")
    evaluator.helper = _Turns()  # type: ignore[attr-defined]
    _each(evaluator, lambda engine: _set(optimizer, engine.helper.next()))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(_data()))


@_case("trainer, its 'rng' (a Generator)")
def _generator_of_the_trainer(trainer: Any, model: Any, optimizer: Any) -> None:
    trainer.rng = numpy.random.default_rng(1)
    _each(trainer, lambda engine: _set(optimizer, 0.1 * engine.rng.random()))


@_case("optimizer, its 'rng' (a Random)")
def _generator_of_the_optimizer(trainer: Any, model: Any, optimizer: Any) -> None:
    optimizer.rng = random.Random(1)
    _each(trainer, lambda engine: _set(optimizer, 0.1 * optimizer.rng.random()))


def _data() -> list[Any]:
    return [(torch.ones(2, 3), torch.ones(2, 1))] * 3


def _made() -> tuple[Engine, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)
    return trainer, model, optimizer


def _said(folder: Path, attach: Attach) -> Iterator[str]:
    trainer, model, optimizer = _made()
    attach(trainer, model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume_or_start(trainer, {"model": model, "optimizer": optimizer}, folder, 1, signals=())
        trainer.run(_data(), max_epochs=2)
    yield from (str(one.message) for one in caught if one.category is ResumeWarning)


@pytest.mark.parametrize("name", CASES)
def test_what_a_handler_uses_of_them_is_told_once(name: str, tmp_path: Path) -> None:
    told, attach = CASES[name]
    (said,) = _said(tmp_path, attach)
    assert told in said


class _Result:
    def __init__(self, best: float) -> None:
        self.best = best


def test_what_is_a_log_or_anothers_is_not_told(tmp_path: Path) -> None:
    def attach(trainer: Any, model: Any, optimizer: Any) -> None:
        trainer.history, trainer.best, trainer.steps, model.seen = [], 0.0, 0, []
        result = _Result(0.3)

        def log(engine: Any) -> None:
            engine.history.append(engine.state.output)
            model.seen.append(engine.state.iteration)
            engine.steps += 1
            engine.best = engine.state.output
            print(engine.steps, engine.history)
            _set(optimizer, result.best)

        _each(trainer, log)

    assert not list(_said(tmp_path, attach))


def test_an_engine_has_nothing_of_its_own_that_counts_as_the_users(tmp_path: Path) -> None:
    trainer, model, optimizer = _made()
    resume_or_start(trainer, {"model": model, "optimizer": optimizer}, tmp_path, 1, signals=())
    trainer.run(_data(), max_epochs=1)
    for engine in (trainer, DeterministicEngine(lambda engine, batch: None)):
        ours = {name for kind in type(engine).__mro__ for name in vars(kind)}
        assert vars(engine).keys() <= engine.made_with | ours
