"""What users keep on the trainer, its state, an evaluator, a model or an optimizer is told."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from collections.abc import Callable
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
from crosstrain.engine.unsaved.added_attributes import names_of_ours

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
        setattr(engine, "turns", getattr(engine, "turns", 0) + 1)  # noqa: B010
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


class _Named:
    """A named object that turns by a collection or a tensor, and has what it is told in its state.

    Args:
        kept: what it turns by.
        state: makes of that what its state has.
    """

    def __init__(self, kept: Any, state: Callable[[Any], Any]) -> None:
        self.kept, self.rate, self._state = kept, 0.1, state

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "as": self._state(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate = state["rate"]

    def next(self) -> float:
        if isinstance(self.kept, torch.Tensor):
            self.kept += 1
        elif isinstance(self.kept, dict):
            self.kept["turns"] += 1
        else:
            self.kept.append(len(self.kept))
        return 0.1 / float(sum(self.kept.values() if isinstance(self.kept, dict) else self.kept))


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a list": (lambda: [1, 2], tuple),
    "a deque": (lambda: deque([1, 2], 5), list),
    "a counter": (lambda: Counter(turns=3), dict),
    "a tensor": (lambda: torch.ones(1), float),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("saved", [True, False])
def test_what_a_named_object_leaves_out_of_its_state_is_told(
    name: str, saved: bool, tmp_path: Path
) -> None:
    kept, state = KEPT[name]
    named = _Named(kept(), state if saved else lambda kept: None)

    def attach(trainer: Any, model: Any, optimizer: Any) -> None:
        _each(trainer, lambda engine: _set(optimizer, named.next()))

    told = _said(tmp_path, attach, {"named": named})
    assert len(told) == (not saved), told
    assert saved or "its 'named.kept'" in told[0]


class _Counting(torch.optim.SGD):
    """Has a state of its own, without what its steps follow from."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1)
        self.turns = [0]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "version": 1}

    def step(self, closure: Any = None) -> Any:
        self.turns[0] += 1
        _set(self, 0.1 / self.turns[0])
        return super().step(closure)


def test_what_an_optimizer_leaves_out_of_a_state_of_its_own_is_told(tmp_path: Path) -> None:
    trainer, model, _ = _made(_Counting)
    (told,) = _told(tmp_path, trainer, {"model": model, "optimizer": trainer.objects["optimizer"]})
    assert "the step of optimizer, its 'self.turns'" in told


def test_a_class_that_is_passed_on_and_counts_is_told(tmp_path: Path) -> None:
    class Counting(type):
        calls = 0

        def __call__(cls) -> float:
            cls.calls += 1
            return 0.1 / cls.calls

    class Rate(metaclass=Counting):
        pass

    def turn(optimizer: Any, rate: Any) -> None:
        _set(optimizer, rate())

    def attach(trainer: Any, model: Any, optimizer: Any) -> None:
        _each(trainer, lambda engine: turn(optimizer, Rate))

    (told,) = _said(tmp_path, attach)
    assert "its 'Rate.calls'" in told


def _data() -> list[Any]:
    return [(torch.ones(2, 3), torch.ones(2, 1))] * 3


def _made(kind: Any = torch.optim.SGD) -> tuple[Engine, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = kind(model.parameters())
    loss = nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)
    return trainer, model, optimizer


def _told(folder: Path, trainer: Engine, to_save: dict[str, Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume_or_start(trainer, to_save, folder, 1, signals=())
        trainer.run(_data(), max_epochs=2)
    return [str(one.message) for one in caught if one.category is ResumeWarning]


def _said(folder: Path, attach: Attach, more: dict[str, Any] | None = None) -> list[str]:
    trainer, model, optimizer = _made()
    attach(trainer, model, optimizer)
    return _told(folder, trainer, {"model": model, "optimizer": optimizer, **(more or {})})


@pytest.mark.parametrize("name", CASES)
def test_what_a_handler_uses_of_them_is_told_once(name: str, tmp_path: Path) -> None:
    told, attach = CASES[name]
    (said,) = _said(tmp_path, attach)
    assert told in said


class _Result:
    def __init__(self, best: float) -> None:
        self.best = best


class _Trained(nn.Linear):
    """A layer that has its own optimizer, as a model of a project often does."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.own = torch.optim.Adam(self.parameters(), 0.1)

    def train_on(self, x: torch.Tensor) -> torch.Tensor:
        return self.update(self(x))

    def update(self, found: torch.Tensor) -> torch.Tensor:
        self.own.zero_grad()
        (found**2).mean().backward()
        self.own.step()
        return found.detach()

    @property
    def trained(self) -> Any:
        raise AssertionError("nobody has asked for it")


def _by_its_name(model: nn.Sequential) -> Callable[[Any, Any], Any]:
    layer = model[0]
    return lambda engine, batch: layer.train_on(batch)


def _in_a_loop(model: nn.Sequential) -> Callable[[Any, Any], Any]:
    def step(engine: Any, batch: Any) -> None:
        for layer in model:
            batch = layer.train_on(batch)

    return step


def _itself(model: nn.Sequential) -> Callable[[Any, Any], Any]:
    train: Any = model[0].train_on
    return lambda engine, batch: train(batch)


@pytest.mark.parametrize("step", [_by_its_name, _in_a_loop, _itself])
def test_what_a_method_of_a_layers_own_uses_is_told(step: Any, tmp_path: Path) -> None:
    def messages(named: bool) -> list[str]:
        model = nn.Sequential(_Trained())
        trainer = DeterministicEngine(step(model), seed=1)
        beside = {"own": model[0].own} if named else {}
        folder = tmp_path / str(named)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResumeWarning)
            resume_or_start(trainer, {"model": model, **beside}, folder, every=1)
            trainer.run(torch.ones(3, 2, 4), max_epochs=1)
        return [str(one.message) for one in caught]

    assert not messages(named=True)
    told = messages(named=False)
    assert len([one for one in told if ".own'" in one]) == 1, told


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

    assert not _said(tmp_path, attach)


def test_an_engine_has_nothing_of_its_own_that_counts_as_the_users(tmp_path: Path) -> None:
    trainer, model, optimizer = _made()
    resume_or_start(trainer, {"model": model, "optimizer": optimizer}, tmp_path, 1, signals=())
    trainer.run(_data(), max_epochs=1)
    for engine in (trainer, DeterministicEngine(lambda engine, batch: None)):
        kind: Any = type(engine)
        assert vars(engine).keys() <= names_of_ours(kind)


def _switched_variable(trainer: Any, one: Any, other: Any) -> None:
    now = one

    def switch() -> None:
        nonlocal now
        now = other

    _each(trainer, lambda engine: _set(now, 0.05))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), switch)


def _switched_attribute(trainer: Any, one: Any, other: Any) -> None:
    trainer.now = {"optimizer": one}

    def switch() -> None:
        trainer.now["optimizer"] = other

    _each(trainer, lambda engine: _set(engine.now["optimizer"], 0.05))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), switch)


def _set_when_due(trainer: Any, one: Any, other: Any) -> None:
    now = None

    def turn() -> None:
        nonlocal now
        now = now or other
        _set(now, 0.05)

    _each(trainer, lambda engine: turn())


@pytest.mark.parametrize(
    ("attach", "told"),
    [
        (_switched_variable, "its 'now'"),
        (_switched_attribute, "its \"now['optimizer']\""),
        (_set_when_due, None),
    ],
)
def test_a_variable_that_goes_from_one_named_object_to_another_is_told(
    attach: Any, told: str | None, tmp_path: Path
) -> None:
    trainer, model, optimizer = _made()
    other = torch.optim.SGD(model.parameters(), 0.2)
    attach(trainer, optimizer, other)
    to_save = {"model": model, "optimizer": optimizer, "other": other}
    said = _told(tmp_path, trainer, to_save)
    assert len(said) == (told is not None), said
    assert told is None or told in said[0]
