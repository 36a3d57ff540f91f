"""Digests of tensors that are computed where the tensors are, and read later, many at once.

The digest of a tensor is a multilinear hash (Carter and Wegman 1979; Lemire and Kaser, "Strongly
universal string hashing is fast", 2014): the bits of each element, as an integer, times an odd
64-bit constant that follows from its position, summed modulo 2**64. Integer sums do not depend on
their order, so every device gives the same digest for the same bits. A change of one element always
changes it; a change of several goes unseen with a chance of about 2**-63, and of 2**-32 where
nothing but the highest bits of 32-bit elements changes. It is no protection against an adversary.

`crosstrain.engine.digest` takes SHA-256, for which every tensor is copied to the host: too slow for
a trace, which takes a digest of everything in each iteration.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Final

import numpy
import torch

from crosstrain.engine.digest import dense, leaf_of, parts
from crosstrain.engine.splitmix import mix_into, word

# Elements that are multiplied at once: the table of constants and the products take 8 MiB each.
_CHUNK: Final = 1 << 20
_SMALLEST: Final = 1 << 12
_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _constants(first: int, count: int) -> list[int]:
    """Returns the splitmix64 numbers of positions, made odd, as signed integers."""
    words = numpy.arange(first + 1, first + count + 1, dtype=numpy.uint64)
    mix_into(words, numpy.empty_like(words), word(0), words)
    words |= numpy.uint64(1)
    found: list[int] = words.view(numpy.int64).tolist()
    return found


class Digester:
    """Computes digests of tensors on their devices, and keeps the constants that it takes there."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, torch.Tensor] = {}

    def digest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the digest of a tensor's elements, of 64 bits, unread, on the same device.

        A sparse tensor is taken by its indices and values, a distributed one by its local part.
        `salt` tells the shape and the dtype.
        """
        with torch.no_grad():
            # Values come before indices.
            total, *more = (self._dense(part) for part in reversed(dense(tensor.detach())))
            for number, part in enumerate(more):
                total = total + part * _chunk_constant(number)
            return total

    def _dense(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.resolve_neg()
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        flat = tensor.reshape(-1)
        bits = flat.view(_BITS[flat.element_size()])
        count = bits.numel()
        table = self._table(bits.device, min(count, _CHUNK))
        if count <= _CHUNK:
            # An integer of fewer bits is widened within the product.
            return (bits * table[:count]).sum()
        total = (bits[:_CHUNK] * table).sum()
        for number, start in enumerate(range(_CHUNK, count, _CHUNK)):
            chunk = bits[start : start + _CHUNK]
            product = (chunk * table[: chunk.numel()]).sum()
            total = total + product * _chunk_constant(number)
        return total

    def _table(self, device: torch.device, count: int) -> torch.Tensor:
        table = self._tables.get(device)
        if table is None or table.numel() < count:
            size = _SMALLEST
            while size < count:
                size *= 2
            table = torch.tensor(_constants(0, size), dtype=torch.int64).to(device)
            self._tables[device] = table
        return table


@functools.lru_cache(10_000)
def _chunk_constant(number: int) -> int:
    return _constants((1 << 40) + number, 1)[0]


def salt(tensor: torch.Tensor) -> int:
    """Returns a number that tells a tensor's shape and dtype, to be added to its digest."""
    return kept_digest(f"{tensor.dtype}{tuple(tensor.shape)}")


def text_digest(text: str | bytes) -> int:
    """Returns 64 bits of BLAKE2b of a text, or of bytes."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


#: The same, of short texts that come again in each iteration.
kept_digest = functools.lru_cache(10_000)(text_digest)


def tensors_of(value: Any) -> tuple[list[torch.Tensor], int]:
    """Takes a nest of anything apart, such as a batch.

    Returns:
        The tensors in it, in their order, and a digest of everything else: of where they are, and
        of plain values. Arrays of numbers are given as tensors.
    """
    tensors: list[torch.Tensor] = []
    rest: list[str] = []
    for path, part in parts(value):
        if isinstance(part, torch.Tensor):
            tensors.append(part)
            rest.append(path)
        elif isinstance(part, numpy.ndarray) and part.dtype.kind in "biufc" and part.dtype.isnative:
            # A copy: torch warns of arrays that cannot be written to, and refuses negative strides.
            tensors.append(torch.from_numpy(part.copy()))
            rest.append(f"{path} array")
        else:
            rest.append(repr(leaf_of(path, part)))
    return tensors, text_digest("\n".join(rest))
