"""State that a run's functions keep beside what is saved: what it is, and where it is used.

Both are drawn independently: each kind is a function that gives a number by what it has kept of its
calls, and each place is where a run calls such a function. All kinds are one file, like the blocks
of `composition_parts`: a new one is drawn once it is listed.
"""

from __future__ import annotations

import argparse
import array
import collections
import configparser
import contextvars
import copy
import datetime
import enum
import functools
import heapq
import io
import itertools
import math
import mmap
import operator
import queue
import random
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import composition_file
import composition_parts as parts
import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from crosstrain.engine import Events

Draw = Callable[[], float]
KINDS: dict[str, tuple[Callable[[], Draw], tuple[str, ...]]] = {}


def _kind(*words: str) -> Callable[[Callable[[], Draw]], Callable[[], Draw]]:
    """Lists a kind, with the words of which a message has to have one."""

    def add(make: Callable[[], Draw]) -> Callable[[], Draw]:
        KINDS[make.__name__.strip("_").replace("_", " ")] = (make, words)
        return make

    return add


def _by(number: float) -> float:
    """Returns a factor of about one."""
    return 1 + (number * 0.618) % 1.0


# ------------------------------------------------------------------- numbers, by where they lie


@_kind("'kept'")
def _number_in_a_list() -> Draw:
    kept = [0]

    def draw() -> float:
        kept[0] += 1
        return _by(kept[0])

    return draw


@_kind("'kept'")
def _number_in_a_dict() -> Draw:
    kept = {"calls": 0}

    def draw() -> float:
        kept["calls"] = kept.get("calls", 0) + 1
        return _by(kept["calls"])

    return draw


@_kind("'kept'")
def _date_in_a_list() -> Draw:
    kept = [datetime.date(2026, 1, 1)]

    def draw() -> float:
        kept[0] += datetime.timedelta(days=1)
        return _by(kept[0].day)

    return draw


@_kind("'kept'")
def _file_in_memory() -> Draw:
    kept = io.BytesIO(bytes(range(250)))

    def draw() -> float:
        return _by(kept.read(1)[0])

    return draw


@_kind("'kept'")
def _file_that_is_read() -> Draw:
    with tempfile.NamedTemporaryFile(delete=False) as made:
        made.write(bytes(range(250)))
    kept = open(made.name, "rb")  # noqa: SIM115  it stays open while the run goes on

    def draw() -> float:
        return _by(kept.read(1)[0])

    return draw


@_kind("'kept'")
def _mapped_memory() -> Draw:
    kept = mmap.mmap(-1, 8)

    def draw() -> float:
        kept[0] += 1
        return _by(kept[0])

    return draw


@_kind("'kept'")
def _settings() -> Draw:
    kept = configparser.ConfigParser()
    kept["run"] = {"calls": "0"}

    def draw() -> float:
        kept["run"]["calls"] = str(int(kept["run"]["calls"]) + 1)
        return _by(int(kept["run"]["calls"]))

    return draw


@_kind("'kept'")
def _number_in_a_nest() -> Draw:
    kept: dict[str, Any] = {"inner": [{"calls": [0]}]}

    def draw() -> float:
        inner = kept["inner"][0]["calls"]
        inner[0] += 1
        return _by(inner[0])

    return draw


@_kind("'kept'")
def _nonlocal() -> Draw:
    kept = 0

    def draw() -> float:
        nonlocal kept
        kept += 1
        return _by(kept)

    return draw


_GLOBAL = 0


@_kind("'_GLOBAL'")
def _global() -> Draw:
    def draw() -> float:
        global _GLOBAL
        _GLOBAL += 1
        return _by(_GLOBAL)

    globals()["_GLOBAL"] = 0
    return draw


@_kind("'_GLOBAL'", "globals")
def _global_by_its_name() -> Draw:
    def draw() -> float:
        globals()["_GLOBAL"] += 1
        return _by(globals()["_GLOBAL"])

    globals()["_GLOBAL"] = 0
    return draw


@_kind("composition_file.CALLS")
def _variable_of_another_file() -> Draw:
    composition_file.CALLS = 0

    def draw() -> float:
        composition_file.CALLS += 1
        return _by(composition_file.CALLS)

    return draw


@_kind("'CALLS'")
def _function_of_another_file() -> Draw:
    composition_file.CALLS = 0
    return composition_file.draw


@_kind("'CALLS'")
def _function_of_another_file_by_its_file() -> Draw:
    composition_file.CALLS = 0
    return lambda: composition_file.draw()


@_kind("kept.calls")
def _namespace() -> Draw:
    kept = argparse.Namespace(calls=0)

    def draw() -> float:
        kept.calls += 1
        return _by(kept.calls)

    return draw


@_kind("kept.calls")
def _simple_namespace() -> Draw:
    kept = types.SimpleNamespace(calls=0)

    def draw() -> float:
        kept.calls += 1
        return _by(kept.calls)

    return draw


@_kind("'kept'")
def _default_argument() -> Draw:
    def draw(kept: list[int] = [0]) -> float:  # noqa: B006  that is the case
        kept[0] += 1
        return _by(kept[0])

    draw.__defaults__ = ([0],)
    return draw


@_kind("argument 0")
def _argument_of_a_partial() -> Draw:
    def draw(kept: list[int]) -> float:
        kept[0] += 1
        return _by(kept[0])

    return functools.partial(draw, [0])


@_kind("kept.calls", "draw.calls")
def _attribute_of_a_function() -> Draw:
    def draw() -> float:
        draw.calls += 1  # type: ignore[attr-defined]
        return _by(draw.calls)  # type: ignore[attr-defined]

    draw.calls = 0  # type: ignore[attr-defined]
    return draw


class Counted:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        return self.next()

    def next(self) -> float:
        """Returns the next number."""
        self.calls += 1
        return _by(self.calls)

    @staticmethod
    def high() -> float:
        """Returns one number."""
        return 1.3


@_kind(".calls")
def _attribute() -> Draw:
    return Counted()


@_kind(".calls")
def _bound_method() -> Draw:
    return Counted().next


@_kind(".calls")
def _object_in_a_closure() -> Draw:
    kept = Counted()
    return lambda: kept.next()


@_kind(".calls")
def _method_that_is_fetched_by_name() -> Draw:
    kept = Counted()
    return lambda: float(getattr(kept, "next")())  # noqa: B009  that is the case


@_kind(".calls", "'caller'")
def _method_that_another_calls() -> Draw:
    kept, caller = Counted(), operator.methodcaller("next")
    return lambda: float(caller(kept))


@_kind("calls", "kept")
def _attribute_by_its_name() -> Draw:
    kept = Counted()

    def draw() -> float:
        setattr(kept, "calls", getattr(kept, "calls") + 1)  # noqa: B009, B010  that is the case
        return _by(vars(kept)["calls"])

    return draw


@_kind(".calls")
def _attribute_of_a_parents_method() -> Draw:
    class Child(Counted):
        def __call__(self) -> float:
            return super().next() + 0.25

    return Child()


@_kind(".calls")
def _attribute_behind_two_objects() -> Draw:
    class Outer:
        def __init__(self) -> None:
            self.parts = {"one": Counted()}

        def __call__(self) -> float:
            return self._one().next()

        def _one(self) -> Counted:
            return self.parts["one"]

    return Outer()


@_kind(".calls")
def _slots() -> Draw:
    class Slotted:
        __slots__ = ("calls",)

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            self.calls += 1
            return _by(self.calls)

    return Slotted()


@dataclass
class _Record:
    calls: int = 0
    rates: list[float] = field(default_factory=lambda: [1.0])


@_kind(".calls", "kept")
def _dataclass() -> Draw:
    kept = _Record()

    def draw() -> float:
        kept.calls += 1
        return _by(kept.calls)

    return draw


@_kind("kept", ".rates")
def _list_of_a_dataclass() -> Draw:
    kept = _Record()

    def draw() -> float:
        kept.rates.append(0.75 * kept.rates[-1] + 0.3)
        return kept.rates[-1]

    return draw


@_kind(".calls")
def _class_attribute() -> Draw:
    class Counting:
        calls = 0

        def __call__(self) -> float:
            Counting.calls += 1
            return _by(self.calls)

    return Counting()


@_kind(".calls")
def _class_method() -> Draw:
    class Counting:
        calls = 0

        @classmethod
        def draw(cls) -> float:
            cls.calls += 1
            return _by(cls.calls)

    return Counting.draw


@_kind(".calls")
def _static_method() -> Draw:
    class Counting:
        calls = 0

        @staticmethod
        def draw() -> float:
            Counting.calls += 1
            return _by(Counting.calls)

    return Counting.draw


@_kind(".calls")
def _class_method_in_a_closure() -> Draw:
    class Counting:
        calls = 0

        @classmethod
        def draw(cls) -> float:
            cls.calls += 1
            return _by(cls.calls)

    return lambda: Counting.draw() + 0.1


@_kind(".calls", "._calls")
def _property() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self._calls = 0

        @property
        def value(self) -> float:
            self._calls += 1
            return _by(self._calls)

    kept = Counting()
    return lambda: kept.value


@_kind("calls")
def _decorator() -> Draw:
    def counted(function: Draw) -> Draw:
        calls = 0

        @functools.wraps(function)
        def wrapped() -> float:
            nonlocal calls
            calls += 1
            return function() * _by(calls)

        return wrapped

    @counted
    def draw() -> float:
        return 1.0

    return draw


@_kind(".calls")
def _decorator_that_is_a_class() -> Draw:
    class Counting:
        def __init__(self, function: Draw) -> None:
            functools.update_wrapper(self, function)
            self.function, self.calls = function, 0

        def __call__(self) -> float:
            self.calls += 1
            return self.function() * _by(self.calls)

    @Counting
    def draw() -> float:
        return 1.0

    return draw


@_kind("kept")
def _number_of_numpy() -> Draw:
    kept = np.int64(0)

    def draw() -> float:
        nonlocal kept
        kept = kept + 1
        return _by(int(kept))

    return draw


@_kind("kept")
def _function_that_is_exchanged() -> Draw:
    kept: Draw = lambda: 0.5  # noqa: E731  that is the case

    def draw() -> float:
        nonlocal kept
        found = kept()
        kept = Counted.high
        return found

    return draw


@_kind("kept")
def _functions_that_are_turned() -> Draw:
    kept: list[Draw] = [lambda: 0.5, Counted.high, lambda: 1.1, lambda: 0.8]

    def draw() -> float:
        kept.append(kept.pop(0))
        return kept[0]()

    return draw


def _drawn(kept: Any) -> float:
    kept.calls += 1
    return _by(kept.calls)


@_kind("kept")
def _record_that_another_function_is_given() -> Draw:
    kept = _Record()
    return lambda: _drawn(kept)


@_kind("kept")
def _namespace_that_another_function_is_given() -> Draw:
    kept = types.SimpleNamespace(calls=0)
    return lambda: _drawn(kept)


@_kind("calls", "kept")
def _context_variable() -> Draw:
    kept: contextvars.ContextVar[int] = contextvars.ContextVar("calls", default=0)
    kept.set(0)

    def draw() -> float:
        kept.set(kept.get() + 1)
        return _by(kept.get())

    return draw


@_kind("kept")
def _thread_local() -> Draw:
    kept = threading.local()
    kept.calls = 0

    def draw() -> float:
        kept.calls += 1
        return _by(kept.calls)

    return draw


@_kind("kept", ".calls")
def _weak_reference() -> Draw:
    counted = Counted()
    _ALIVE.append(counted)
    kept = weakref.ref(counted)

    def draw() -> float:
        found = kept()
        return found.next() if found is not None else 1.0

    return draw


_ALIVE: list[Any] = []


@_kind("kept")
def _weak_keys() -> Draw:
    key = Counted()
    kept: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary({key: 0})

    def draw() -> float:
        kept[key] += 1
        return _by(kept[key])

    return draw


@_kind("draw", "kept", "calls")
def _no_source() -> Draw:
    space: dict[str, Any] = {"_by": _by, "kept": [0]}
    exec("def draw():\n kept[0] += 1\n return _by(kept[0])\n", space)
    return space["draw"]  # type: ignore[no-any-return]


# --------------------------------------------------------------------------- other collections


@_kind("kept")
def _counter() -> Draw:
    kept: collections.Counter[str] = collections.Counter()

    def draw() -> float:
        kept["calls"] += 1
        return _by(kept["calls"])

    return draw


@_kind("kept")
def _default_dict() -> Draw:
    kept: collections.defaultdict[str, int] = collections.defaultdict(int)

    def draw() -> float:
        kept["calls"] += 1
        return _by(kept["calls"])

    return draw


@_kind("kept")
def _deque() -> Draw:
    kept: collections.deque[float] = collections.deque([1.0, 2.0, 3.0], 3)

    def draw() -> float:
        kept.append(0.5 + sum(kept) * 0.2)
        return kept[0] * 0.5

    return draw


@_kind("kept")
def _deque_that_turns() -> Draw:
    kept = collections.deque([0.5, 1.0, 1.5, 2.0, 2.5, 0.7, 0.9])

    def draw() -> float:
        kept.rotate(1)
        return kept[0]

    return draw


@_kind("kept")
def _list_that_is_popped() -> Draw:
    kept = [0.5 + 0.01 * number for number in range(400)]
    return lambda: kept.pop()


@_kind("kept")
def _length_of_a_list() -> Draw:
    kept: list[int] = []

    def draw() -> float:
        kept.append(1)
        return _by(len(kept))

    return draw


@_kind("kept")
def _set_of_what_was_seen() -> Draw:
    kept: set[int] = set()

    def draw() -> float:
        new = next(number for number in range(1000) if number not in kept)
        kept.add(new)
        return _by(new)

    return draw


@_kind("kept")
def _one_of_many_numbers() -> Draw:
    kept = [1.0] * 1000

    def draw() -> float:
        kept[777] = 0.9 * kept[777] + 0.2
        return kept[777]

    return draw


@_kind("kept")
def _one_of_many_in_an_array() -> Draw:
    kept = np.ones(20_000)

    def draw() -> float:
        kept[777] = 0.9 * kept[777] + 0.2
        return float(kept[777])

    return draw


@_kind("kept")
def _one_of_many_in_a_set() -> Draw:
    kept = set(range(6000))

    def draw() -> float:
        kept.remove(max(kept))
        kept.add(-len(kept) - max(kept))
        return _by(max(kept))

    return draw


def _counting() -> Draw:
    kept = [0]

    def draw() -> float:
        kept[0] += 1
        return _by(kept[0])

    return draw


@_kind("second", "kept")
def _second_of_two_closures() -> Draw:
    first, second = _counting(), _counting()
    first()
    return lambda: second() if first is not None else first()


@_kind("kept")
def _heap() -> Draw:
    kept = [1.0]

    def draw() -> float:
        least = heapq.heappop(kept)
        heapq.heappush(kept, least * 0.9 + 0.2)
        heapq.heappush(kept, least + 0.3)
        return 0.5 + least / 3

    return draw


@_kind("kept")
def _queue() -> Draw:
    kept: queue.Queue[float] = queue.Queue()
    kept.put(1.0)

    def draw() -> float:
        found = kept.get_nowait()
        kept.put(found * 0.8 + 0.3)
        return found

    return draw


@_kind("kept")
def _array() -> Draw:
    kept = array.array("d", [1.0])

    def draw() -> float:
        kept[0] = kept[0] * 0.8 + 0.3
        return kept[0]

    return draw


@_kind("kept")
def _bytes() -> Draw:
    kept = bytearray(1)

    def draw() -> float:
        kept[0] = (kept[0] + 1) % 256
        return _by(kept[0])

    return draw


@_kind("kept")
def _user_dict() -> Draw:
    class Registry(collections.UserDict[str, Any]):
        pass

    kept = Registry(calls=0)

    def draw() -> float:
        kept["calls"] += 1
        return _by(kept["calls"])

    return draw


@_kind("kept")
def _dict_of_a_class_of_ones_own() -> Draw:
    class Registry(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            return self[name]

    kept = Registry(calls=0)

    def draw() -> float:
        kept["calls"] = kept.calls + 1
        return _by(kept.calls)

    return draw


@_kind("cached", "calls", "kept")
def _cache() -> Draw:
    kept = [0]

    @functools.cache
    def cached(key: int) -> float:
        kept[0] += 1
        return _by(kept[0])

    return lambda: cached(1) + cached(kept[0] + 1)


@_kind("kept")
def _number_by_its_logarithm() -> Draw:
    kept = [1.0]

    def draw() -> float:
        kept[0] += 1
        return 0.5 + math.log(kept[0]) / 3

    return draw


@_kind("calls")
def _private_attribute() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self.__calls = 0

        def __call__(self) -> float:
            self.__calls += 1
            return _by(self.__calls)

    return Counting()


@_kind("calls")
def _dictionary_of_an_object() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            self.__dict__["calls"] += 1
            return _by(self.__dict__["calls"])

    return Counting()


@_kind("calls")
def _object_that_passes_itself_on() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            return _drawn(self)

    return Counting()


@_kind("calls")
def _object_that_passes_its_record_on() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self.record = _Record()

        def __call__(self) -> float:
            return self._rated(self.record)

        def _rated(self, record: _Record) -> float:
            record.calls += 1
            return _by(record.calls)

    return Counting()


@_kind("calls", "kept")
def _setter() -> Draw:
    class Counting:
        calls = 0

        @property
        def value(self) -> float:
            return _by(self.calls)

        @value.setter
        def value(self, value: float) -> None:
            self.calls += 1

    kept = Counting()

    def draw() -> float:
        kept.value = 1.0
        return kept.value

    return draw


@_kind("calls")
def _slots_of_a_parent() -> Draw:
    class Parent:
        __slots__ = ("calls",)

    class Child(Parent):
        __slots__ = ()

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            self.calls += 1
            return _by(self.calls)

    return Child()


@_kind("calls", "kept")
def _item_of_an_object() -> Draw:
    class Table:
        def __init__(self) -> None:
            self.calls = 0

        def __getitem__(self, index: int) -> float:
            self.calls += 1
            return _by(self.calls + index)

    kept = Table()
    return lambda: kept[0]


@_kind("calls", "kept")
def _descriptor() -> Draw:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def __get__(self, owner: Any, kind: Any) -> float:
            self.calls += 1
            return _by(self.calls)

    class Holder:
        value = Counting()

        def __call__(self) -> float:
            return self.value

    return Holder()


@_kind("calls", "kept")
def _context() -> Draw:
    class Entered:
        def __init__(self) -> None:
            self.calls = 0

        def __enter__(self) -> float:
            self.calls += 1
            return _by(self.calls)

        def __exit__(self, *_: Any) -> None:
            pass

    kept = Entered()

    def draw() -> float:
        with kept as found:
            return found

    return draw


@_kind("calls", "kept")
def _missing_item() -> Draw:
    class Numbers(dict[int, float]):
        calls = 0

        def __missing__(self, key: int) -> float:
            self.calls += 1
            return _by(self.calls)

    kept = Numbers()
    return lambda: kept[1]


@_kind("kept")
def _record_that_is_replaced() -> Draw:
    kept = _Fixed(0)

    def draw() -> float:
        nonlocal kept
        kept = replace(kept, calls=kept.calls + 1)
        return _by(kept.calls)

    return draw


@dataclass(frozen=True)
class _Fixed:
    calls: int


class _Phase(enum.Enum):
    COLD, WARM, HOT = range(3)


@_kind("kept")
def _member_of_an_enumeration() -> Draw:
    kept = _Phase.COLD

    def draw() -> float:
        nonlocal kept
        kept = {_Phase.COLD: _Phase.WARM, _Phase.WARM: _Phase.HOT, _Phase.HOT: _Phase.HOT}[kept]
        return 0.5 if kept is _Phase.HOT else 1.0

    return draw


@_kind("kept")
def _tuple_that_is_exchanged() -> Draw:
    kept = (0.5, 0.7)

    def draw() -> float:
        nonlocal kept
        kept = (kept[1], 0.5 + (kept[0] + kept[1]) % 1)
        return kept[0]

    return draw


@_kind("kept")
def _two_numbers_that_change_places() -> Draw:
    kept = [0.5, 1.3]

    def draw() -> float:
        kept[0], kept[1] = kept[1], kept[0] * 0.9 + 0.1
        return kept[0]

    return draw


@_kind("kept")
def _by_another_name() -> Draw:
    kept = [0]

    def draw() -> float:
        (number,) = other = kept
        other[0] = number + 1
        return _by(number)

    return draw


@_kind("kept")
def _ordered_dictionary() -> Draw:
    kept = collections.OrderedDict((number, 0.5 + number / 7) for number in range(7))

    def draw() -> float:
        first = next(iter(kept))
        kept.move_to_end(first)
        return kept[first]

    return draw


@_kind("kept")
def _sequence_of_sobol() -> Draw:
    kept = torch.quasirandom.SobolEngine(1)
    return lambda: 0.5 + float(kept.draw())


@_kind("kept")
def _large_tensor_by_its_data() -> Draw:
    kept = torch.ones(300_000)

    def draw() -> float:
        kept.data.mul_(0.9).add_(0.2)
        return float(kept[0])

    return draw


@_kind("kept")
def _memory() -> Draw:
    kept = memoryview(bytearray(1))

    def draw() -> float:
        kept[0] = (kept[0] + 1) % 256
        return _by(kept[0])

    return draw


@_kind("kept")
def _word() -> Draw:
    kept = ""

    def draw() -> float:
        nonlocal kept
        kept += "a"
        return _by(len(kept))

    return draw


@_kind("kept")
def _chain_of_mappings() -> Draw:
    kept = collections.ChainMap({}, {"calls": 0})

    def draw() -> float:
        kept["calls"] += 1
        return _by(kept["calls"])

    return draw


@_kind("kept", "numbers")
def _two_iterators_of_one() -> Draw:
    kept, _ = itertools.tee(itertools.count())
    return lambda: _by(next(kept))


@_kind("argument")
def _keyword_of_a_partial_of_a_partial() -> Draw:
    def draw(number: float, kept: list[int]) -> float:
        kept[0] += 1
        return _by(kept[0] + number)

    return functools.partial(functools.partial(draw, kept=[0]), 0.1)


@_kind("kept", "calls")
def _class_that_is_called() -> Draw:
    class Meta(type):
        calls = 0

        def __call__(cls) -> float:
            cls.calls += 1
            return _by(cls.calls)

    class Drawn(metaclass=Meta):
        pass

    return Drawn


@_kind("kept", "calls")
def _instances_that_are_counted() -> Draw:
    class Number:
        calls = 0

        def __init__(self) -> None:
            type(self).calls += 1
            self.value = _by(type(self).calls)

    return lambda: Number().value


# -------------------------------------------------------------------------- tensors and arrays


@_kind("kept")
def _moving_average() -> Draw:
    kept = torch.zeros(2)

    def draw() -> float:
        kept.mul_(0.9).add_(torch.ones(2), alpha=0.1)
        return 0.5 + float(kept.sum())

    return draw


@_kind("kept")
def _moving_average_of_numbers() -> Draw:
    kept = None

    def draw() -> float:
        nonlocal kept
        kept = 0.5 if kept is None else 0.9 * kept + 0.2
        return kept

    return draw


@_kind("kept")
def _moving_average_in_an_array() -> Draw:
    kept = np.zeros(2)

    def draw() -> float:
        kept[:] = 0.9 * kept + 0.1
        return 0.5 + float(kept.sum())

    return draw


@_kind("kept")
def _parameter() -> Draw:
    kept = nn.Parameter(torch.ones(()))

    def draw() -> float:
        with torch.no_grad():
            kept.mul_(0.9).add_(0.2)
        return float(kept)

    return draw


@_kind("kept")
def _module() -> Draw:
    kept = nn.BatchNorm1d(1)
    kept.momentum = 0.3

    def draw() -> float:
        with torch.random.fork_rng(devices=()):
            kept(torch.tensor([[1.0], [2.0]]))
        assert kept.running_mean is not None
        return 0.5 + float(kept.running_mean)

    return draw


@_kind("kept")
def _scheduler() -> Draw:
    other = torch.optim.SGD([torch.zeros((), requires_grad=True)], 1.0)
    kept = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)

    def draw() -> float:
        other.step()
        kept.step()
        return 0.5 + float(kept.get_last_lr()[0])

    return draw


@_kind("kept")
def _average_of_weights() -> Draw:
    other = nn.Linear(1, 1)
    kept = copy.deepcopy(other)
    nn.init.ones_(kept.weight)

    def draw() -> float:
        with torch.no_grad():
            kept.weight.mul_(0.9).add_(0.2)
        return float(kept.weight)

    return draw


# ----------------------------------------------------------------------------------- iterators


@_kind("kept")
def _iterator() -> Draw:
    kept = iter([0.5 + 0.01 * number for number in range(400)])
    return lambda: next(kept)


@_kind("kept")
def _cycle() -> Draw:
    kept = itertools.cycle([0.5, 0.7, 0.9, 1.1, 1.4, 1.7, 1.9])
    return lambda: next(kept)


@_kind("kept")
def _enumeration() -> Draw:
    kept = enumerate(itertools.repeat(1.0))
    return lambda: _by(next(kept)[0])


@_kind("kept")
def _generator_function() -> Draw:
    def numbers() -> Iterator[float]:
        number = 0
        while True:
            number += 1
            yield _by(number)

    kept = numbers()
    return lambda: next(kept)


@_kind("kept")
def _generator_that_is_sent_to() -> Draw:
    def smooth() -> Any:
        value = 0.5
        while True:
            value = 0.9 * value + 0.1 * (yield value)

    kept = smooth()
    next(kept)
    return lambda: float(kept.send(2.0))


@_kind("kept", "calls")
def _iterator_of_ones_own() -> Draw:
    class Numbers:
        def __init__(self) -> None:
            self.calls = 0

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> float:
            self.calls += 1
            return _by(self.calls)

    kept = Numbers()
    return lambda: next(kept)


@_kind("following")
def _bound_next() -> Draw:
    kept = itertools.count(1)
    following = kept.__next__
    return lambda: _by(following())


@_kind("kept")
def _mapped_iterator() -> Draw:
    kept = map(_by, itertools.count())
    return lambda: next(kept)


# ------------------------------------------------------------------------------------- sources


@_kind("kept")
def _generator_of_torch() -> Draw:
    kept = torch.Generator().manual_seed(1)
    return lambda: 0.5 + float(torch.rand((), generator=kept))


@_kind("kept")
def _generator_of_numpy() -> Draw:
    kept = np.random.default_rng(1)
    return lambda: 0.5 + float(kept.random())


@_kind("kept")
def _legacy_generator_of_numpy() -> Draw:
    kept = np.random.RandomState(1)
    return lambda: 0.5 + float(kept.rand())


@_kind("kept")
def _generator_of_python() -> Draw:
    kept = random.Random(1)
    return lambda: 0.5 + kept.random()


@_kind("draw", "random", "object")
def _bound_method_of_a_generator() -> Draw:
    return random.Random(1).random


@_kind("kept", "seeds")
def _seeds_that_are_spawned() -> Draw:
    kept = np.random.SeedSequence(1)
    return lambda: 0.5 + float(np.random.default_rng(kept.spawn(1)[0]).random())


@_kind("kept", "rng")
def _generator_in_an_object() -> Draw:
    class Noise:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(1)

        def __call__(self) -> float:
            return 0.5 + float(self.rng.random())

    kept = Noise()
    return lambda: kept()


# ----------------------------------------------------------------------------------- first times


@_kind("kept")
def _first_time() -> Draw:
    kept = True

    def draw() -> float:
        nonlocal kept
        if kept:
            kept = False
            return 1.5
        return 1.0

    return draw


@_kind("ready", "factor", "kept")
def _attribute_that_is_not_there_yet() -> Draw:
    class Lazy:
        def __call__(self) -> float:
            if not hasattr(self, "factor"):
                self.factor = 0.5
            self.factor = 0.9 * self.factor + 0.15
            return self.factor

    return Lazy()


@_kind("kept")
def _number_that_waits() -> Draw:
    kept = [0]

    def draw() -> float:
        kept[0] += 1
        return 1.0 if kept[0] < 6 else 0.5

    return draw


@_kind("wait", "kept", "calls")
def _number_that_ends_at_its_limit() -> Draw:
    class Warmup:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self) -> float:
            self.calls = min(self.calls + 1, 4)
            return 0.5 + self.calls / 8

    return Warmup()


# --------------------------------------------------------------------------- where it is used


class Scaled(nn.Module):
    """Multiplies by what it draws."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.draw()


class Nested(nn.Module):
    """Holds it among other things."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.config = {"factors": [draw]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for factor in self.config["factors"]:
            x = x * factor()
        return x


def function_with_a_gradient(draw: Draw) -> nn.Module:
    """Returns a module whose backward is one's own, and multiplies by what it draws."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * draw()

    class Applied(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = Function.apply(x)
            return found

    return Applied()


class Weighted(nn.Module):
    """A loss that draws its weight."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.binary_cross_entropy_with_logits(found, wanted)
        return loss * self.draw()


def weighted(draw: Draw) -> Any:
    """Returns a loss function that draws its weight."""

    def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(found, wanted) * draw()

    return loss


def _rate(made: Any, draw: Draw) -> None:
    for group in made.optimizer.param_groups:
        group["lr"] = 0.02 * draw()


def _in_a_handler(made: Any, draw: Draw) -> None:
    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: _rate(made, draw))


def _as_an_argument(made: Any, draw: Draw) -> None:
    def handle(engine: Any, function: Draw) -> None:
        _rate(made, function)

    made.trainer.add_event_handler(Events.ITERATION_STARTED, handle, draw)


def _in_a_filter(made: Any, draw: Draw) -> None:
    def chosen(engine: Any, event: int) -> bool:
        return draw() > 1.4

    def handle() -> None:
        made.model.last.bias.data.mul_(0.9)

    event: Any = Events.ITERATION_COMPLETED
    made.trainer.add_event_handler(event(event_filter=chosen), handle)


def _in_a_forward(made: Any, draw: Draw) -> None:
    made.model.tail = Scaled(draw)


def _in_a_nest_of_a_module(made: Any, draw: Draw) -> None:
    made.model.tail = Nested(draw)


def _in_afunction_with_a_gradient(made: Any, draw: Draw) -> None:
    made.model.tail = function_with_a_gradient(draw)


def _in_a_forward_set_on_a_module(made: Any, draw: Draw) -> None:
    forward = made.model.tail.forward
    made.model.tail.forward = lambda x: forward(x) * draw()


def _in_a_forward_hook(made: Any, draw: Draw) -> None:
    made.model.tail.register_forward_hook(lambda module, given, found: found * draw())


def _in_a_forward_pre_hook(made: Any, draw: Draw) -> None:
    made.model.tail.register_forward_pre_hook(lambda module, given: (given[0] * draw(),))


def _in_a_backward_hook(made: Any, draw: Draw) -> None:
    def scale(module: Any, given: Any, found: Any) -> Any:
        return tuple(one if one is None else one * draw() for one in given)

    made.model.last.register_full_backward_hook(scale)


def _in_a_backward_pre_hook(made: Any, draw: Draw) -> None:
    made.model.last.register_full_backward_pre_hook(
        lambda module, found: tuple(one * draw() for one in found)
    )


def _in_a_hook_of_a_parameter(made: Any, draw: Draw) -> None:
    made.model.last.weight.register_hook(lambda gradient: gradient * draw())


def _in_a_hook_after_a_gradient(made: Any, draw: Draw) -> None:
    def scale(parameter: Any) -> None:
        parameter.grad.mul_(draw())

    made.model.last.weight.register_post_accumulate_grad_hook(scale)


def _in_a_hook_of_the_output(made: Any, draw: Draw) -> None:
    def add(module: Any, given: Any, found: torch.Tensor) -> None:
        if found.requires_grad:
            found.register_hook(lambda gradient: gradient * draw())

    made.model.last.register_forward_hook(add)


def _in_a_hook_before_a_step(made: Any, draw: Draw) -> None:
    made.optimizer.register_step_pre_hook(lambda *_: _rate(made, draw))


def _in_a_hook_after_a_step(made: Any, draw: Draw) -> None:
    def shrink(*_: Any) -> None:
        made.model.last.bias.data.mul_(0.5 + draw() / 4)

    made.optimizer.register_step_post_hook(shrink)


def _in_an_optimizers_step(made: Any, draw: Draw) -> None:
    class Drawing(type(made.optimizer)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = 0.02 * self.draw()
            return super().step(closure)

    made.optimizer.__class__ = Drawing
    made.optimizer.draw = draw


def _in_a_step_set_on_an_optimizer(made: Any, draw: Draw) -> None:
    step = made.optimizer.step

    def stepped(self: Any, closure: Any = None) -> Any:
        _rate(made, draw)
        return step(closure)

    made.optimizer.step = types.MethodType(stepped, made.optimizer)


def _in_a_lambda_of_a_scheduler(made: Any, draw: Draw) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda _: draw())
    made.to_save["factors"] = scheduler
    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())


def _in_a_parametrization(made: Any, draw: Draw) -> None:
    nn.utils.parametrize.register_parametrization(made.model.first, "bias", Scaled(draw))


def _in_a_hook_of_all_modules(made: Any, draw: Draw) -> None:
    def scale(module: Any, given: Any, found: Any) -> Any:
        return found * draw() if module is made.model.tail else None

    made.undo.append(nn.modules.module.register_module_forward_hook(scale).remove)


def _in_a_hook_of_all_optimizers(made: Any, draw: Draw) -> None:
    def pace(optimizer: Any, *_: Any) -> None:
        # What draws may have an optimizer of its own.
        if optimizer is made.optimizer:
            _rate(made, draw)

    hook = register_optimizer_step_pre_hook(pace)
    made.undo.append(hook.remove)


def _in_the_collator(made: Any, draw: Draw) -> None:
    collate = made.data.collate_fn

    def collated(samples: list[Any]) -> Any:
        x, y = collate(samples)
        return x * draw(), y

    made.data.collate_fn = collated


def _in_the_dataset(made: Any, draw: Draw) -> None:
    made.dataset.draw = lambda: 0.1 * draw()


def _in_a_list_of_the_model(made: Any, draw: Draw) -> None:
    made.model.draws = [draw]
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: _rate(made, made.model.draws[0])
    )


def _in_an_attribute_of_the_optimizer(made: Any, draw: Draw) -> None:
    optimizer = made.optimizer
    optimizer.draws = {"rate": draw}
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: _rate(made, optimizer.draws["rate"])
    )


def _in_an_attribute_of_the_trainer(made: Any, draw: Draw) -> None:
    made.trainer.draw = draw
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: _rate(made, engine.draw)
    )


def _in_an_attribute_of_the_state(made: Any, draw: Draw) -> None:
    made.trainer.state.draw = draw
    made.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: _rate(made, engine.state.draw)
    )


def _in_a_method_of_an_app(made: Any, draw: Draw) -> None:
    class App:
        def __init__(self) -> None:
            self.made, self.parts = made, {"rate": draw}

        def on_iteration(self, engine: Any) -> None:
            self._set(self.parts["rate"]())

        def _set(self, factor: float) -> None:
            for group in self.made.optimizer.param_groups:
                group["lr"] = 0.02 * factor

    made.trainer.add_event_handler(Events.ITERATION_COMPLETED, App().on_iteration)


PLACES: dict[str, tuple[Callable[[Any, Draw], None], tuple[str, ...]]] = {
    "a handler": (_in_a_handler, ("_in_a_handler",)),
    "an argument": (_as_an_argument, ("handle",)),
    "a filter": (_in_a_filter, ("a filter of",)),
    "a forward": (_in_a_forward, ("the forward of model.tail",)),
    "a nest of a module": (_in_a_nest_of_a_module, ("the forward of model.tail",)),
    "a function with a gradient": (
        _in_afunction_with_a_gradient,
        ("the forward of model.tail",),
    ),
    "a forward set on a module": (_in_a_forward_set_on_a_module, ("the forward of model.tail",)),
    "a forward hook": (_in_a_forward_hook, ("a forward hook of model.tail",)),
    "a forward pre-hook": (_in_a_forward_pre_hook, ("a forward pre-hook of model.tail",)),
    "a backward hook": (_in_a_backward_hook, ("a backward hook of model.last",)),
    "a backward pre-hook": (_in_a_backward_pre_hook, ("a backward pre-hook of model.last",)),
    "a hook of a parameter": (_in_a_hook_of_a_parameter, ("a hook of model.last.weight",)),
    "a hook after a gradient": (
        _in_a_hook_after_a_gradient,
        ("a hook after its gradient of model.last.weight",),
    ),
    "a hook of the output": (_in_a_hook_of_the_output, ("a forward hook of model.last",)),
    "a hook before a step": (_in_a_hook_before_a_step, ("a step pre-hook of optimizer",)),
    "a hook after a step": (_in_a_hook_after_a_step, ("a step post-hook of optimizer",)),
    "an optimizer's step": (_in_an_optimizers_step, ("the step of optimizer", "of Drawing")),
    "a step set on an optimizer": (
        _in_a_step_set_on_an_optimizer,
        # A named function goes by the class that holds it: SGD, AdamW, Langevin.
        ("the step of",),
    ),
    "a lambda of a scheduler": (_in_a_lambda_of_a_scheduler, ("lr_lambdas",)),
    "a parametrization": (_in_a_parametrization, ("the forward of model.first.parametriz",)),
    "a hook of all modules": (_in_a_hook_of_all_modules, ("a forward hook of all modules",)),
    "a hook of all optimizers": (
        _in_a_hook_of_all_optimizers,
        ("a step pre-hook of all optimizers",),
    ),
    "the collator": (_in_the_collator, ("collate_fn",)),
    "the dataset": (_in_the_dataset, ("dataset",)),
    "a list of the model": (_in_a_list_of_the_model, ("draws",)),
    "an attribute of the optimizer": (_in_an_attribute_of_the_optimizer, ("draws",)),
    "an attribute of the trainer": (_in_an_attribute_of_the_trainer, ("draw",)),
    "an attribute of the state": (_in_an_attribute_of_the_state, ("draw",)),
    "a method of an app": (_in_a_method_of_an_app, ("on_iteration",)),
    # These are built into the step.
    "the loss": (lambda made, draw: None, ("loss", "the step")),
    "a loss module": (lambda made, draw: None, ("loss", "the step")),
    "the step": (lambda made, draw: None, ("the step",)),
}


def places_of(composition: Any) -> tuple[str, ...]:
    """Returns the places that a composition has."""
    mapped = composition.dataset in (*parts.MAPPED, *parts.ITERABLE)
    lacks = set() if mapped else {"the collator", "the dataset"}
    if composition.draws[1] != "nothing":
        lacks.add("the dataset")
    return tuple(place for place in PLACES if place not in lacks)


def loss_by(draws: Mapping[str, Draw]) -> Any:
    """Returns the loss of a composition, by its places."""
    if "the loss" in draws:
        return weighted(draws["the loss"])
    if "a loss module" in draws:
        return Weighted(draws["a loss module"])
    return nn.functional.binary_cross_entropy_with_logits


def prepare_by(draw: Draw, inner: Any) -> Any:
    """Returns a `prepare_batch` that scales what another one gives."""

    def prepared(batch: Any, **more: Any) -> Any:
        x, y = batch if inner is None else inner(batch, **more)
        return x * draw(), y

    return prepared
