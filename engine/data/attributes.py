"""What handlers and fetching change of a dataset: told by its attributes, and put back on a resume.

A handler sets a dataset's difficulty, its negatives, its epoch; a dataset keeps what it has made
once. None of that is in a state_dict. The plain attributes (numbers, text, small lists, arrays and
tensors) that have changed since the data was first opened are therefore part of the state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy
import torch
from torch.utils.data import Dataset, get_worker_info

from crosstrain.engine.digest import digest, same
from crosstrain.engine.guards import (
    has_memory,
    is_a,
    is_dense,
    is_users_object,
    module_of,
    own_attributes,
)

from .contents import is_shared_memory, numbers_in, write_into
from .generators import TRANSFORMS
from .plain_values import MOST_ENTRIES, SCALARS, copied, is_small, packed, unpacked

_DEPTH: Final = 4
_ABSENT: Final = object()
# What `functools.lru_cache` makes of a function.
_CACHED: Final = type(functools.lru_cache(lambda: None))
# So many numbers of a large tensor are compared. It may lie in a file, whose pages are read then.
_LOOKED_AT: Final = 512
# What is not looked into for caches.
_LARGE: Final = (torch.Tensor, torch.nn.Module, ModuleType, FunctionType, MethodType, type)


class Attributes:
    """Keeps which plain attributes of a dataset change; of datasets and transforms in it, too."""

    def __init__(self, dataset: Any, **more: Any) -> None:
        owners = dict(owners_of("dataset", dataset))
        for name, one in more.items():
            # Functions and objects of torch's keep nothing.
            one = getattr(one, "__self__", one)
            if is_users_object(one) and not any(one is known for known in owners.values()):
                owners.update(owners_of(name, one))
        apart = frozenset(map(id, owners.values()))
        self._owners = {name: _Owner(owner, apart) for name, owner in owners.items()}
        self._told: set[str] = set()

    def take(self) -> dict[str, Any]:
        """Returns the attributes that have changed, as tensors and plain types, by name."""
        return {
            f"{name}.{attribute}": {**packed(value), "same object": owner.has_kept(attribute)}
            for name, owner in self._owners.items()
            if not owner.is_remade()
            for attribute, value in owner.changed()
        }

    def give(self, states: Mapping[str, Any]) -> None:
        """Sets what `take` returned, and all others to what they were made with."""
        by_owner: dict[str, dict[str, Any]] = {name: {} for name in self._owners}
        for place, state in states.items():
            name, _, attribute = place.rpartition(".")
            if name in by_owner:
                by_owner[name][attribute] = state
        for name, own in by_owner.items():
            if not self._owners[name].is_remade():
                self._owners[name].give(own)

    def shared(self) -> list[str]:
        """Returns the names of small memory that processes share, as of `multiprocessing.Value`."""
        return [f"{name}.{own}" for name, one in self._owners.items() for own in one.shared()]

    @contextmanager
    def as_in(self, states: Mapping[str, Any]) -> Iterator[None]:
        """Gives what `take` returned for a while."""
        kept = self.take()
        self.give(states)
        try:
            yield
        finally:
            self.give(kept)

    def lost(self) -> list[str]:
        """Returns the names of what has changed and is too large to save, each once."""
        found: list[str] = []
        for name, owner in self._owners.items():
            found += [f"{name}.{attribute}" for attribute in owner.lost()]
            found += [f"{name}.{one}" if one.isidentifier() else one for one in owner.grown()]
        found = [one for one in dict.fromkeys(found) if one not in self._told]
        self._told.update(found)
        return found

    def has_grown(self) -> bool:
        """Tells whether something that collects samples, and is no attribute, has grown."""
        return any(owner.has_grown() for owner in self._owners.values())


class _Owner:
    """An object whose attributes may change, and what it was made with; others lie `apart`."""

    def __init__(self, thing: Any, apart: frozenset[int]) -> None:
        self._thing, self._apart = thing, apart
        self._made = _plain(thing)
        # The objects themselves: others may refer to them, too.
        self._objects = dict(vars(thing))
        self._others = _others(thing)
        self._contents = {name: _content(value) for name, value in self._others.items()}
        self._caches = _caches(thing, apart)

    def changed(self) -> Iterator[tuple[str, Any]]:
        """Yields the plain attributes that have changed, by name."""
        for name, value in _plain(self._thing, copies=False).items():
            if name not in self._made or not same(value, self._made[name]):
                yield name, value

    def give(self, states: Mapping[str, Any]) -> None:
        """Sets packed attributes by name, and all others to what they were made with."""
        attributes: dict[str, Any] = vars(self._thing)
        for name in [name for name, _ in self.changed() if name not in states]:
            if name in self._made:
                self._set(name, copied(self._made[name]), True)
            else:
                del attributes[name]
        for name, state in states.items():
            # A copy: fetching may write into it, and it may be given once more.
            value = copied(unpacked(state))
            if name not in attributes or not same(_readable(attributes[name]), value):
                self._set(name, value, state.get("same object", False))

    def has_kept(self, name: str) -> bool:
        """Tells whether an attribute is the object that it was made with, whatever that holds."""
        if get_worker_info() is not None:
            # It may have been set back already, and is then another one.
            return False
        now = vars(self._thing).get(name, _ABSENT)
        return type(now) not in SCALARS and now is self._objects.get(name)

    def shared(self) -> list[str]:
        """Returns the names of the attributes that are memory which processes share."""
        own: dict[str, Any] = vars(self._thing)
        return [name for name in self._made if is_shared_memory(own.get(name))]

    def _set(self, name: str, value: Any, same_object: bool) -> None:
        """Sets an attribute; where it was the object that it was made with, by writing into it.

        A worker writes into nothing: others may share it, and fetch from it now.
        """
        own, in_worker = self._objects.get(name), get_worker_info() is not None
        if in_worker and is_shared_memory(own):
            return
        if same_object and not in_worker and write_into(own, value):
            value = own
        vars(self._thing)[name] = value

    def lost(self) -> list[str]:
        """Returns the names of attributes that have changed and cannot be saved."""
        found = [
            name
            for name, value in _others(self._thing).items()
            if _is_another(self._others.get(name, self._made.get(name, _ABSENT)), value)
            or self._contents.get(name) != _content(value)
        ]
        if self.is_remade():
            # Numbers go with what was made anew; what was collected is lost.
            found += [name for name, value in self.changed() if type(value) not in SCALARS]
        return found

    def grown(self) -> list[str]:
        """Returns what has another size of that which collects samples, and is no attribute."""
        now = _caches(self._thing, self._apart)
        return [one for one, size in now.items() if size != self._caches.get(one, 0)]

    def has_grown(self) -> bool:
        """Tells whether there is such a thing, or one less."""
        return _caches(self._thing, self._apart) != self._caches

    def is_remade(self) -> bool:
        """Tells whether it has got something that cannot be saved, such as a file that it opened.

        What it keeps beside that would not fit without it.
        """
        now = _others(self._thing)
        return any(value is not self._others.get(name) for name, value in now.items())


def owners_of(
    name: str, thing: Any, depth: int = _DEPTH, seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields what data is fetched with, and the datasets and transforms in it, by their places."""
    seen = set() if seen is None else seen
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if type(thing) in (list, tuple):
        if len(thing) <= 64:
            for index, item in enumerate(thing):
                if is_a(item, Dataset) or name.rpartition(".")[2] in TRANSFORMS:
                    yield from owners_of(f"{name}[{index}]", item, depth - 1, seen)
        return
    attributes = own_attributes(thing)
    if attributes is None or callable(getattr(type(thing), "parameters", None)):
        return
    yield name, thing
    for attribute, value in attributes.items():
        holds = type(value) in (list, tuple) and attribute in ("datasets", *TRANSFORMS)
        looked_into = is_a(value, Dataset) or is_users_object(value)
        if looked_into or attribute in TRANSFORMS or holds:
            yield from owners_of(f"{name}.{attribute}", value, depth - 1, seen)


def _plain(owner: Any, copies: bool = True) -> dict[str, Any]:
    return {
        name: copied(_readable(value)) if copies else _readable(value)
        for name, value in vars(owner).items()
        if is_small(_readable(value))
    }


def _readable(value: Any) -> Any:
    """Returns a value, or the numbers that it holds in memory that processes share."""
    if not is_shared_memory(value) or (hasattr(value, "__len__") and len(value) > MOST_ENTRIES):
        return value
    return numbers_in(value)


def _others(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not is_small(_readable(value))}


def _content(value: Any) -> Any:
    """Returns what tells whether a large value was written into: its length, or some numbers."""
    if type(value) in (list, dict):
        return "length", len(value)
    if is_a(value, torch.Tensor) and not value.requires_grad and not value.is_inference():
        return value._version, _some_of(value)
    if is_a(value, numpy.ndarray) and value.dtype.kind in "biuf" and value.size:
        # Not by a copy of gigabytes, whatever its strides.
        return digest(value.flat[:: max(1, value.size // MOST_ENTRIES)])
    if is_shared_memory(value):
        return digest(numbers_in(value, max(1, len(value) // MOST_ENTRIES)))
    return None


def _some_of(tensor: torch.Tensor) -> str | None:
    """Returns a digest of some of a tensor's numbers: workers may write into memory they share."""
    if tensor.device.type != "cpu" or not has_memory(tensor) or not is_dense(tensor):
        return None
    numbers = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return digest(numbers[:: max(1, len(numbers) // _LOOKED_AT)])


def _caches(owner: Any, apart: frozenset[int]) -> dict[str, int]:
    """Returns the sizes of what else may collect samples, by what to call it.

    These are mappings of other kinds than plain dictionaries among the attributes, those in objects
    among them, `functools.lru_cache`, and mappings at the top level of the module that methods of
    the object's class refer to. Not what objects hold that lie apart, by `id`: what of theirs has
    changed, they save or tell themselves.
    """
    found: dict[str, int] = {}
    if not is_users_object(owner):
        return found
    for name, value in vars(owner).items():
        _count(name, value, found)
        inner = own_attributes(value)
        if id(value) in apart or is_a(value, Dataset, MutableMapping, *_LARGE):
            continue
        if inner is not None:
            for own, item in list(inner.items()):
                _count(f"{name}'s {own}", item, found, plain=True)
    for kind in type(owner).__mro__:
        if module_of(kind).partition(".")[0] in ("builtins", "torch", "typing"):
            continue
        for name, value in vars(kind).items():
            _count(name, value, found, plain=True)
            function = getattr(value, "__wrapped__", value)
            if is_a(function, FunctionType):
                for other in function.__code__.co_names:
                    _count(f"the global {other}", function.__globals__.get(other), found, True)
    return found


def _count(name: str, value: Any, found: dict[str, int], plain: bool = False) -> None:
    if is_a(value, _CACHED):
        found[name] = value.cache_info().currsize
    elif type(value) is dict:
        if plain:
            found[name] = len(value)
    elif is_a(value, MutableMapping):
        # Of another package, such as a file that may be closed by now.
        with contextlib.suppress(Exception):
            found[name] = len(value)


def _is_another(before: Any, value: Any) -> bool:
    """Tells whether data or a cache, too large to be saved, is another one than it was."""
    if type(value) in (list, dict):
        return before is not value or type(before) is not type(value)
    kinds = (numpy.ndarray, torch.Tensor)
    return is_a(value, *kinds) and before is not value and is_a(before, *kinds)
