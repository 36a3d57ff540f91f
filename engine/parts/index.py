"""The index of a checkpoint in parts: which part of which tensor lies where in which file.

`torch.distributed.checkpoint` keeps that as a bare pickle, `.metadata`, and loading a pickle runs
whatever its author chose. It is written, so that torch's own tools can read the folder, and never
read here: what it says is in `index.json` too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch

from crosstrain.engine.storage.errors import CheckpointCorrupt
from crosstrain.engine.storage.manifest import PART


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor: where it begins in it, its shape, and where in which file it is."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int
    length: int


@dataclass(frozen=True)
class Entry:
    """A tensor that lies in parts."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def encode_index(entries: Mapping[str, Entry]) -> bytes:
    """Returns the index as JSON text."""
    values = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "size": entry.size,
            "chunks": [list(vars(chunk).values()) for chunk in entry.chunks],
        }
        for name, entry in entries.items()
    }
    return json.dumps(values).encode("ascii")


def decode_index(encoded: bytes, files: Mapping[str, tuple[int, str]]) -> dict[str, Entry]:
    """Reads what `encode_index` returned, and holds it against the checkpoint's files.

    Raises:
        CheckpointCorrupt: if a tensor's parts do not make it up, or are not in those files.
    """
    try:
        values: Any = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"its index is no JSON text ({error})") from None
    if type(values) is not dict:
        raise CheckpointCorrupt("its index is no JSON object")
    return {name: _entry(name, value, files) for name, value in values.items()}


def _entry(name: str, value: Any, files: Mapping[str, tuple[int, str]]) -> Entry:
    values = value if type(value) is dict else {}
    dtype = getattr(torch, str(values.get("dtype")), None)
    chunks = values.get("chunks")
    if not (isinstance(dtype, torch.dtype) and type(chunks) is list):
        raise CheckpointCorrupt(f"its index tells no dtype and parts of {name!r}")
    size = _shape(values.get("size"), name)
    found: list[Chunk] = []
    for chunk in chunks:
        parts: list[Any] = chunk if type(chunk) is list and len(chunk) == 5 else [None] * 5
        made = Chunk(_shape(parts[0], name), _shape(parts[1], name), *parts[2:])
        _check_place(name, made, size, dtype, files)
        found.append(made)
    if sum(math.prod(chunk.sizes) for chunk in found) != math.prod(size) or _overlap(found):
        raise CheckpointCorrupt(f"the parts of {name!r} in its index do not make it up")
    return Entry(dtype, size, tuple(found))


def _check_place(
    name: str,
    chunk: Chunk,
    size: tuple[int, ...],
    dtype: torch.dtype,
    files: Mapping[str, tuple[int, str]],
) -> None:
    lies_in = len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
        begin + length <= whole
        for begin, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True)
    )
    if not lies_in:
        raise CheckpointCorrupt(f"a part of {name!r} in its index reaches beyond it")
    if type(chunk.file) is not str or not PART.fullmatch(chunk.file) or chunk.file not in files:
        raise CheckpointCorrupt(
            f"its index places a part of {name!r} in {chunk.file!r}, which is none of its files"
        )
    numbers = type(chunk.at) is int and type(chunk.length) is int
    if not (numbers and 0 <= chunk.at <= chunk.at + chunk.length <= files[chunk.file][0]):
        raise CheckpointCorrupt(f"its index places a part of {name!r} beyond {chunk.file}")
    # So no index makes a load take more memory than the files have bytes.
    if math.prod(chunk.sizes) * dtype.itemsize > chunk.length:
        raise CheckpointCorrupt(f"a part of {name!r} is larger than its place in {chunk.file}")


def _overlap(chunks: list[Chunk]) -> bool:
    """Tells whether two parts hold the same element."""
    filled = sorted((c for c in chunks if math.prod(c.sizes)), key=lambda c: c.offsets)
    rows = {(chunk.offsets[1:], chunk.sizes[1:]) for chunk in filled}
    if len(rows) == 1 and filled[0].sizes:
        # Cut along the first dimension only, as FSDP does: neighbours are all that can overlap.
        return any(a.offsets[0] + a.sizes[0] > b.offsets[0] for a, b in pairwise(filled))
    return any(
        all(
            max(p, q) < min(p + n, q + m)
            for p, n, q, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
        )
        for a, b in combinations(filled, 2)
    )


def _shape(value: Any, name: str) -> tuple[int, ...]:
    if type(value) is not list or any(type(n) is not int or not 0 <= n < 2**63 for n in value):
        raise CheckpointCorrupt(f"its index tells no shape of {name!r}")
    return tuple(value)
