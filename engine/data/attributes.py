"""What handlers and fetching change of a dataset: told by its attributes, and put back on a resume.

A handler sets a dataset's difficulty, its negatives, its epoch; a dataset keeps what it has made
once. None of that is in a state_dict. The plain attributes (numbers, text, small lists, arrays and
tensors) that have changed since the data was first opened are therefore part of the state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, MutableMapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, Final, cast

import numpy
import torch
from torch.utils.data import Dataset

from crosstrain.engine.digest import digest
from crosstrain.engine.guards import is_users_object

from .generators import TRANSFORMS, copied, packed, same, unpacked

__all__ = ["Attributes", "plain_or_none"]

_DEPTH: Final = 4
# What is larger is the data itself, and not a state of it.
_ENTRIES: Final = 4096
_BYTES: Final = 1 << 20
_SCALARS: Final = (bool, int, float, str, type(None))
_ABSENT: Final = object()
# What `functools.lru_cache` makes of a function.
_CACHED: Final = type(functools.lru_cache(lambda: None))
# What is not looked into for caches.
_LARGE: Final = (torch.Tensor, torch.nn.Module, ModuleType, FunctionType, MethodType, type)


class Attributes:
    """Keeps which plain attributes of a dataset change, and of the datasets and transforms in it.

    Args:
        dataset: any object.
        **more: what else fetches, such as a `collate_fn`, by name.
    """

    def __init__(self, dataset: Any, **more: Any) -> None:
        self._owners = dict(_owners("dataset", dataset, _DEPTH))
        for name, one in more.items():
            # Functions and objects of torch's keep nothing.
            one = getattr(one, "__self__", one)
            if is_users_object(one) and not any(one is known for known in self._owners.values()):
                self._owners.update(_owners(name, one, _DEPTH))
        self._made = {name: _plain(owner) for name, owner in self._owners.items()}
        self._others = {name: _others(owner) for name, owner in self._owners.items()}
        self._lengths = {name: _lengths(others) for name, others in self._others.items()}
        self._contents = {name: _contents(others) for name, others in self._others.items()}
        self._caches = {name: _caches(owner) for name, owner in self._owners.items()}
        self._told: set[str] = set()

    def take(self) -> dict[str, Any]:
        """Returns the attributes that have changed, as tensors and plain types, by name."""
        found: dict[str, Any] = {}
        for name, owner in self._owners.items():
            if self._is_remade(name):
                continue
            made = self._made[name]
            for attribute, value in _plain(owner, copies=False).items():
                if attribute not in made or not same(value, made[attribute]):
                    found[f"{name}.{attribute}"] = packed(value)
        return found

    def give(self, states: Mapping[str, Any]) -> None:
        """Sets what `take` returned, and all others to what they were made with.

        Args:
            states: the attributes by name.
        """
        for name, owner in self._owners.items():
            if self._is_remade(name):
                continue
            attributes: dict[str, Any] = vars(owner)
            made = self._made[name]
            for attribute, value in _plain(owner, copies=False).items():
                place = f"{name}.{attribute}"
                if place in states:
                    continue
                if attribute not in made:
                    del attributes[attribute]
                elif not same(value, made[attribute]):
                    attributes[attribute] = copied(made[attribute])
        for place, state in states.items():
            name, _, attribute = place.rpartition(".")
            if name in self._owners and not self._is_remade(name):
                attributes = vars(self._owners[name])
                # A copy: fetching may write into it, and it may be given once more.
                value = copied(unpacked(state))
                if attribute not in attributes or not same(attributes[attribute], value):
                    attributes[attribute] = value

    def lost(self) -> list[str]:
        """Returns the names of what has changed and is too large to save, each once."""
        found: list[str] = []
        for name, owner in self._owners.items():
            now, then = _others(owner), self._others[name]
            for attribute, value in now.items():
                before = then.get(attribute, self._made[name].get(attribute, _ABSENT))
                known_content = self._contents[name].get(attribute)
                other = (
                    _grown(before, value)
                    or known_content != _content(value)
                    or (
                        _lengths({attribute: value})
                        != {attribute: self._lengths[name].get(attribute)}
                        and attribute in self._lengths[name]
                    )
                )
                if other:
                    found.append(f"{name}.{attribute}")
            if self._is_remade(name):
                # Numbers go with what was made anew; what was collected is lost.
                made = self._made[name]
                found += [
                    f"{name}.{attribute}"
                    for attribute, value in _plain(owner, copies=False).items()
                    if type(value) not in _SCALARS and not same(value, made.get(attribute, _ABSENT))
                ]
            known = self._caches[name]
            grown = [one for one, size in _caches(owner).items() if size != known.get(one, 0)]
            found += [f"{name}.{one}" if one.isidentifier() else one for one in grown]
        found = [one for one in dict.fromkeys(found) if one not in self._told]
        self._told.update(found)
        return found

    def has_grown(self) -> bool:
        """Tells whether something that collects samples, and is no attribute, has grown."""
        return any(_caches(owner) != self._caches[name] for name, owner in self._owners.items())

    def _is_remade(self, name: str) -> bool:
        """Whether an object has got something that cannot be saved, such as a file that it opened.

        What it keeps beside that would not fit without it.
        """
        now, then = _others(self._owners[name]), self._others[name]
        return any(value is not then.get(attribute) for attribute, value in now.items())


def _owners(
    name: str, thing: Any, depth: int, seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    seen = set() if seen is None else seen
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if type(thing) in (list, tuple):
        if len(thing) <= 64:
            for index, item in enumerate(thing):
                if isinstance(item, Dataset) or name.rpartition(".")[2] in TRANSFORMS:
                    yield from _owners(f"{name}[{index}]", item, depth - 1, seen)
        return
    if not hasattr(thing, "__dict__") or callable(getattr(thing, "parameters", None)):
        return
    attributes: dict[str, Any] = vars(thing)
    if not isinstance(attributes, dict):
        return
    yield name, thing
    for attribute, value in attributes.items():
        holds = type(value) in (list, tuple) and attribute in ("datasets", *TRANSFORMS)
        if isinstance(value, Dataset) or attribute in TRANSFORMS or holds or is_users_object(value):
            yield from _owners(f"{name}.{attribute}", value, depth - 1, seen)


def _plain(owner: Any, copies: bool = True) -> dict[str, Any]:
    return {
        name: copied(value) if copies else value
        for name, value in vars(owner).items()
        if _size(value) <= _ENTRIES
    }


def _others(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if _size(value) > _ENTRIES}


def _contents(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _content(value) for name, value in attributes.items()}


def _content(value: Any) -> Any:
    """Returns what tells whether a large array was written into: some of its numbers."""
    if isinstance(value, torch.Tensor) and not value.requires_grad and not value.is_inference():
        return value._version
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf" and value.size:
        # A view, and not a copy of gigabytes: the first axis is walked in strides.
        some = value.reshape(-1) if value.flags.c_contiguous else value.ravel()[:_ENTRIES]
        return digest(some[:: max(1, some.size // _ENTRIES)])
    return None


def _lengths(attributes: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in attributes.items() if type(value) in (list, dict)}


def _caches(owner: Any) -> dict[str, int]:
    """Returns the sizes of what else may collect samples, by what to call it.

    These are mappings of other kinds than plain dictionaries among the attributes, those in objects
    among them, `functools.lru_cache`, and mappings at the top level of the module that methods of
    the object's class refer to.
    """
    found: dict[str, int] = {}
    if not is_users_object(owner):
        return found
    for name, value in vars(owner).items():
        _count(name, value, found)
        inner = getattr(value, "__dict__", None)
        if isinstance(inner, dict) and not isinstance(value, (Dataset, *_LARGE)):
            for own, item in list(cast("dict[str, Any]", inner).items()):
                _count(f"{name}'s {own}", item, found, plain=True)
    for kind in type(owner).__mro__:
        if kind.__module__.partition(".")[0] in ("builtins", "torch", "typing"):
            continue
        for name, value in vars(kind).items():
            _count(name, value, found, plain=True)
            function = getattr(value, "__wrapped__", value)
            if isinstance(function, FunctionType):
                for other in function.__code__.co_names:
                    _count(f"the global {other}", function.__globals__.get(other), found, True)
    return found


def _count(name: str, value: Any, found: dict[str, int], plain: bool = False) -> None:
    if isinstance(value, _CACHED):
        found[name] = value.cache_info().currsize
    elif type(value) is dict:
        if plain:
            found[name] = len(value)
    elif isinstance(value, MutableMapping):
        found[name] = len(value)


def _size(value: Any, depth: int = 3) -> int:
    """Returns how many entries a plain value has; more than are allowed if it is none."""
    kind: Any = type(value)
    if kind in _SCALARS:
        return 1
    if kind is torch.Tensor:
        return 1 if value.nbytes <= _BYTES and not value.requires_grad else _ENTRIES + 1
    if kind is numpy.ndarray:
        plain = value.dtype.kind in "biuf" and value.nbytes <= _BYTES
        return 1 if plain else _ENTRIES + 1
    if depth == 0 or kind not in (list, tuple, dict) or len(value) > _ENTRIES:
        return _ENTRIES + 1
    if kind is dict and not all(type(key) in (bool, int, str) for key in value):
        return _ENTRIES + 1
    found = 1
    for item in value.values() if kind is dict else value:
        found += _size(item, depth - 1)
        if found > _ENTRIES:
            break
    return found


def plain_or_none(value: Any) -> Any:
    """Returns a copy of a plain value that is small enough to be a state; None for any other."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return copied(value) if _size(value) <= _ENTRIES and not _has_arrays(value) else None


def _has_arrays(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        many: Any = value
        return any(map(_has_arrays, many.values() if isinstance(many, dict) else many))
    return isinstance(value, numpy.ndarray)


def _grown(before: Any, value: Any) -> bool:
    """Tells whether data or a cache, too large to be saved, is another one than it was."""
    if type(value) in (list, dict):
        return before is not value or type(before) is not type(value)
    return isinstance(value, (numpy.ndarray, torch.Tensor)) and (
        before is not value and isinstance(before, (numpy.ndarray, torch.Tensor))
    )
