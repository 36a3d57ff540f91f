"""Generators, iterators and loaders that a step or a handler draws from and nobody has named.

A second loader, a `torch.Generator`, an iterator: each has a position of its own. Where a function
of the user's refers to one (by its closure, its globals, its object's attributes) and no checkpoint
holds it, a resumed run draws other values from it than the run that was saved, though the loop's
own batches are exact. That is said when the state is first taken.
"""

from __future__ import annotations

import inspect
import io
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from typing import Any, Final

import numpy
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.data.generators import GENERATORS, GLOBAL_GENERATORS, generators_in
from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import OTHER_PACKAGES, is_others, is_users_object

from .users_functions import functions_of_trained

#: What a checkpoint has by torch's own state of it, and nothing else.
TRAINED: Final = (torch.nn.Module, Optimizer)
#: The attributes that torch gives each of them.
TORCHS_OWN: Final = frozenset({*vars(torch.nn.Module()), "defaults", "param_groups", "state"})
# Iterators are sources, too: see `is_source`.
_SOURCES: Final = (
    *GENERATORS,
    numpy.random.BitGenerator,
    torch.quasirandom.SobolEngine,
    ResumableSource,
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
_DEPTH: Final = 6
_MANY: Final = 64
_SEEN: Final = 2000
_LAYERS: Final = 16
_NOTHING: Final[Mapping[str, Any]] = {}


# What a function uses of what others hold, and what to call it.
_Held = Callable[[types.FunctionType], Iterable[tuple[str, Any]]]


def unnamed_sources(
    functions: Mapping[str, Any], known: Iterable[int], held: _Held | None = None
) -> list[str]:
    """Returns what functions draw from, by where it was found, each once.

    Args:
        functions: the step and the handlers, by what to call them.
        known: what a checkpoint takes care of, by `id`; it is not looked into.
        held: what a function may fetch from an engine, a model and the like.
    """
    walk = _Walk(set(known))
    for name, function in functions.items():
        walk.function(function, name, _DEPTH)
    # The list grows meanwhile.
    for plain in walk.functions:
        for name, value in () if held is None else held(plain):
            walk.value(value, name, _DEPTH)
    return list(walk.found.values())


class _Walk:
    """Looks into functions and objects, each once."""

    def __init__(self, known: set[int]) -> None:
        self._seen = known
        self.found: dict[int, str] = {}
        self.functions: list[types.FunctionType] = []

    def function(self, function: Any, name: str, depth: int) -> None:
        """Looks into what a function refers to: all of it, if it is the user's."""
        if isinstance(function, partial):
            made: partial[Any] = function
            for index, value in enumerate((*made.args, *made.keywords.values())):
                self.value(value, f"{name}, its argument {index}", depth - 1)
            function = made.func
        owner = getattr(function, "__self__", None)
        if isinstance(owner, TRAINED):
            # It may be known: what it holds beside its state is not.
            for own, item in attributes_of(owner).items():
                if own not in TORCHS_OWN:
                    self.value(item, f"{name}, .{own}", depth - 1)
        elif owner is not None:
            self.value(owner, name, depth)
        plain = getattr(function, "__func__", function)
        if not inspect.isfunction(plain):
            if owner is None and type(plain).__module__.startswith("crosstrain."):
                # A step of ours, with the user's functions in it.
                for own, value in functions_in(plain):
                    self.function(value, f"{name}, its {own}", depth - 1)
            elif owner is None:
                self.value(plain, name, depth)
        for plain in layers_of(function):
            self._variables(plain, name, depth)

    def _variables(self, plain: types.FunctionType, name: str, depth: int) -> None:
        if is_others(plain):
            return
        self.functions.append(plain)
        for value in (*(plain.__defaults__ or ()), *(plain.__kwdefaults__ or {}).values()):
            self.value(value, f"{name}, a default", depth - 1)
        for variable, value in variables_of(plain):
            self.value(value, f"{name}, its {variable!r}", depth - 1)
            if is_users_file(value):
                # Of a file of the user's, what the function names.
                for own in _names(plain.__code__) & vars(value).keys():
                    self.value(vars(value)[own], f"{name}, its {variable}.{own}", depth - 1)

    def value(self, value: Any, name: str, depth: int) -> None:
        """Looks at a value, and into it where it may hold more."""
        if id(value) in self._seen or id(value) in GLOBAL_GENERATORS or len(self._seen) > _SEEN:
            return
        if is_source(value):
            self._seen.add(id(value))
            if inspect.isgenerator(value) and value.gi_frame is None:
                return
            self.found[id(value)] = f"{name} (a {type(value).__name__})"
            return
        if depth > 0 and isinstance(value, DataLoader):
            self._seen.add(id(value))
            for own, generator in _generators_of(value):
                self.value(generator, f"{name}, {own}", depth - 1)
            return
        if depth > 0 and isinstance(value, type):
            self._seen.add(id(value))
            for own, function in methods_in(value).items():
                self.function(function, f"{name}.{own}", depth - 1)
            return
        if depth > 0 and isinstance(value, torch.nn.Module):
            self._seen.add(id(value))
            for own, function in functions_of_trained({name: value}).items():
                self.function(function, own, depth - 1)
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
        elif not is_others(type(value)):
            self._seen.add(id(value))
            for own, item in attributes_of(value).items():
                self.value(item, f"{name}, .{own}", depth - 1)


def _generators_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yields the generators that the order of a loader's samples is drawn from."""
    yield "its generator", loader.generator
    for name in ("sampler", "batch_sampler"):
        for where, generator in generators_in(getattr(loader, name, None), name).items():
            yield f"its {where}", generator


def functions_of(data: Any) -> dict[str, Any]:
    """Returns the functions of the user's that data is fetched with, by what to call them."""
    found: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        loader: Any = data
        for name in ("collate_fn", "worker_init_fn"):
            if inspect.isroutine(function := getattr(loader, name, None)):
                found[f"the {name}"] = function
        # One that is a DataLoader by name only, and wraps another, may have none of them.
        names = ("dataset", "collate_fn", "sampler", "batch_sampler")
        owners = {name: getattr(loader, name, None) for name in names}
        if is_users_object(loader):
            found["the loader's __iter__"] = loader.__iter__
    else:
        owners = {"data": data}
    for name, owner in owners.items():
        if not is_users_object(owner):
            continue
        for method in ("__getitem__", "__getitems__", "__iter__", "__call__"):
            function = getattr(type(owner), method, None)
            if inspect.isfunction(function):
                found[f"the {name}'s {method}"] = function
        for own, value in vars(owner).items():
            if inspect.isfunction(value) or isinstance(value, partial):
                found[f"the {name}'s .{own}"] = value
    return found


def functions_in(step: Any) -> Iterator[tuple[str, Any]]:
    """Yields the functions among the attributes of a step of ours, and among its options."""
    for name, value in attributes_of(step).items():
        if inspect.isroutine(value) or isinstance(value, (partial, torch.nn.Module)):
            yield name, value
        elif is_dataclass(value) and not isinstance(value, type):
            for item in fields(value):
                option = getattr(value, item.name)
                if inspect.isroutine(option) or isinstance(option, partial):
                    yield item.name, option


def attributes_of(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object, by name."""
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def is_users_file(value: Any) -> bool:
    """Tells whether a value is a module of Python's that the user wrote: a file, not installed."""
    if not isinstance(value, types.ModuleType):
        return False
    # A notebook has no file.
    place = "" if value.__name__ == "__main__" else getattr(value, "__file__", None)
    if place is None or "site-packages" in place:
        return False
    root = value.__name__.partition(".")[0]
    return root not in OTHER_PACKAGES and root not in sys.stdlib_module_names


def layers_of(function: Any) -> list[types.FunctionType]:
    """Returns what a function is in Python: itself, and the functions that it wraps."""
    found: list[types.FunctionType] = []
    while function is not None and len(found) < _LAYERS:
        if isinstance(function, property):
            found += layers_of(function.fset)
            function = function.fget
        elif isinstance(function, cached_property):
            function = function.func
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            found.append(function)
        function = getattr(function, "__dict__", _NOTHING).get("__wrapped__")
    return found


def methods_in(kind: type) -> dict[str, Any]:
    """Returns what a class of the user's own files, and those it derives from, can be asked to do.

    By name; a property is what it calls.
    """
    return {
        name: layers_of(one)[0]
        for each in reversed(kind.__mro__)
        if is_users_file(sys.modules.get(each.__module__))
        for name, one in vars(each).items()
        if layers_of(one)
    }


def is_source(value: Any) -> bool:
    """Tells whether a value has a position or random states of its own.

    A generator of random numbers is one, and an iterator that cannot be looked into: of a known
    package, or not written in Python. A file is an iterator by its type only.
    """
    if isinstance(value, _SOURCES):
        return True
    kind: Any = type(value)
    if not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    # What has a state is told where that changes.
    return not (inspect.isfunction(kind.__next__) and not is_others(kind)) and not hasattr(
        kind, "state_dict"
    )


def variables_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the closure's variables and the globals that the function's code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name == "__class__":
            continue  # That is how `super()` finds its class.
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # It is not set yet.
    names = _names(function.__code__)
    if "globals" in names:
        names |= {one for one in function.__code__.co_consts if isinstance(one, str)}
    for name in sorted(names):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
