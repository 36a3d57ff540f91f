"""Plain values: numbers and text, lists, arrays and tensors of them, which a state can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy
import torch

from crosstrain.backends.random_state import without_arrays
from crosstrain.engine.guards import is_dense

SCALARS: Final = frozenset({bool, int, float, str, type(None)})
# What a sampler keeps that is longer, or has more bytes, is taken for data, and not for a state.
_LONGEST: Final = 1 << 20
_LARGEST: Final = 1 << 23
#: So many entries at the most has what anything else keeps as a state; and so many bytes a tensor.
MOST_ENTRIES: Final = 4096
_MOST_BYTES: Final = 1 << 20
# Up to so many items a list is looked at, or saved, one by one.
_MANY: Final = 64


def is_plain(value: Any, depth: int = 3) -> bool:
    """Tells whether a value is plain, and no larger than what a sampler may keep for a state."""
    if isinstance(value, torch.Tensor):
        return is_dense(value) and value.nbytes <= _LARGEST
    if isinstance(value, numpy.ndarray):
        return value.dtype.kind in "biuf" and value.nbytes <= _LARGEST
    kind: Any = type(value)
    if kind in SCALARS:
        return True
    if depth == 0 or kind not in (list, tuple, dict) or len(value) > _LONGEST:
        return False
    if kind is dict:
        return all(type(k) in SCALARS and is_plain(v, depth - 1) for k, v in value.items())
    # A list of a million numbers is looked at by their types, which are few.
    if {*map(type, value)} <= SCALARS:
        return True
    return len(value) <= _MANY and all(is_plain(one, depth - 1) for one in value)


def is_small(value: Any) -> bool:
    """Tells whether a value is plain, and small enough to be a state whoever keeps it."""
    return _size(value) <= MOST_ENTRIES


def _size(value: Any, depth: int = 3) -> int:
    """Returns how many entries a plain value has; more than are allowed if it is none."""
    kind: Any = type(value)
    if kind in SCALARS:
        return 1
    if kind is torch.Tensor:
        plain = is_dense(value) and value.nbytes <= _MOST_BYTES and not value.requires_grad
        return 1 if plain else MOST_ENTRIES + 1
    if kind is numpy.ndarray:
        plain = value.dtype.kind in "biuf" and value.nbytes <= _MOST_BYTES
        return 1 if plain else MOST_ENTRIES + 1
    if depth == 0 or kind not in (list, tuple, dict) or len(value) > MOST_ENTRIES:
        return MOST_ENTRIES + 1
    if kind is dict and not all(type(key) in (bool, int, str) for key in value):
        return MOST_ENTRIES + 1
    found = 1
    for item in value.values() if kind is dict else value:
        found += _size(item, depth - 1)
        if found > MOST_ENTRIES:
            break
    return found


def plain_or_none(value: Any) -> Any:
    """Returns a copy of a plain value that is small enough to be a state; None for any other."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return copied(value) if is_small(value) and not _has_arrays(value) else None


def _has_arrays(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_has_arrays, value.values() if isinstance(value, dict) else value))
    return isinstance(value, numpy.ndarray)


def copied(value: Any) -> Any:
    """Returns a copy of a plain value."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(copied(one) for one in value)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return value.copy() if isinstance(value, numpy.ndarray) else value


def packed(value: Any) -> dict[str, Any]:
    """Returns a plain attribute as what loads without pickle, and in few words."""
    if isinstance(value, numpy.ndarray):
        found: Any = without_arrays({"values": value.view(f"u{value.itemsize}")})
        return {"kind": "array", "dtype": str(value.dtype), **found}
    if type(value) is list and len(value) > _MANY and {*map(type, value)} == {int}:
        try:
            return {"kind": "list", "values": torch.tensor(value, dtype=torch.int64)}
        except (OverflowError, RuntimeError):
            pass  # Numbers of more than 64 bits.
    return {"kind": "plain", "values": copied(value)}


def unpacked(packed: Mapping[str, Any]) -> Any:
    """Returns the plain attribute that `packed` was given."""
    values = packed["values"]
    if packed["kind"] == "array":
        dtype = numpy.dtype(packed["dtype"])
        return values.cpu().numpy().astype(f"u{dtype.itemsize}").view(dtype)
    return values.tolist() if packed["kind"] == "list" else values
