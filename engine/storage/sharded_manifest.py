"""What a sharded checkpoint says of itself: the manifest of its files, the index of its tensors.

`torch.distributed.checkpoint` keeps that index as a bare pickle, `.metadata`, and loading a pickle
runs whatever its author chose. It is written, so that torch's own tools can read the folder, and
never read here: what it says is in `index.json` too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Final

import torch

from crosstrain.engine.guards import is_exact_dict, is_exact_list

from .errors import CheckpointCorrupt
from .manifest import Manifest

__all__ = [
    "INDEX",
    "MANIFEST",
    "Chunk",
    "Entry",
    "ShardedManifest",
    "decode_index",
    "encode_index",
    "hash_file",
    "rank_file",
]

MANIFEST: Final = "manifest.json"
INDEX: Final = "index.json"
METADATA: Final = ".metadata"
_FORMAT: Final = "crosstrain sharded checkpoint"
_SCHEMA: Final = 1
_DIGEST_MARK: Final = b"\nsha256:"
_SHARD: Final = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rank_file(rank: int) -> str:
    """Returns the name of the file with what is a rank's own."""
    return f"rank-{rank}.pt"


@dataclass(frozen=True)
class ShardedManifest:
    """What a sharded checkpoint says of itself.

    Args:
        folder: the name under which it was written.
        files: the size in bytes and the sha256 of each file in it but this one.
        saved_at_ns: when it was written; see `Manifest`, as for all that follow.
        objects: the names of the saved objects.
        iteration: completed iterations.
        epoch: the epoch.
        backend: the backend's spec.
        world_size: how many processes wrote it.
        versions: of Python and packages.
    """

    folder: str
    files: Mapping[str, tuple[int, str]]
    saved_at_ns: int
    objects: tuple[str, ...]
    iteration: int | None = None
    epoch: int | None = None
    backend: str | None = None
    world_size: int = 1
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def encode(self) -> bytes:
        """Returns the manifest as text in ASCII, closed by its own hash."""
        values = {"format": _FORMAT, "schema": _SCHEMA, **asdict(self)}
        text = json.dumps(values, indent=1).encode("ascii")
        return text + _DIGEST_MARK + hashlib.sha256(text).hexdigest().encode("ascii") + b"\n"

    @classmethod
    def decode(cls, encoded: bytes) -> ShardedManifest:
        """Reads what `encode` returned.

        Raises:
            CheckpointCorrupt: if a byte of it is not as it was written, or it lists what cannot be
                in such a checkpoint.
        """
        text, _, digest = encoded.rpartition(_DIGEST_MARK)
        if digest != hashlib.sha256(text).hexdigest().encode("ascii") + b"\n":
            raise CheckpointCorrupt("its manifest is damaged (its own hash does not fit)")
        values = _json(text, "manifest")
        if values.get("format") != _FORMAT or values.get("schema") != _SCHEMA:
            raise CheckpointCorrupt(
                f"its manifest has format {values.get('format')!r} and schema "
                f"{values.get('schema')!r}, and this version of crosstrain reads {_FORMAT!r}, "
                f"schema {_SCHEMA}: install the version that wrote it"
            )
        names = {item.name for item in fields(cls)}
        if set(values) != names | {"format", "schema"}:
            wrong = sorted(map(str, set(values) ^ (names | {"format", "schema"})))
            raise CheckpointCorrupt(f"its manifest has missing or unknown entries: {wrong}")
        made = cls(
            **{name: values[name] for name in names - {"files", "objects"}},
            files=_files(values["files"]),
            objects=tuple(values["objects"]) if is_exact_list(values["objects"]) else (),
        )
        made.summary()
        return made

    def summary(self) -> Manifest:
        """Returns what both kinds of checkpoint say of themselves, checked.

        Raises:
            CheckpointCorrupt: if an entry is not what it should be, or a rank's file is missing.
        """
        told = Manifest(
            file=self.folder,
            size=self.size,
            sha256=hashlib.sha256(json.dumps(asdict(self)["files"]).encode()).hexdigest(),
            saved_at_ns=self.saved_at_ns,
            objects=self.objects,
            iteration=self.iteration,
            epoch=self.epoch,
            backend=self.backend,
            world_size=self.world_size,
            versions=self.versions,
        )
        # Reading it back checks the type and the range of each entry.
        checked = Manifest.decode(told.encode())
        if not 1 <= self.world_size <= len(self.files):
            raise CheckpointCorrupt(f"its manifest speaks of {self.world_size} processes")
        needed = {INDEX, METADATA, *map(rank_file, range(self.world_size))}
        if missing := sorted(needed - set(self.files)):
            raise CheckpointCorrupt(f"its manifest lacks the file {missing[0]}")
        return checked


def _json(text: bytes, what: str) -> dict[str, Any]:
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"its {what} is no JSON text ({error})") from None
    if not is_exact_dict(values):
        raise CheckpointCorrupt(f"its {what} is no JSON object")
    return values


def _files(values: Any) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for name, entry in values.items() if is_exact_dict(values) else ():
        size, digest = entry if is_exact_list(entry) and len(entry) == 2 else (None, None)
        plain = name in (INDEX, METADATA) or _SHARD.fullmatch(name)
        if not (plain or re.fullmatch(r"rank-[0-9]{1,9}\.pt", name)):
            raise CheckpointCorrupt(f"its manifest lists the file {name!r}, which none has")
        if type(size) is not int or size < 0 or type(digest) is not str:
            raise CheckpointCorrupt(f"its manifest tells no size and hash of {name}")
        if not _SHA256.fullmatch(digest):
            raise CheckpointCorrupt(f"its manifest tells no sha256 of {name}")
        found[name] = (size, digest)
    return found


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
    """Reads what `encode_index` returned, and holds it against the files.

    Args:
        encoded: the text.
        files: the checkpoint's files, with their sizes.

    Raises:
        CheckpointCorrupt: if a tensor's parts do not make it up, or are not in those files.
    """
    return {name: _entry(name, value, files) for name, value in _json(encoded, "index").items()}


def _entry(name: str, value: Any, files: Mapping[str, tuple[int, str]]) -> Entry:
    values = value if is_exact_dict(value) else {}
    dtype = getattr(torch, str(values.get("dtype")), None)
    chunks = values.get("chunks")
    if not (isinstance(dtype, torch.dtype) and is_exact_list(chunks)):
        raise CheckpointCorrupt(f"its index tells no dtype and parts of {name!r}")
    size = _shape(values.get("size"), name)
    found: list[Chunk] = []
    for chunk in chunks:
        parts: list[Any] = chunk if is_exact_list(chunk) and len(chunk) == 5 else [None] * 5
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
    if type(chunk.file) is not str or not _SHARD.fullmatch(chunk.file) or chunk.file not in files:
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
    if not is_exact_list(value) or any(type(n) is not int or n < 0 for n in value):
        raise CheckpointCorrupt(f"its index tells no shape of {name!r}")
    return tuple(value)
