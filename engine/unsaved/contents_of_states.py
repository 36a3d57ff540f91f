"""Which attributes of a named object its state holds: told by comparing contents.

A state may have an attribute under another name and as another type: a deque as a list, a tensor as
a number. So contents are compared, and neither names nor objects.
"""

from __future__ import annotations

import array
import collections
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy
import torch
from torch.nn import Module
from torch.optim import Optimizer

from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import is_others

from .functions import TORCHS_OWN, TRAINED
from .signatures import COLLECTIONS, SCALARS, signature_of

# By which of its methods a module says what its state is.
_STATES: Final = ("state_dict", "get_extra_state", "_save_to_state_dict")

_ARRAYS: Final = (torch.Tensor, numpy.ndarray, array.array, bytearray)
_NESTS: Final = (dict, list, tuple, set, frozenset, collections.deque)
_LARGEST: Final = 4096
_DEPTH: Final = 8
_EXACT: Final = 1 << 53


class Saved:
    """Divides what named objects hold into what goes on with them and what may not.

    Args:
        objects: the named ones.
    """

    def __init__(self, objects: Iterable[Any] = ()) -> None:
        #: By `id`, what they hold that is not looked into: objects.
        self.held: set[int] = set()
        #: By `id`, collections, tensors and arrays that they hold and whose contents a state has.
        self.contents: set[int] = set()
        # States, and marks of what they are made of, by the `id` of their object.
        self._states: dict[int, Any] = {}
        self._marks: dict[int, set[str]] = {}
        for value in objects:
            for owner in _holders_of_state(value):
                self._divide(owner)

    def _divide(self, owner: Any) -> None:
        # As they are now. Numbers and words are one object wherever they stand.
        own = {
            name: one for name, one in attributes_of(owner).items() if not isinstance(one, SCALARS)
        }
        held, plain = [*own.values()], list[Any]()
        if not is_others(type(owner)):
            more = own.keys() - (TORCHS_OWN if isinstance(owner, TRAINED) else set())
            plain = [own[name] for name in more if _is_plain(own[name])]
        self.held |= {id(one) for one in held} - {id(one) for one in plain}
        if not plain:
            return
        state = self._state_of(owner)
        if state is None:
            # It cannot be compared.
            self.held |= {id(one) for one in plain}
            return
        contents = [_content(one) for one in plain]
        sizes = {_size(one) for one in contents}
        parts = (
            part
            for part in _parts(state)
            if not isinstance(part, _ARRAYS) or _length(part) in sizes
        )
        saved = {_content(part) for part in parts}
        self.contents |= {id(one) for one, own in zip(plain, contents, strict=True) if own in saved}

    def _state_of(self, owner: Any) -> Any:
        """Returns an object's state, asked for once; None where it has none."""
        if id(owner) not in self._states:
            self._states[id(owner)] = None
            with contextlib.suppress(Exception):  # An object of the user's may raise anything.
                self._states[id(owner)] = owner.state_dict()
        return self._states[id(owner)]

    def has(self, owner: Any, value: Any) -> bool:
        """Tells whether an object's state has a value, under whichever name.

        Of one that has no state, it has all.
        """
        if id(owner) not in self._marks:
            state = self._state_of(owner)
            whole = getattr(owner, "__dict__", {}) if state is None else state
            self._marks[id(owner)] = _marks_of(whole)
        return _mark(value) in self._marks[id(owner)]


def _mark(value: Any) -> str:
    return repr(signature_of(value))


def _marks_of(state: Any) -> set[str]:
    """Returns marks of a state and of all in it."""
    left: list[Any] = [state]
    found: set[str] = set()
    while left and len(found) < _LARGEST:
        part = left.pop()
        found.add(_mark(part))
        if isinstance(part, COLLECTIONS):
            some: Any = part
            left.extend(some.values() if isinstance(some, dict) else some)
    return found


def _holders_of_state(value: Any) -> list[Any]:
    """Returns the objects whose attributes may be a part of a named object's state.

    A module's state has its parameters, its buffers and its modules', and an optimizer's what torch
    has in it, unless a class says more.
    """
    if isinstance(value, Optimizer):
        return [] if type(value).state_dict is Optimizer.state_dict else [value]
    if not isinstance(value, Module):
        return [value]
    return [
        one
        for one in value.modules()
        if any(getattr(type(one), name) is not getattr(Module, name) for name in _STATES)
    ]


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Tells whether a value is a collection, tensor or array that holds nothing but numbers."""
    if isinstance(value, _ARRAYS):
        return True
    if not isinstance(value, _NESTS) or depth == 0:
        return False
    inside = value.values() if isinstance(value, dict) else value
    return all(isinstance(one, SCALARS) or _is_plain(one, depth - 1) for one in inside)


def _parts(state: Any, depth: int = _DEPTH) -> Iterator[Any]:
    yield state
    if isinstance(state, _NESTS) and depth > 0:
        for one in state.values() if isinstance(state, dict) else state:
            yield from _parts(one, depth - 1)


def _content(value: Any) -> tuple[str, ...] | int:
    """Returns what a value holds, in no order; of what is large, only how much."""
    found: list[str] = []
    for leaf in _leaves(value, _DEPTH):
        found.append(leaf)
        if len(found) > _LARGEST:
            return _length(value)
    return tuple(sorted(found))


def _size(content: tuple[str, ...] | int) -> int:
    return content if isinstance(content, int) else len(content)


def _length(value: Any) -> int:
    return int(value.numel()) if isinstance(value, torch.Tensor) else int(numpy.size(value))


def _leaves(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, _ARRAYS):
        some = value.detach().flatten() if isinstance(value, torch.Tensor) else numpy.ravel(value)
        value = some[: _LARGEST + 1].tolist()
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, _NESTS) and depth > 0:
        for one in value:
            yield from _leaves(one, depth - 1)
    elif isinstance(value, (bool, int, float)):
        # A number may have become one of another type.
        yield repr(float(value)) if abs(value) < _EXACT else repr(value)
    elif isinstance(value, numpy.generic):
        yield from _leaves(value.item(), depth)
    else:
        yield repr(value) if isinstance(value, SCALARS) else type(value).__name__
