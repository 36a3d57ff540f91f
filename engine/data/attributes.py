"""What handlers and fetching change of a dataset: told by its attributes, and put back on a resume.

A handler sets a dataset's difficulty, its negatives, its epoch; a dataset keeps what it has made
once. None of that is in a state_dict. The plain attributes (numbers, text, small lists, arrays and
tensors) that have changed since the data was first opened are therefore part of the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy
import torch
from torch.utils.data import Dataset

from .generators import TRANSFORMS, copied, packed, same, unpacked

__all__ = ["Attributes"]

_DEPTH: Final = 4
# What is larger is the data itself, and not a state of it.
_ENTRIES: Final = 4096
_BYTES: Final = 1 << 20
_SCALARS: Final = (bool, int, float, str, type(None))
_ABSENT: Final = object()


class Attributes:
    """Keeps which plain attributes of a dataset change, and of the datasets and transforms in it.

    Args:
        dataset: any object.
    """

    def __init__(self, dataset: Any) -> None:
        self._owners = dict(_owners("dataset", dataset, _DEPTH))
        self._made = {name: _plain(owner) for name, owner in self._owners.items()}
        self._others = {name: _others(owner) for name, owner in self._owners.items()}
        self._lengths = {name: _lengths(others) for name, others in self._others.items()}
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
                if attribute in made and not same(value, made[attribute]):
                    attributes[attribute] = copied(made[attribute])
        for place, state in states.items():
            name, _, attribute = place.rpartition(".")
            if name in self._owners and not self._is_remade(name):
                # A copy: fetching may write into it, and it may be given once more.
                vars(self._owners[name])[attribute] = copied(unpacked(state))

    def lost(self) -> list[str]:
        """Returns the names of what has changed and is too large to save, each once."""
        found: list[str] = []
        for name, owner in self._owners.items():
            now, then = _others(owner), self._others[name]
            for attribute, value in now.items():
                before = then.get(attribute, self._made[name].get(attribute, _ABSENT))
                other = _grown(before, value) or (
                    _lengths({attribute: value}) != {attribute: self._lengths[name].get(attribute)}
                    and attribute in self._lengths[name]
                )
                if other and f"{name}.{attribute}" not in self._told:
                    found.append(f"{name}.{attribute}")
        self._told.update(found)
        return found

    def _is_remade(self, name: str) -> bool:
        """Whether an object has got something that cannot be saved, such as a file that it opened.

        What it keeps beside that would not fit without it.
        """
        now, then = _others(self._owners[name]), self._others[name]
        return any(value is not then.get(attribute) for attribute, value in now.items())


def _owners(name: str, thing: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth == 0:
        return
    if type(thing) in (list, tuple):
        if len(thing) <= 64:
            for index, item in enumerate(thing):
                if isinstance(item, Dataset) or name.rpartition(".")[2] in TRANSFORMS:
                    yield from _owners(f"{name}[{index}]", item, depth - 1)
        return
    if not hasattr(thing, "__dict__") or callable(getattr(thing, "parameters", None)):
        return
    attributes: dict[str, Any] = vars(thing)
    if not isinstance(attributes, dict):
        return
    yield name, thing
    for attribute, value in attributes.items():
        holds = type(value) in (list, tuple) and attribute in ("datasets", *TRANSFORMS)
        if isinstance(value, Dataset) or attribute in TRANSFORMS or holds:
            yield from _owners(f"{name}.{attribute}", value, depth - 1)


def _plain(owner: Any, copies: bool = True) -> dict[str, Any]:
    return {
        name: copied(value) if copies else value
        for name, value in vars(owner).items()
        if _size(value) <= _ENTRIES
    }


def _others(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if _size(value) > _ENTRIES}


def _lengths(attributes: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in attributes.items() if type(value) in (list, dict)}


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


def _grown(before: Any, value: Any) -> bool:
    """Tells whether data or a cache, too large to be saved, is another one than it was."""
    if type(value) in (list, dict):
        return before is not value or type(before) is not type(value)
    return isinstance(value, (numpy.ndarray, torch.Tensor)) and (
        before is not value and isinstance(before, (numpy.ndarray, torch.Tensor))
    )
