"""What a named object holds goes on with it only if its state has it: drawn at random, told if not.

An agent whose state is its networks' and not its replay buffer's, a loss balancer whose meters are
left out, an optimizer around another that forgets its slow weights.
"""

from __future__ import annotations

import enum
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from crosstrain.engine import Events, ResumeWarning, create_supervised_trainer, resume_or_start


class _Meter:
    def __init__(self) -> None:
        self.value = 1.0

    def next(self) -> float:
        self.value = 0.9 * self.value + 0.05
        return self.value


class _Buffer:
    def __init__(self) -> None:
        self.items: list[float] = []

    def next(self) -> float:
        self.items.append(0.5 + len(self.items))
        return sum(self.items)


class _Stateful(_Meter):
    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


# What turns, and what a state has of it.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a number in an object": (_Meter, lambda kept: kept.value),
    "a list in an object": (_Buffer, lambda kept: list(kept.items)),
    "an object with a state": (_Stateful, lambda kept: kept.state_dict()),
    "a generator of Python's": (lambda: random.Random(1), lambda kept: kept.getstate()),
    "a generator of NumPy's": (
        lambda: numpy.random.default_rng(1),
        lambda kept: kept.bit_generator.state,
    ),
    "a generator of torch's": (
        lambda: torch.Generator().manual_seed(1),
        lambda kept: kept.get_state(),
    ),
}
PLACES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda kept: kept,
    "a dictionary": lambda kept: {"kept": kept},
    "a list": lambda kept: [kept],
}


def _turned(kept: Any) -> float:
    if isinstance(kept, torch.Generator):
        return float(torch.rand((), generator=kept))
    return float(kept.next() if hasattr(kept, "next") else kept.random())


class _Holder:
    """A named object that holds another.

    Args:
        kind: of `KINDS`.
        place: of `PLACES`.
        saved: whether its state has the other's.
    """

    def __init__(self, kind: str, place: str, saved: bool) -> None:
        make, self._state = KINDS[kind]
        self.inner = PLACES[place](make())
        self.saved, self.turns = saved, 0

    def kept(self) -> Any:
        inner = self.inner
        return next(iter(inner.values() if isinstance(inner, dict) else inner), None)

    def next(self) -> float:
        self.turns += 1
        return _turned(self.kept() if isinstance(self.inner, (dict, list)) else self.inner)

    def state_dict(self) -> dict[str, Any]:
        kept = self.kept() if isinstance(self.inner, (dict, list)) else self.inner
        return {"turns": self.turns, "kept": self._state(kept) if self.saved else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = state["turns"]


def _said(folder: Path, more: dict[str, Any], rate: Callable[[], float], kind: Any) -> list[str]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = kind(model.parameters())
    loss = nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)

    def turn() -> None:
        optimizer.param_groups[0]["lr"] = 0.01 * rate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, turn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_save = {"model": model, "optimizer": optimizer, **more}
        resume_or_start(trainer, to_save, folder, 1, signals=())
        trainer.run([(torch.ones(2, 3), torch.ones(2, 1))] * 3, max_epochs=2)
    return [str(one.message) for one in caught if one.category is ResumeWarning]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


def _draws(count: int) -> list[tuple[str, str, bool]]:
    choose = random.Random(5)
    every = [(kind, place, saved) for kind in KINDS for place in PLACES for saved in (True, False)]
    return choose.sample(every, count)


@pytest.mark.parametrize(("kind", "place", "saved"), _draws(24))
def test_what_a_named_object_holds_is_told_unless_its_state_has_it(
    kind: str, place: str, saved: bool, tmp_path: Path
) -> None:
    holder = _Holder(kind, place, saved)
    told = _said(tmp_path, {"holder": holder}, lambda: holder.next(), _sgd)
    assert bool(told) != saved, told
    assert saved or "older" in told[0]


class _Agent:
    """Its state has nothing of its meter, and loading gives that what the number of turns says."""

    def __init__(self) -> None:
        self.meter, self.turns = _Meter(), 0

    def next(self) -> float:
        self.turns += 1
        return self.meter.next()

    def state_dict(self) -> dict[str, Any]:
        return {"turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.turns = 0
        for _ in range(state["turns"]):
            self.next()


def test_what_loading_gives_its_state_is_not_told(tmp_path: Path) -> None:
    agent = _Agent()
    assert _said(tmp_path, {"agent": agent}, agent.next, _sgd) == []


class _Adapter:
    """Has the state of a part of a model that nobody has named, as of adapters of a large one."""

    def __init__(self, given: Callable[[], dict[str, torch.Tensor]]) -> None:
        self.state_dict = given

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


@pytest.mark.parametrize("all_of_it", [True, False])
def test_tensors_that_the_state_of_another_object_has_are_not_told(
    all_of_it: bool, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    memory = {"mean": torch.zeros(2)}

    def next_number() -> float:
        with torch.no_grad():
            model.bias += 0.5
            memory["mean"] = memory["mean"] + 0.5
            if not all_of_it:
                model.weight += 0.5
            return float(model(memory["mean"]).detach().sum())

    adapter = _Adapter(lambda: {"bias": model.bias.detach(), **memory})
    said = _said(tmp_path, {"adapter": adapter}, next_number, _sgd)
    assert bool(said) is not all_of_it
    assert not any("memory" in one for one in said)


class _Callbacks:
    """Has a state, and nests of functions that no state has."""

    def __init__(self, function: Callable[[], float]) -> None:
        self.on = {"step": [function]}

    def state_dict(self) -> dict[str, Any]:
        return {"version": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_what_functions_in_nests_of_a_named_object_use_is_told(tmp_path: Path) -> None:
    seen: list[int] = []

    def next_one() -> float:
        seen.append(1)
        return 1 / len(seen)

    callbacks = _Callbacks(next_one)
    told = _said(tmp_path, {"callbacks": callbacks}, lambda: callbacks.on["step"][0](), _sgd)
    assert len(told) == 1
    assert "its 'seen'" in told[0]


class _Slow(torch.optim.SGD):
    """Goes back to slow weights, which its state has, or has not."""

    def __init__(self, parameters: Any, saves: bool) -> None:
        super().__init__(parameters, 0.1)
        self.saves = saves

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            parameter.data.copy_(slow.lerp_(parameter.detach(), 0.5))
        return found

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self.saves else {**state, "state": {}}


@pytest.mark.parametrize("saves", [True, False])
def test_tensors_that_an_optimizer_leaves_out_are_told(saves: bool, tmp_path: Path) -> None:
    told = _said(tmp_path, {}, lambda: 1.0, lambda parameters: _Slow(parameters, saves))
    assert bool(told) != saves, told
    assert saves or "_Slow, its 'state'" in told[0]


class _Ledger:
    """Has many numbers in its state, and a count before or behind them, or none."""

    def __init__(self, keys: list[str]) -> None:
        self.numbers, self.turns, self.keys = [0.25 * one for one in range(6000)], 0, keys

    def next(self) -> float:
        self.turns += 1
        return self.numbers[self.turns] + self.turns

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.keys}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@pytest.mark.parametrize(
    "keys", [["turns", "numbers"], ["numbers", "turns"], ["numbers"]], ids=" ".join
)
def test_a_count_is_found_among_many_numbers(keys: list[str], tmp_path: Path) -> None:
    ledger = _Ledger(keys)
    told = _said(tmp_path, {"ledger": ledger}, ledger.next, _sgd)
    assert bool(told) == ("turns" not in keys), told


class _Patience:
    def __init__(self) -> None:
        self.margin, self.kind = 0, _Kind.LOSS
        self.bad, self.best = 0, float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad, self.best = state["bad"], state["best"]

    def next(self) -> float:
        self.bad += self.best >= self.margin
        self.best = min(self.best, 10.0 + self.kind.value)
        return self.bad / self.best


class _Kind(enum.Enum):
    LOSS = 0


def test_a_constant_that_the_state_no_longer_equals_has_not_changed(tmp_path: Path) -> None:
    patience = _Patience()
    assert not _said(tmp_path, {"patience": patience}, patience.next, _sgd)


class _Mean:
    """Has its mean in its state, and not the sum that it is worked out from."""

    def __init__(self) -> None:
        self.total = self.mean = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]

    def next(self) -> float:
        self.total += 0.5
        self.mean = self.total / 7
        return 1 + self.mean


def test_what_ends_in_an_attribute_that_a_state_has_is_told(tmp_path: Path) -> None:
    mean = _Mean()
    (said,) = _said(tmp_path, {"mean": mean}, mean.next, _sgd)
    assert "'object.total'" in said
    assert "mean'" not in said
