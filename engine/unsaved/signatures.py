"""Signatures: what changes when a value does, as far as that can be told at little cost."""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import ctypes
import decimal
import enum
import fractions
import marshal
import queue
import threading
import types
import weakref
from collections.abc import Container
from typing import Any, Final

import numpy
import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from crosstrain.engine.digest import digest
from crosstrain.engine.guards import is_dense
from crosstrain.engine.nests import NESTS, SCALARS, is_module
from crosstrain.engine.spread import lasting_tensors

from .data_of_others import data_of, holds_data

#: What is compared as a whole.
PLAIN: Final = (
    *SCALARS,
    decimal.Decimal,
    fractions.Fraction,
    numpy.generic,
    torch.Tensor,
    numpy.ndarray,
    numpy.random.SeedSequence,
    array.array,
    bytearray,
    memoryview,
    # Shared with the workers, as a rule.
    ctypes._SimpleCData,
    ctypes.Array,
)
#: What holds other things.
COLLECTIONS: Final = (
    *NESTS,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
    contextvars.ContextVar,
    queue.Queue,
    threading.local,
    weakref.ReferenceType,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
)
_WHOLE: Final = (*NESTS, array.array, bytearray, memoryview)
_ENTRIES: Final = 4096
_PLENTY: Final = 1 << 18
_BYTES: Final = 1 << 20


def signature_of(value: Any, depth: int = 16) -> Any:
    """Returns what changes when a plain value does; None where it cannot be told."""
    if isinstance(value, (ctypes._SimpleCData, ctypes.Array)):
        return type(value).__name__, bytes(value)
    if isinstance(value, torch.Tensor):
        if not is_dense(value) or value.nbytes <= _BYTES:
            return digest(value)
        some = value.detach().reshape(-1)[:: value.numel() >> 12]
        return id(value), tuple(value.shape), _version(value), digest(some)
    if isinstance(value, numpy.ndarray):
        many: Any = value if value.nbytes <= 16 * _BYTES else value.reshape(-1)[:: value.size >> 12]
        return value.shape, digest(many)
    if isinstance(value, numpy.random.SeedSequence):
        value = value.state
    if isinstance(value, (set, frozenset)) and len(value) > _ENTRIES:
        # Sorting them would be felt; their hashes are kept with them.
        return len(value), hash(frozenset(value))
    if isinstance(value, _WHOLE) and len(value) <= _PLENTY:
        # Of plain values all at once; of what else there may be, one by one.
        many = tuple(value) if isinstance(value, (list, collections.deque)) else value
        with contextlib.suppress(ValueError):
            return len(value), hash(marshal.dumps(many, 2))
    if isinstance(value, enum.Enum):
        return type(value).__name__, value._name_, signature_of(value._value_, depth - 1)
    if type(value) is int:
        # Python refuses to write a very large one in tens.
        return "int", hex(value)
    if isinstance(value, (*SCALARS, decimal.Decimal, fractions.Fraction, numpy.generic)):
        return type(value).__name__, repr(value)
    if isinstance(value, (set, frozenset)):
        return len(value), sorted(map(repr, list(value)))
    if isinstance(value, COLLECTIONS) and depth > 0:
        inside = inside_of(value)
        items = list(inside.items() if isinstance(inside, dict) else inside)
        if isinstance(inside, dict) and any(isinstance(key, torch.Tensor) for key in inside):
            # What is kept for each parameter: it is a key by what it is, not by its numbers.
            items = [(id(key), one) for key, one in items]
        step = max(1, len(items) // 64)
        return len(items), [signature_of(item, depth - 1) for item in items[::step]]
    if callable(value) and hasattr(value, "__qualname__"):
        code: Any = getattr(value, "__code__", None)
        name: str = getattr(value, "__qualname__", "")
        if not isinstance(code, types.CodeType):
            return name
        return name, code.co_code, code.co_consts
    if depth > 0 and holds_data(value):
        return type(value).__name__, _signature_of_data(value, depth - 1)
    return type(value).__name__


def _signature_of_data(value: Any, depth: int) -> Any:
    try:
        return signature_of(data_of(value), depth)
    except Exception:  # noqa: BLE001  what is of another package may raise anything
        return None


def state_signature_of(value: Any, known: Container[int] = (), parted: bool = False) -> Any:
    """Returns what changes when an object's state does; None where it cannot be told.

    Of a module, the tensors that are `known` by `id` count as which they are, not by what they
    hold: their state is saved with another, as of an average whose inner module is named. Of an
    optimizer whose groups another changes that may be `parted` from it, each step counts.
    """
    if is_module(value):
        tensors = lasting_tensors(value)
        return [(id(one), None if id(one) in known else _version(one)) for one in tensors]
    if isinstance(value, Optimizer) and not (value.state or parted):
        # It keeps nothing of its steps, as without momentum: it is what it was set to.
        return signature_of(
            [
                id(one) if id(one) in known else {**one, "params": [*map(id, one["params"])]}
                for one in value.param_groups
            ]
        )
    if isinstance(value, Optimizer):
        tensors = [p for group in value.param_groups for p in group["params"]]
        return len(value.state), [
            tensor._version for tensor in tensors if not tensor.is_inference()
        ]
    try:
        return signature_of(value.state_dict(), 8)
    except Exception:  # noqa: BLE001  an object of the user's may raise anything
        return None


def inside_of(value: Any) -> Any:
    """Returns what a collection holds: as a dictionary, or as something to iterate over."""
    if isinstance(value, (collections.UserDict, collections.UserList)):
        return value.data
    if isinstance(value, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
        return dict(value.items())
    if isinstance(value, contextvars.ContextVar):
        return [value.get(None)]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    if isinstance(value, collections.ChainMap):
        return value.maps
    if isinstance(value, queue.Queue):
        return list(value.queue)
    return vars(value) if isinstance(value, threading.local) else value


def _version(tensor: torch.Tensor) -> int:
    if is_lazy(tensor):
        return -2
    return -1 if tensor.is_inference() else tensor._version
