"""One digest for any nest of tensors, arrays and plain values, with the path of each part.

Two nests are equal where their leaves are: the same paths, each with the same dtype and shape (or
type) and the same SHA-256 of its bytes. What differs can so be named: `['image'][0]`. The bytes of
a tensor on the host are hashed where they lie; one of a device is copied to the host first.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple, cast

import numpy
import torch

from .guards import has_memory, is_sequence, own_attributes

_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None))
# Of these, what is equal has the same bits.
_EXACT: Final = frozenset({bool, int, str, bytes, type(None)})
_DEPTH: Final = 16
# So many numbers of a tensor are in a sketch, at most.
_SKETCHED: Final = 4096


class Attributes(dict[str, Any]):
    """The attributes of an object, by name: a mapping whose paths are written with a dot."""

    def __init__(self, kind: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.kind = kind


class Leaf(NamedTuple):
    """A part of a nest that has no parts: a tensor, an array, a plain value, a list of them."""

    #: Where it is, as Python writes it: `[0]`, `['image']`, `.x`; empty for the nest itself.
    path: str
    #: Dtype and shape, or the type.
    kind: str
    #: Of its bytes, in hexadecimal digits.
    digest: str


def digest(value: Any) -> str:
    """Returns one digest of a nest: of the paths, types, shapes and bytes of its leaves."""
    total = hashlib.sha256()
    for leaf in leaves(value):
        total.update("\0".join(leaf).encode())
        total.update(b"\n")
    return total.hexdigest()


def sketch(tensors: Iterable[torch.Tensor]) -> str:
    """Returns a digest of some numbers of each tensor, evenly spread: quick, whatever their size.

    The numbers of a device are put together there, and copied to the host at once. Tensors that
    have none in memory are left out.
    """
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        spread = callable(getattr(tensor, "to_local", None))
        for part in dense(tensor.detach()) if spread or has_memory(tensor) else ():
            if has_memory(part):
                flat = part.reshape(-1)
                some = flat[:: -(-flat.numel() // _SKETCHED) or 1]
                found.setdefault((part.device, part.dtype), []).append(some)
    total = hashlib.sha256()
    for numbers in found.values():
        total.update(bytes_of(torch.cat(numbers)))
    return total.hexdigest()[:32]


def leaves(value: Any) -> Iterator[Leaf]:
    """Yields the leaves of a nest; what a mapping holds in the order of its keys as text."""
    for path, part in parts(value):
        yield leaf_of(path, part)


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what a nest's leaves are made from: the paths and the values.

    Of objects these are the attributes. What a nest holds a second time, and what is deeper than
    sixteen levels down, counts by its type.
    """
    return _parts(value, "", _DEPTH, set())


def _parts(value: Any, path: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, *_PLAIN)) or _is_flat(value):
        yield path, value
        return
    inner = _inner(value, path)
    if not inner or depth == 0 or id(value) in seen:
        yield path, _Opaque(type(value).__name__)
        return
    seen.add(id(value))
    for where, part in inner:
        yield from _parts(part, where, depth - 1, seen)


def _is_flat(value: Any) -> bool:
    """Tells whether a value is one leaf: an array, or a collection of plain values alone."""
    if isinstance(value, numpy.ndarray):
        return not value.dtype.hasobject
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(isinstance(item, _PLAIN) for item in value)
    return hasattr(type(value), "__array_interface__")


def _inner(value: Any, path: str) -> list[tuple[str, Any]]:
    """Returns what a value holds, with the paths."""
    if isinstance(value, Mapping):
        dotted = isinstance(value, Attributes)
        return [
            (f"{path}.{key}" if dotted else f"{path}[{key!r}]", value[key])
            for key in sorted(value, key=str)
        ]
    if isinstance(value, numpy.ndarray):
        value = value.tolist()
    if is_sequence(value):
        return [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (type, ModuleType)):
        return []
    return [(f"{path}.{name}", part) for name, part in _contents_of(value).items()]


class _Opaque(NamedTuple):
    """Stands for a value that nothing is known of but its type."""

    kind: str


def attributes_of(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object, by name: also those that it has slots for."""
    found = dict(own_attributes(value) or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name) and not name.startswith("__"):
                found[name] = getattr(value, name)
    return found


def _contents_of(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object that hold its contents, by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return attributes_of(value)


def leaf_of(path: str, value: Any) -> Leaf:
    """Returns the leaf that one of `parts` is."""
    total = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        for part in dense(value.detach()):
            total.update(bytes_of(part))
        shape = "nested" if value.is_nested else tuple(value.shape)
        kind = f"{str(value.dtype).removeprefix('torch.')} {shape}"
    elif isinstance(value, numpy.ndarray):
        total.update(_array_bytes(value))
        kind = f"{value.dtype} {value.shape} array"
    elif isinstance(value, _PLAIN):
        total.update(repr(value).encode())
        kind = type(value).__name__
    elif isinstance(value, _Opaque):
        kind = value.kind
    elif isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
        unordered = isinstance(value, (set, frozenset))
        total.update(repr(sorted(items, key=repr) if unordered else items).encode())
        # A list and a tuple are one: on its way a batch may become the other.
        kind = f"set of {len(items)}" if unordered else f"{len(items)} values"
    else:
        found = numpy.asarray(value)
        total.update(_array_bytes(found))
        kind = f"{type(value).__name__} of {found.dtype} {found.shape}"
    return Leaf(path, kind, total.hexdigest()[:32])


def dense(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns the tensors of contiguous numbers that a tensor of any layout is made of."""
    local: Any = getattr(tensor, "to_local", None)
    if callable(local):
        # A distributed one: the part that lies here.
        tensor = cast("torch.Tensor", local())
    if tensor.is_meta:
        return ()
    if tensor.is_nested:
        return [part for item in tensor.unbind() for part in dense(item)]
    if tensor.is_quantized:
        return (tensor.int_repr(),)
    if tensor.layout is torch.strided:
        return (tensor,)
    sparse: Any = tensor
    whole = sparse.to_sparse_coo().coalesce()
    return (whole.indices(), whole.values())


def bytes_of(tensor: torch.Tensor) -> Any:
    """Returns the bytes of a dense tensor, wherever it lies: as an array, or none."""
    return _on_host(tensor).view(torch.uint8).numpy() if tensor.numel() else b""


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a dense tensor's numbers, one after the other, on the host."""
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    return tensor.as_subclass(torch.Tensor).reshape(-1)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tells whether dense tensors of one shape and type are equal to the bit, wherever they lie."""
    ways = [(each.stride(), each.is_conj(), each.is_neg(), each.device) for each in (one, other)]
    if one.data_ptr() == other.data_ptr() != 0 and ways[0] == ways[1]:
        # An optimizer takes the loaded tensors themselves.
        return True
    first, second = _as_integers(_on_host(one), _on_host(other))
    # torch.equal would keep other threads waiting: it does not let go of the interpreter.
    return numpy.array_equal(first.numpy(), second.numpy())


def _as_integers(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # Eight bytes at a time: seven times as fast as one.
    for dtype in (torch.int64, torch.int32, torch.int16):
        wide = dtype.itemsize
        if all(t.nbytes % wide == 0 and t.data_ptr() % wide == 0 for t in (one, other)):
            try:
                return one.view(dtype), other.view(dtype)
            except RuntimeError:
                continue
    return one.view(torch.uint8), other.view(torch.uint8)


def _array_bytes(array: numpy.ndarray[Any, Any]) -> Any:
    if array.nbytes == 0:
        return b""
    return numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)


def same(one: Any, other: Any) -> bool:
    """Tells whether two nests are equal, to the bit and the type, wherever their tensors lie."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(dense(one.detach()), dense(other.detach()), strict=True)
        return all(a.shape == b.shape and same_bits(a, b) for a, b in pairs)
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping)
            and list(one) == list(other)
            and all(same(value, other[key]) for key, value in one.items())
        )
    if type(one) is not type(other):
        return False
    if is_sequence(one):
        # A list of a million numbers is looked at as a whole.
        kinds = {*map(type, one)}
        if len(one) != len(other) or kinds != {*map(type, other)}:
            return False
        if kinds == {float}:
            return numpy.array(one).tobytes() == numpy.array(other).tobytes()
        return one == other if kinds <= _EXACT else all(map(same, one, other))
    if isinstance(one, numpy.ndarray):
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        if one.dtype.hasobject:
            return same(one.tolist(), other.tolist())
        return numpy.array_equal(_array_bytes(one), _array_bytes(other))
    # NaN is not equal to itself, and zeros of both signs are.
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def differences(then: Iterable[Leaf], now: Iterable[Leaf]) -> Iterator[str]:
    """Yields what tells two nests apart, one phrase a leaf, in their order."""
    known = {leaf.path: leaf for leaf in then}
    for leaf in now:
        was = known.pop(leaf.path, None)
        name = leaf.path or "it"
        if was is None:
            yield f"{name} was not there"
        elif was.kind != leaf.kind:
            yield f"{name} was {was.kind} and is {leaf.kind}"
        elif was.digest != leaf.digest:
            yield f"{name} ({leaf.kind}) has other contents"
    for path in known:
        yield f"{path or 'it'} is not there any more"
