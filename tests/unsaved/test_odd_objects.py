"""Whatever a step, a handler or a model refers to: looking at it never ends a run.

Objects may raise whatever they are asked, answer every name, hold themselves, or be no longer
there. What cannot be looked at is told, and the rest is looked at all the same.
"""

from __future__ import annotations

import collections
import contextvars
import decimal
import functools
import random
import re
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader, Dataset, default_collate

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
    ResumeWarning,
    create_supervised_evaluator,
    create_supervised_trainer,
)

Thing = Callable[[], Any]


def fails(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("do not ask")


def odd(**names: Any) -> Any:
    """An object of a class of the user's with these names in it."""
    return type("Odd", (), {"__module__": "users_file", **names})()


def holds_itself() -> Any:
    thing = odd()
    thing.itself, thing.listed = thing, [thing]
    return thing


def deep(wrap: Callable[[Any], Any], depth: int) -> Any:
    thing: Any = None
    for _ in range(depth):
        thing = wrap(thing)
    return thing


def holding(inner: Any) -> Any:
    thing = odd()
    thing.inner = inner
    return thing


def list_in_itself() -> list[Any]:
    thing: list[Any] = []
    thing.append(thing)
    return thing


def gone() -> Any:
    thing = odd()
    return weakref.proxy(thing)


def released() -> memoryview:
    view = memoryview(b"abc")
    view.release()
    return view


def module_with_getattr() -> types.ModuleType:
    module = types.ModuleType("own")
    module.__getattr__ = fails  # type: ignore[method-assign]
    return module


def function_of_text() -> Any:
    names: dict[str, Any] = {}
    exec("def made(*_):\n    global count\n    count = 1\n    return count", names)
    return names["made"]


def wraps_itself() -> Any:
    def function(*_: Any) -> None: ...

    function.__wrapped__ = function  # type: ignore[attr-defined]
    return function


def array_of_objects() -> Any:
    array = numpy.empty(2, dtype=object)
    array[0], array[1] = array, odd(__eq__=fails, __hash__=None)
    return array


class Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("do not ask")


class Module(nn.Module):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Meta(type):
    def __instancecheck__(cls, instance: object) -> NoReturn:
        raise RuntimeError("do not ask")

    def __getattribute__(cls, name: str) -> Any:
        return fails() if name == "__mro__" else super().__getattribute__(name)


class Wrapper(torch.Tensor):
    """A tensor of no memory, which carries out no operation."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("do not ask")


def emptied() -> torch.Tensor:
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


KINDS: dict[str, Thing] = {
    "raises a KeyError for a name": lambda: odd(__getattr__=lambda _, name: {}[name]),
    "raises for a name": lambda: odd(__getattr__=fails),
    "raises for any name": lambda: odd(__getattribute__=fails),
    "answers every name": lambda: odd(__getattr__=lambda one, _: one, __call__=lambda *_: None),
    "a mock": mock.MagicMock,
    "a mock of a module": lambda: mock.Mock(spec=nn.Linear(2, 2)),
    "a mock of a tensor": lambda: mock.Mock(spec=torch.Tensor),
    "raises when compared": lambda: odd(__eq__=fails, __hash__=lambda _: 1),
    "is compared to an array": lambda: odd(__eq__=lambda *_: numpy.zeros(3), __hash__=None),
    "has no length": lambda: odd(__len__=fails),
    "no end": lambda: odd(__iter__=lambda _: iter(int, 1)),
    "a long sequence": lambda: odd(__len__=lambda _: 10**12, __getitem__=lambda one, _: one),
    "neither true nor false": lambda: odd(__bool__=fails),
    "no hash": lambda: odd(__hash__=fails),
    "says it is a dict": lambda: odd(__class__=property(lambda _: dict)),
    "does not say what it is": lambda: odd(__class__=property(fails)),
    "keeps its attributes": lambda: odd(__dict__=property(fails)),
    "a number of attributes": lambda: odd(__dict__=property(lambda _: 3)),
    "slots": lambda: odd(__slots__=("a", "b")),
    "cannot be copied": lambda: odd(__reduce_ex__=fails, __deepcopy__=fails, __copy__=fails),
    "cannot be written": lambda: odd(__repr__=fails, __str__=fails),
    "properties raise": lambda: odd(loss=property(fails), state=property(fails)),
    "of no module": lambda: odd(__module__=None),
    "of module 3": lambda: odd(__module__=3),
    "a state that raises": lambda: odd(state_dict=fails, load_state_dict=fails),
    "a state with arguments": lambda: odd(state_dict=lambda _, a, b: {}, load_state_dict=fails),
    "a state that is a number": lambda: odd(state_dict=lambda _: 3, load_state_dict=fails),
    "holds itself": holds_itself,
    "a list in itself": list_in_itself,
    "deep lists": lambda: deep(lambda one: [one], 5000),
    "deep objects": lambda: deep(holding, 5000),
    "deep partials": lambda: deep(lambda one: functools.partial(print, one), 300),
    "deep closures": lambda: deep(lambda one: lambda *_: one and one(), 3000),
    "default of a dict raises": lambda: collections.defaultdict(fails, a=1),
    "mixed keys": lambda: {1: 1, "a": 2, None: 3, (1, 2): 4, float("nan"): 5, b"x": 6},
    "a mixed set": lambda: {1, "a", None, (1, 2), frozenset([3])},
    "a lock": threading.Lock,
    "a thread": lambda: threading.Thread(target=print),
    "of a thread": threading.local,
    "an object that is gone": gone,
    "released memory": released,
    "a module of Python": module_with_getattr,
    "a pattern": lambda: re.compile("a"),
    "a context's": lambda: contextvars.ContextVar("x"),
    "a record": lambda: numpy.zeros(3, dtype=[("a", "f4"), ("b", "O")]),
    "a masked array": lambda: numpy.ma.masked_array([1, 2], [True, False]),
    "an array of objects": array_of_objects,
    "days": lambda: numpy.array(["2020-01-01"], dtype="M8[D]"),
    "backwards": lambda: numpy.arange(6)[::-2],
    "sparse": lambda: torch.eye(3).to_sparse(),
    "of no data": lambda: torch.zeros(3, device="meta"),
    "fake": fake,
    "a wrapper": Wrapper,
    "emptied": emptied,
    "refuses all functions": lambda: torch.zeros(3).as_subclass(Refuses),
    "of a graph": lambda: nn.Linear(2, 2)(torch.zeros(1, 2)),
    "expanded": lambda: torch.zeros(1).expand(10),
    "conjugated": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
    "eight bits": lambda: torch.zeros(4, dtype=torch.float8_e4m3fn),
    "of lazy parameters": lambda: nn.LazyLinear(3),
    "a module that raises": Module,
    "a very large number": lambda: 10**5000,
    "no number": lambda: decimal.Decimal("sNaN"),
    "half a character": lambda: "\ud800",
    "a function of text": function_of_text,
    "wraps itself": wraps_itself,
    "kept results": lambda: functools.lru_cache(lambda *_: 1),
    "the class of functions": lambda: types.FunctionType,
    "a class that raises": lambda: Meta("Odd", (), {"__module__": "users_file"})(),
    "many": lambda: [holding(number) for number in range(5000)],
    "an int of the user's": lambda: type("I", (int,), {"__eq__": fails, "__hash__": None})(3),
    "a list that raises": lambda: type("L", (list,), {"__iter__": fails})([1]),
    "a dict that raises": lambda: type("D", (dict,), {"items": fails, "__iter__": fails})(a=1),
}


class Data(Dataset[Any]):
    thing: Any

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), float(index)), index % 2


class Net(nn.Linear):
    thing: Any = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  the name torch gives it
        use(self.thing)
        return super().forward(input)


class Keeper:
    def __init__(self, thing: Any) -> None:
        self.calls, self.thing = 0, thing

    def __call__(self) -> None:
        self.calls += 1
        use(self.thing)


def use(thing: Any) -> None:
    """Looks at nothing."""


PLACES = [
    "model",
    "model, later",
    "dataset",
    "dataset, later",
    "optimizer",
    "collation",
    "loss",
    "handler",
    "dict",
    "list",
    "trainer",
    "state",
    "metrics",
    "evaluator",
    "object",
    "argument",
]


def train(thing: Any, place: str, states: list[Any]) -> None:
    """Trains two epochs of two iterations, from the last of some states on, and adds to them."""
    torch.manual_seed(1)
    model, data, kept, listed = Net(4, 2), Data(), {"thing": thing}, list[Any]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    if place == "model":
        vars(model)["thing"] = thing
    if place == "dataset":
        data.thing = thing
    if place == "optimizer":
        vars(optimizer)["thing"] = thing

    def collate(samples: list[Any]) -> Any:
        if place == "collation":
            use(thing)
        return default_collate(samples)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if place == "loss":
            use(thing)
        return nn.functional.cross_entropy(prediction, target)

    def step(engine: Any, batch: Any) -> None:
        use(thing)

    checks = Checks(structure="warn")
    trainer: Any = DeterministicEngine(step, checks=checks)
    if place != "step":
        trainer = create_supervised_trainer(
            model, optimizer, loss, deterministic=True, checks=checks
        )
    evaluator: Any = create_supervised_evaluator(model)

    def handle(engine: Any, passed: Any = None) -> None:
        use(passed)
        if place == "handler":
            use(thing)
        elif place == "dict":
            use(kept["thing"])
            kept["count"] = kept.get("count", 0) + 1
        elif place == "list":
            listed.append(thing)
            use(listed[-1])
        elif place == "trainer":
            engine.thing = thing
            use(engine.thing)
        elif place == "state":
            engine.state.thing = thing
            use(engine.state.thing)
        elif place == "metrics":
            engine.state.metrics["thing"] = thing
        elif place == "evaluator":
            evaluator.state.thing = thing
            evaluator.run([(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])
            use(evaluator.state.thing)
        elif place == "model, later":
            vars(model)["thing"] = thing  # torch asks what it is given in the usual way
        elif place == "dataset, later":
            data.thing = thing

    passed = (thing,) if place == "argument" else ()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handle, *passed)
    if place == "object":
        trainer.add_event_handler(Events.ITERATION_COMPLETED, Keeper(thing))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: states.append(engine.state_dict())
    )
    if states:
        trainer.load_state_dict(states[-1])
    trainer.run(DataLoader(data, 4, shuffle=True, collate_fn=collate), max_epochs=2)


@pytest.mark.filterwarnings("ignore::crosstrain.engine.ResumeWarning")
@pytest.mark.filterwarnings("ignore:The .* prototype:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_no_look_at_an_object_ends_a_run(kind: str) -> None:
    for place in ("step", *random.Random(kind).sample(PLACES, 2)):
        states: list[Any] = []
        train(KINDS[kind](), place, states)
        states = states[:1]
        train(KINDS[kind](), place, states)


def test_what_cannot_be_looked_at_is_told_and_the_rest_is_looked_at() -> None:
    thing, count = odd(__class__=property(fails)), [0]
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, deterministic=True
    )

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        use(thing)
        count[0] += 1
        optimizer.param_groups[0]["lr"] = 0.1 / count[0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state_dict())
        trainer.run(DataLoader(Data(), 4), max_epochs=1)
    told = "\n".join(str(one.message) for one in caught)
    assert re.search(r"decay.* its 'thing' \(RuntimeError: do not ask\) cannot be told", told)
    assert re.search(r"without what has changed of .*decay.* its 'count'", told)
