"""What a step or a handler draws from and nobody has named: found where their names lead.

A second loader, a `torch.Generator`, an iterator: each has a position of its own. Where a function
of the user's refers to one (by its closure, its globals, its object's attributes) and no checkpoint
holds it, a resumed run draws other values from it than the run that was saved, though the loop's
own batches are exact. That is said when the state is first taken.
"""

from __future__ import annotations

import inspect
import itertools
import random
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

from crosstrain.engine.dispatch import Dispatcher

__all__ = ["unnamed_sources"]

_SOURCES: Final[tuple[type, ...]] = (
    torch.Generator,
    random.Random,
    numpy.random.Generator,
    numpy.random.RandomState,
    types.GeneratorType,
    _BaseDataLoaderIter,
    itertools.chain,
    itertools.count,
    itertools.cycle,
    itertools.islice,
    enumerate,
    filter,
    map,
    zip,
    *(type(iter(example)) for example in ([], (), range(0), {}, set[int](), "")),
)
# They are part of every state.
_GLOBAL: Final = frozenset(
    map(
        id,
        (
            torch.default_generator,
            getattr(random.seed, "__self__", None),
            getattr(numpy.random.mtrand, "_rand", None),
        ),
    )
)
# What holds draws of its own, which other checks are for, or none.
_CLOSED: Final = (
    torch.nn.Module,
    Optimizer,
    DataLoader,
    Dataset,
    Sampler,
    Dispatcher,
    types.ModuleType,
    type,
)
# Objects of these packages are not looked into: what they keep is theirs.
_OTHERS: Final = frozenset(
    {"crosstrain", "ignite", "numpy", "rich", "tensorboard", "torch", "torchdata", "tqdm", "wandb"}
)
_DEPTH: Final = 6
_MANY: Final = 64
_SEEN: Final = 2000


def unnamed_sources(
    functions: Mapping[str, Any], known: Iterable[Any], beside: Iterable[Any]
) -> list[str]:
    """Returns what functions draw from, by where it was found, each once.

    Args:
        functions: the step and the handlers, by what to call them.
        known: objects that a state takes care of, such as the run's data; not looked into.
        beside: objects that are saved; what they hold, and what they are, is named.
    """
    walk = _Walk({id(thing) for thing in known})
    for thing in beside:
        walk.name(thing)
    for name, function in functions.items():
        walk.function(function, name, _DEPTH)
    return list(walk.found.values())


class _Walk:
    """Looks into functions and objects, each once."""

    def __init__(self, known: set[int]) -> None:
        self._seen = known
        self.found: dict[int, str] = {}

    def name(self, thing: Any) -> None:
        """Takes an object, and what it holds, for named."""
        self._seen.add(id(thing))
        for value in _attributes(thing).values():
            self._seen.add(id(value))

    def function(self, function: Any, name: str, depth: int) -> None:
        """Looks into what a function refers to: all of it, if it is the user's."""
        if isinstance(function, partial):
            made: partial[Any] = function
            for index, value in enumerate((*made.args, *made.keywords.values())):
                self.value(value, f"{name}, its argument {index}", depth - 1)
            function = made.func
        owner = getattr(function, "__self__", None)
        if owner is not None:
            self.value(owner, name, depth)
        plain = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(plain):
            if owner is None:
                self.attributes(plain, name, depth)
            return
        for value in (*(plain.__defaults__ or ()), *(plain.__kwdefaults__ or {}).values()):
            self.value(value, f"{name}, a default", depth - 1)
        for variable, value in _variables(plain):
            self.value(value, f"{name}, its {variable!r}", depth - 1)

    def value(self, value: Any, name: str, depth: int) -> None:
        """Looks at a value, and into it where it may hold more."""
        if id(value) in self._seen or id(value) in _GLOBAL or len(self._seen) > _SEEN:
            return
        if isinstance(value, _SOURCES):
            self._seen.add(id(value))
            if inspect.isgenerator(value) and value.gi_frame is None:
                return
            self.found[id(value)] = f"{name} (a {type(value).__name__})"
            return
        if depth <= 0 or isinstance(value, _CLOSED):
            return
        if type(value) in (dict, list, tuple, set):
            self._seen.add(id(value))
            items = value.items() if type(value) is dict else enumerate(value)
            for key, item in itertools.islice(items, _MANY):
                self.value(item, f"{name}[{key!r}]", depth - 1)
        elif callable(value) and (inspect.isroutine(value) or isinstance(value, partial)):
            self._seen.add(id(value))
            self.function(value, name, depth - 1)
        elif not _is_others(type(value)):
            self.attributes(value, name, depth)

    def attributes(self, value: Any, name: str, depth: int) -> None:
        """Looks into an object's attributes."""
        self._seen.add(id(value))
        for own, item in _attributes(value).items():
            self.value(item, f"{name}, .{own}", depth - 1)


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        # A named one, such as a step's options.
        made: Any = value
        return dict(zip(getattr(made, "_fields", ()), made, strict=False))
    try:
        return dict(vars(value))
    except TypeError:
        names = getattr(type(value), "__slots__", ())
        names = (names,) if isinstance(names, str) else names
        return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _is_others(kind: type) -> bool:
    root = kind.__module__.partition(".")[0]
    return root in _OTHERS or root in sys.stdlib_module_names


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the closure's variables and the globals that the function's code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # It is not set yet.
    for name in sorted(_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
