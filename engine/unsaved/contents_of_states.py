"""Which attributes of a named object its state holds: told by comparing contents.

A state may have an attribute under another name and as another type: a deque as a list, a tensor as
a number. So contents are compared, and neither names nor objects.
"""

from __future__ import annotations

import array
import collections
from collections.abc import Iterator
from typing import Any, Final

import numpy
import torch

from crosstrain.engine.guards import is_others

from .drawn_from import TORCHS_OWN, TRAINED, attributes_of
from .users_functions import holders_of_state

#: What has no identity of its own: equal ones may be one object, whoever holds them.
SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_ARRAYS: Final = (torch.Tensor, numpy.ndarray, array.array, bytearray)
_COLLECTIONS: Final = (dict, list, tuple, set, frozenset, collections.deque)
_LARGEST: Final = 4096
_DEPTH: Final = 8
_EXACT: Final = 1 << 53


class Saved:
    """Divides what named objects hold into what goes on with them and what may not.

    Args:
        objects: the named ones.
    """

    def __init__(self, objects: list[Any]) -> None:
        #: By `id`, what they hold that is not looked into: objects.
        self.held: set[int] = set()
        #: By `id`, collections, tensors and arrays that they hold and whose contents a state has.
        self.contents: set[int] = set()
        for value in objects:
            for owner in holders_of_state(value):
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
        try:
            state = owner.state_dict()
        except Exception:  # noqa: BLE001  an object of the user's may raise anything
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


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Tells whether a value is a collection, tensor or array that holds nothing but numbers."""
    if isinstance(value, _ARRAYS):
        return True
    if not isinstance(value, _COLLECTIONS) or depth == 0:
        return False
    inside = value.values() if isinstance(value, dict) else value
    return all(isinstance(one, SCALARS) or _is_plain(one, depth - 1) for one in inside)


def _parts(state: Any, depth: int = _DEPTH) -> Iterator[Any]:
    yield state
    if isinstance(state, _COLLECTIONS) and depth > 0:
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
    if isinstance(value, _COLLECTIONS) and depth > 0:
        for one in value:
            yield from _leaves(one, depth - 1)
    elif isinstance(value, (bool, int, float)):
        # A number may have become one of another type.
        yield repr(float(value)) if abs(value) < _EXACT else repr(value)
    elif isinstance(value, numpy.generic):
        yield from _leaves(value.item(), depth)
    else:
        yield repr(value) if isinstance(value, SCALARS) else type(value).__name__
