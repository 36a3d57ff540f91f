"""The functions that a checkpoint's pickle may call, each with the check of its arguments.

These are the functions that `torch.save` writes for tensors and plain types, and those that NumPy
writes for arrays of numbers, which pytorch-ignite's random states hold. Each check stands for the
call: it returns a symbol of what the call would return, or refuses it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from crosstrain.engine.guards import is_exact_dict, is_exact_tuple

from .errors import CheckpointCorrupt, CheckpointUnsafe

__all__ = [
    "CALLS",
    "Made",
    "Name",
    "Stored",
    "add_attributes",
    "has_own_hash",
    "is_known",
    "storage_item_size",
]


class Name:
    """A global that the pickle names: a function, a class, a dtype."""

    __slots__ = ("known", "module", "name")

    def __init__(self, module: str, name: str, known: bool) -> None:
        self.module = module
        self.name = name
        self.known = known

    @property
    def path(self) -> str:
        """Module and name, joined by a dot."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return self.path


class Stored:
    """A tensor's storage: how many bytes the archive holds for it, and how many make an element."""

    __slots__ = ("item_size", "size")

    def __init__(self, size: int, item_size: int) -> None:
        self.size = size
        self.item_size = item_size


class Made:
    """What a call would return.

    Args:
        kind: what it is.
        parts: what it holds.
        size: of a tensor, the bytes of its elements; of a NumPy dtype, those of one element; of a
            set, how many of its items do not have a hash of their own.
        items: the entries of a dictionary of another type; None for all else.
    """

    __slots__ = ("items", "kind", "parts", "size")

    def __init__(
        self,
        kind: str,
        parts: tuple[Any, ...] = (),
        size: int = 0,
        items: dict[Any, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.parts = parts
        self.size = size
        self.items = items


# Integers below this have different hashes.
_HASH_MODULUS: Final = 2**61 - 1

_STORAGES: Final = MappingProxyType(
    {
        "ByteStorage": 1,
        "CharStorage": 1,
        "BoolStorage": 1,
        "ShortStorage": 2,
        "HalfStorage": 2,
        "BFloat16Storage": 2,
        "IntStorage": 4,
        "FloatStorage": 4,
        "LongStorage": 8,
        "DoubleStorage": 8,
        "ComplexFloatStorage": 8,
        "ComplexDoubleStorage": 16,
    }
)


def storage_item_size(kind: Any) -> int | None:
    """Returns the bytes of one element of a storage class; None if it is not one."""
    if type(kind) is not Name:
        return None
    if kind.module == "torch":
        return _STORAGES.get(kind.name)
    return 1 if kind.path == "torch.storage.UntypedStorage" else None


def is_known(module: str, name: str) -> bool:
    """Tells whether a global is one that tensors, plain types and arrays of numbers need."""
    if module == "torch" and (name in _STORAGES or _dtype(name) is not None):
        return True
    path = f"{module}.{name}"
    return path in CALLS or path in ("torch.storage.UntypedStorage", "numpy.ndarray")


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def _refuse(function: str, arguments: tuple[Any, ...]) -> CheckpointCorrupt:
    shown = ", ".join(type(argument).__name__ for argument in arguments)
    return CheckpointCorrupt(f"its pickle calls {function} with wrong arguments ({shown})")


def _tensor(*arguments: Any) -> Made:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    if len(arguments) not in (6, 7):
        raise _refuse("_rebuild_tensor_v2", arguments)
    return _view(arguments[:4], arguments[4:6], arguments[6:], None)


def _tensor_of_dtype(*arguments: Any) -> Made:
    """Stands for `torch._utils._rebuild_tensor_v3`."""
    if len(arguments) not in (7, 8) or type(arguments[6]) is not Name:
        raise _refuse("_rebuild_tensor_v3", arguments)
    return _view(arguments[:4], arguments[4:6], arguments[7:], _dtype(arguments[6].name))


def _view(
    place: tuple[Any, ...],
    flags: tuple[Any, ...],
    metadata: tuple[Any, ...],
    dtype: torch.dtype | None,
) -> Made:
    storage, offset, size, stride = place
    requires_grad, hooks = flags
    good = (
        type(storage) is Stored
        and type(offset) is int
        and offset >= 0
        and _is_shape(size)
        and _is_shape(stride)
        and len(size) == len(stride) <= 64
        and type(requires_grad) is bool
        and type(hooks) is Made
        and hooks.items == {}
        and all(_is_bit_view(entry) for entry in metadata)
    )
    if not good:
        raise _refuse("a function that makes a tensor", (*place, *flags, *metadata))
    item_size = storage.item_size if dtype is None else dtype.itemsize
    numel = math.prod(size)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if numel and (last + 1) * item_size > storage.size:
        raise CheckpointCorrupt(
            f"a tensor of shape {tuple(size)} reaches beyond its {storage.size:,} bytes of data"
        )
    return Made("tensor", size=numel * item_size)


def _is_shape(value: Any) -> bool:
    return is_exact_tuple(value) and all(type(item) is int and item >= 0 for item in value)


def _is_bit_view(value: Any) -> bool:
    return is_exact_dict(value) and all(
        key in ("conj", "neg") and type(entry) is bool for key, entry in value.items()
    )


def _parameter(*arguments: Any) -> Made:
    if len(arguments) != 3 or type(arguments[0]) is not Made or arguments[0].kind != "tensor":
        raise _refuse("_rebuild_parameter", arguments)
    return arguments[0]


def _ordered_dict(*arguments: Any) -> Made:
    if arguments:
        raise _refuse("OrderedDict", arguments)
    return Made("OrderedDict", items={})


def _counter(*arguments: Any) -> Made:
    if len(arguments) > 1 or any(type(argument) is not dict for argument in arguments):
        raise _refuse("Counter", arguments)
    return Made("Counter", items=arguments[0] if arguments else {})


def _set(*arguments: Any) -> Made:
    if len(arguments) > 1 or any(type(argument) is not list for argument in arguments):
        raise _refuse("set", arguments)
    items: list[Any] = arguments[0] if arguments else []
    return Made("set", tuple(items), sum(not has_own_hash(item) for item in items))


def has_own_hash(item: Any) -> bool:
    """Tells whether an item's hash is hardly another's: many of one hash take time without end."""
    if type(item) is str or item is None:
        return True
    return isinstance(item, int) and abs(item) < _HASH_MODULUS


def _size(*arguments: Any) -> Made:
    if len(arguments) != 1 or not _is_shape(arguments[0]):
        raise _refuse("torch.Size", arguments)
    return Made("Size")


def _device(*arguments: Any) -> Made:
    kinds = [type(argument).__name__ for argument in arguments]
    if kinds not in (["str"], ["str", "int"]):
        raise _refuse("torch.device", arguments)
    return Made("device")


def _layout(*arguments: Any) -> Made:
    if len(arguments) != 1 or type(arguments[0]) is not str:
        raise _refuse("_get_layout", arguments)
    return Made("layout")


def _complex(*arguments: Any) -> complex:
    if len(arguments) != 2 or any(type(argument) is not float for argument in arguments):
        raise _refuse("complex", arguments)
    return complex(*arguments)


def _encode(*arguments: Any) -> bytes:
    # Bytes, in the pickle protocol that torch.save uses. Other codecs may take any time.
    text, codec = arguments if len(arguments) == 2 else (None, None)
    if type(text) is not str or codec not in ("latin1", "latin-1"):
        raise _refuse("_codecs.encode", arguments)
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise _refuse("_codecs.encode", arguments) from None


def _bytearray(*arguments: Any) -> Made:
    if not arguments:
        return Made("bytearray")
    # bytearray(n), with an integer, makes n bytes out of nothing.
    if len(arguments) == 1 and type(arguments[0]) is bytes:
        return Made("bytearray")
    _encode(*arguments)
    return Made("bytearray")


def _numpy_dtype(*arguments: Any) -> Made:
    code = arguments[0] if arguments else None
    found = re.fullmatch(r"[iuf]([1248])|b(1)|c(8|16)", code) if type(code) is str else None
    if found is None or arguments[1:] != (False, True):
        raise CheckpointUnsafe(
            f"its pickle needs a NumPy array of type {code!r}; only numbers can be loaded safely. "
            "Save a tensor instead: torch.from_numpy(array)"
        )
    size = int(next(group for group in found.groups() if group))
    return Made("numpy dtype", size=size)


def _numpy_array(*arguments: Any) -> Made:
    cls, shape, code = arguments if len(arguments) == 3 else (None, None, None)
    if type(cls) is not Name or cls.path != "numpy.ndarray" or shape != (0,) or code != b"b":
        raise _refuse("numpy's _reconstruct", arguments)
    return Made("numpy array")


def _numpy_scalar(*arguments: Any) -> Made:
    dtype, data = arguments if len(arguments) == 2 else (None, None)
    if type(dtype) is not Made or dtype.kind != "numpy dtype" or type(data) is not bytes:
        raise _refuse("numpy's scalar", arguments)
    if len(data) != dtype.size:
        raise _refuse("numpy's scalar", arguments)
    return Made("numpy scalar")


def add_attributes(target: Made, state: Any) -> None:
    """Stands for the instruction that sets an object's state.

    Args:
        target: the object.
        state: what the pickle sets it to.

    Raises:
        CheckpointCorrupt: if an object of this kind has no such state.
    """
    kind = target.kind
    if kind == "foreign":
        target.parts = (*target.parts, state)
        return
    if kind == "OrderedDict":
        # Its attributes: `_metadata`, the versions of a module's state.
        good = is_exact_dict(state) and not any(
            type(key) is not str or key.startswith("__") for key in state
        )
        target.parts = (state,)
    elif kind == "numpy dtype":
        good = (
            is_exact_tuple(state)
            and len(state) == 8
            and state[0] == 3
            and state[1] in ("<", ">", "|", "=")
            and state[2:] == (None, None, None, -1, -1, 0)
        )
    elif kind == "numpy array":
        good = _is_array_state(state)
    else:
        good = False
    if not good:
        raise CheckpointCorrupt(f"its pickle sets a state that no {kind} has")


def _is_array_state(state: Any) -> bool:
    if not is_exact_tuple(state) or len(state) != 5:
        return False
    version, shape, dtype, fortran, data = state
    return (
        type(version) is int
        and version == 1
        and _is_shape(shape)
        and len(shape) <= 32
        and type(dtype) is Made
        and dtype.kind == "numpy dtype"
        and type(fortran) is bool
        and type(data) is bytes
        and len(data) == math.prod(shape) * dtype.size
    )


CALLS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
        "torch._utils._rebuild_parameter": _parameter,
        "torch.serialization._get_layout": _layout,
        "torch.Size": _size,
        "torch.device": _device,
        "collections.OrderedDict": _ordered_dict,
        "collections.Counter": _counter,
        "builtins.set": _set,
        "builtins.complex": _complex,
        "builtins.bytearray": _bytearray,
        "_codecs.encode": _encode,
        "numpy.dtype": _numpy_dtype,
        "numpy._core.multiarray._reconstruct": _numpy_array,
        "numpy.core.multiarray._reconstruct": _numpy_array,
        "numpy._core.multiarray.scalar": _numpy_scalar,
        "numpy.core.multiarray.scalar": _numpy_scalar,
    }
)
