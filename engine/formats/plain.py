"""Turns a state into tensors and plain types, which any `torch.load` reads without running code."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch

from crosstrain.engine.storage.errors import CheckpointContentError

from .stand_ins import MAX_KEY_DEPTH, MAX_KEY_ITEMS

_AS_THEY_ARE: Final = frozenset(
    {type(None), bool, float, complex, str, bytes, torch.Size, torch.dtype, torch.device}
)
# The pickle instruction for integers that weights_only allows counts its bytes in one byte.
_MAX_INTEGER_BITS: Final = 8 * 255 - 1
_MAX_DEPTH: Final = 150

OnTensor = Callable[[torch.Tensor, bool], torch.Tensor]


def to_plain(state: Any, on_tensor: OnTensor) -> Any:
    """Copies a state's containers, and turns what a safe checkpoint cannot carry into what it can.

    NumPy arrays become tensors and NumPy scalars numbers; named tuples become tuples; mappings of
    other types become dictionaries (OrderedDict and Counter stay); deques lists, frozen sets sets,
    paths text, and empty bytes an empty bytearray. Text, numbers and bytes of a subclass (StrEnum,
    IntEnum) become what they are a subclass of. What is shared within the state stays shared.

    Args:
        state: any nest of these, of tensors and of plain types.
        on_tensor: called with each tensor once, detached, and with whether its memory is new (an
            array's copy) and so nobody else's; what it returns takes the tensor's place.

    Returns:
        The new nest; none of its containers is one of `state`.

    Raises:
        CheckpointContentError: if something in it has no plain form; says where, and what to do.
    """
    return _Converter(on_tensor).convert(state, ())


class _Converter:
    def __init__(self, on_tensor: OnTensor) -> None:
        self._on_tensor = on_tensor
        # The second entry keeps the key's object alive, so that its id stays its own.
        self._made: dict[int, tuple[Any, Any]] = {}
        self._open: set[int] = set()

    def convert(self, value: Any, path: tuple[Any, ...]) -> Any:
        kind: Any = type(value)
        if kind in _AS_THEY_ARE:
            # Empty bytes are the one plain value for which the pickle protocol needs a class that
            # weights_only does not allow.
            return bytearray() if kind is bytes and not value else value
        if kind is int:
            return self._integer(value, path)
        if isinstance(value, _SIMPLE) and not isinstance(value, np.generic):
            return self.convert(_exact(value), path)
        known = self._made.get(id(value))
        if known is not None:
            return known[0]
        if id(value) in self._open:
            raise _refusal(path, value, "it contains itself", "break the cycle")
        if len(path) > _MAX_DEPTH:
            raise _refusal(path[:8], value, f"it is nested over {_MAX_DEPTH} deep", "flatten it")
        self._open.add(id(value))
        made = self._convert(value, path)
        self._open.discard(id(value))
        self._made[id(value)] = (made, value)
        return made

    def _convert(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._on_tensor(_dense(value, path), False)
        if isinstance(value, np.ndarray):
            return self._on_tensor(_array(value, path), True)
        if type(value) is bytearray:
            # A copy: it may be changed while a thread writes.
            return bytearray(value)
        if isinstance(value, np.generic):
            return self._numpy_scalar(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, (list, tuple, deque)):
            return self._sequence(value, path)
        if isinstance(value, (set, frozenset)):
            return {self._key(item, path) for item in value}
        if isinstance(value, PurePath):
            return str(value)
        raise _refusal(path, value, *_reason(value))

    def _mapping(self, value: Mapping[Any, Any], path: tuple[Any, ...]) -> Any:
        items = {
            self._key(key, path): self.convert(item, (*path, key)) for key, item in value.items()
        }
        if isinstance(value, Counter):
            return Counter(items)
        if not isinstance(value, OrderedDict):
            return items
        ordered: OrderedDict[Any, Any] = OrderedDict(items)
        # A module's state keeps the versions of its layouts in this attribute.
        metadata = vars(value).get("_metadata")
        if metadata is not None:
            vars(ordered)["_metadata"] = self.convert(metadata, (*path, "_metadata"))
        return ordered

    def _sequence(self, value: Iterable[Any], path: tuple[Any, ...]) -> Any:
        items = [self.convert(item, (*path, index)) for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items

    def _key(self, key: Any, path: tuple[Any, ...], depth: int = 0) -> Any:
        kind: Any = type(key)
        if kind in (str, bool, float, type(None)) or (kind is bytes and key):
            return key
        if kind is int:
            return self._integer(key, path)
        if isinstance(key, np.generic):
            return self._numpy_scalar(key, path)
        if isinstance(key, _SIMPLE):
            return self._key(_exact(key), path, depth)
        if kind is tuple:
            if depth == MAX_KEY_DEPTH or len(key) > MAX_KEY_ITEMS:
                reason = f"tuples in it are nested over {MAX_KEY_DEPTH} deep, or have over"
                raise _refusal(path, key, f"{reason} {MAX_KEY_ITEMS:,} items", "use a shorter key")
            return tuple(self._key(item, path, depth + 1) for item in key)
        advice = "use text, numbers or tuples of them"
        raise _refusal(path, key, "it is a key of a dictionary, or in a set", advice)

    def _integer(self, value: int, path: tuple[Any, ...]) -> int:
        if value.bit_length() > _MAX_INTEGER_BITS:
            reason = (
                f"it has {value.bit_length()} bits, and {_MAX_INTEGER_BITS} can be loaded safely"
            )
            raise _refusal(path, value, reason, "store it as text or bytes")
        return value

    def _numpy_scalar(self, value: Any, path: tuple[Any, ...]) -> Any:
        number = value.item()
        if isinstance(number, np.generic) or type(number) not in {*_AS_THEY_ARE, int}:
            raise _refusal(
                path, value, f"a {value.dtype} has no plain form", "convert it to a float"
            )
        return number


# What the types above, and integers, may have subclasses of.
_SIMPLE: Final = (str, int, float, complex, bytes)


def _exact(value: Any) -> Any:
    """Returns text, a number or bytes of a subclass as what it is a subclass of.

    The methods of the plain type itself are asked: the subclass may answer anything.
    """
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return bytes.__getitem__(value, slice(None))
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return complex.__complex__(value)


def _dense(tensor: torch.Tensor, path: tuple[Any, ...]) -> torch.Tensor:
    """Returns a plain, detached view of a tensor."""
    if hasattr(type(tensor), "full_tensor"):
        advice = (
            "give Checkpoint a DiskSaver, or gather it first: "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "StateDictOptions(full_state_dict=True)"
        )
        raise _refusal(path, tensor, "its parts lie in several processes", advice)
    if tensor.is_meta or torch.nn.parameter.is_lazy(tensor):
        advice = "give it data first: run the model once, or use to_empty()"
        raise _refusal(path, tensor, "it has no data yet", advice)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        advice = "store it as dense tensors: to_dense(), int_repr(), unbind()"
        raise _refusal(path, tensor, "it is sparse, quantized or nested", advice)
    detached = tensor.detach()
    if type(detached) is not torch.Tensor:
        if hasattr(type(detached), "__tensor_flatten__"):
            advice = "store the plain tensors that it is made of"
            raise _refusal(path, tensor, "it is made of several tensors", advice)
        detached = detached.as_subclass(torch.Tensor)
    return detached


def _array(array: np.ndarray[Any, Any], path: tuple[Any, ...]) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        advice = "store its data and its mask: array.data, numpy.ma.getmaskarray(array)"
        raise _refusal(path, array, "its mask has no place in a tensor", advice)
    try:
        # A copy: the tensor must not change when the array does, nor refuse to be read-only. torch
        # takes the machine's order of bytes only.
        native = array.dtype.newbyteorder("=")
        return torch.from_numpy(np.array(array, native, order="C"))
    except TypeError:
        advice = "store it as numbers of a type that torch has, or as text"
        raise _refusal(path, array, f"torch has no type for its {array.dtype}", advice) from None


def _reason(value: Any) -> tuple[str, str]:
    if isinstance(value, torch.nn.Module) or hasattr(type(value), "state_dict"):
        return "it is an object", "name it in to_save, or store what its state_dict() returns"
    if isinstance(value, torch.Generator):
        return "it is a generator", "store what its get_state() returns"
    if callable(value):
        return "it is code", "store what it is made from, and make it anew when loading"
    if isinstance(value, enum.Enum):
        return (
            "it is a member of an enum",
            "store its value or its name, and look it up in the enum",
        )
    if hasattr(type(value), "isoformat"):
        return "it is a date or a time", "store isoformat()"
    if hasattr(type(value), "__dataclass_fields__"):
        return "it is an object", "store dataclasses.asdict(...)"
    return "it is no tensor, number, text, bytes, list, tuple, set or dictionary", "store those"


def _refusal(path: tuple[Any, ...], value: Any, reason: str, advice: str) -> CheckpointContentError:
    where = "".join(f"[{key!r}]" for key in path) or "itself"
    return CheckpointContentError(
        f"The state at {where} is of type {type(value).__module__}.{type(value).__qualname__}: "
        f"{reason}, so it cannot be loaded again safely (weights_only=True). Nothing was written. "
        f"Remedy: {advice}."
    )
