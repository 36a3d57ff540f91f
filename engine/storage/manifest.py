"""The manifest: what a checkpoint says of itself, and how it proves that it is whole.

Of a checkpoint in one file it is part of that file, as the comment at the end of the zip archive
that `torch.save` writes: `torch.load` passes over it, `unzip -z FILE` prints it. So a checkpoint is
one file with one rename that makes it valid, it can be copied and renamed with its proof, and
writing over a file of the same name leaves no moment at which file and manifest do not fit. A
checkpoint in parts is a folder, and its manifest a file in it, which lists the others.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import torch

from .errors import CheckpointContentError, CheckpointCorrupt
from .parts_files import BLAKE3
from .tree_hash import LEAF, MAX_BLOCKS, Tree

# The files of a checkpoint in parts, besides the parts of tensors and each process's own.
MANIFEST: Final = "manifest.json"
INDEX: Final = "index.json"
METADATA: Final = ".metadata"
PART: Final = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
_OWN: Final = re.compile(r"rank-[0-9]{1,9}\.pt")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_OF_FILE: Final = re.compile(f"(?:{BLAKE3})?[0-9a-f]{{64}}")

MAX_MANIFEST_BYTES = 65_535
_FORMAT = "crosstrain checkpoint"
_PARTS_FORMAT = "crosstrain sharded checkpoint"
# 2 has the hashes of blocks, as `tree_hash` makes them; of parts, those that `parts_files` makes.
_SCHEMA = 1
_NEW_SCHEMA = 2
_END_OF_TIME = 2**63
_DIGEST_MARK = b"\nsha256:"
# No clock is wrong by more: what tells a later time was not saved then.
_YEAR_NS = 366 * 24 * 3600 * 10**9


def rank_file(rank: int) -> str:
    """Returns the name of the file, in a checkpoint in parts, with what is a rank's own."""
    return f"rank-{rank}.pt"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        file: the name under which the file, or the folder, was written.
        size: the bytes that `sha256` covers: the file without its manifest; of parts, all files.
        sha256: their hash, in hexadecimal: the root of the tree of blocks; in files of schema 1
            that of all bytes; of parts, that of the list of their hashes.
        saved_at_ns: when it was written, in nanoseconds since 1970; never less than that of another
            checkpoint that was in the folder before.
        objects: the names of the saved objects.
        bare: whether the file holds the state of its one object itself, not a dictionary of names.
        iteration: completed iterations of the engine that saved; None where nobody told.
        epoch: its epoch.
        backend: the backend's name; None without one.
        world_size: the number of processes of the run.
        rank: which of them wrote the file; parts are written by all of them.
        versions: of Python and the packages that decide what a state means.
        block_size: the bytes of a block; 0 in files of schema 1, and of parts.
        blocks: the hash of each block, as of `tree_hash`.
        files: of a checkpoint in parts, the size and the hash of each file but the manifest.
    """

    file: str
    size: int
    sha256: str
    saved_at_ns: int
    objects: tuple[str, ...]
    bare: bool = False
    iteration: int | None = None
    epoch: int | None = None
    backend: str | None = None
    world_size: int = 1
    rank: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    block_size: int = 0
    blocks: tuple[str, ...] = ()
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    @property
    def in_parts(self) -> bool:
        """Whether the checkpoint is a folder of parts."""
        return bool(self.files)

    @property
    def is_believable(self) -> bool:
        """Whether the time at which it says that it was saved is not in the far future."""
        return self.saved_at_ns < time.time_ns() + _YEAR_NS

    @property
    def tree(self) -> Tree | None:
        """The hashes of the file; None in files of schema 1, and of parts."""
        return Tree(self.size, self.block_size, self.blocks) if self.blocks else None

    def with_tree(self, tree: Tree) -> Manifest:
        """Returns the manifest of a file that has these hashes."""
        return replace(
            self,
            size=tree.size,
            sha256=tree.root,
            block_size=tree.block_size,
            blocks=tree.blocks,
        )

    def encode(self) -> bytes:
        """Returns the manifest as text in ASCII, closed by its own hash.

        Raises:
            CheckpointContentError: if the names of the objects make it longer than a zip comment
                may be.
        """
        values = asdict(self)
        files = values.pop("files")
        if not self.blocks:
            del values["block_size"], values["blocks"]
        new = bool(self.blocks) or any(told.startswith(BLAKE3) for _, told in self.files.values())
        schema = _NEW_SCHEMA if new else _SCHEMA
        if self.in_parts:
            for name in ("size", "sha256", "bare", "rank"):
                del values[name]
            told = {"format": _PARTS_FORMAT, "schema": schema, "folder": values.pop("file")}
            return _closed({**told, "files": files, **values})
        encoded = _closed({"format": _FORMAT, "schema": schema, **values})
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise CheckpointContentError(
                f"The names of {len(self.objects)} objects make a manifest of {len(encoded)} bytes;"
                f" {MAX_MANIFEST_BYTES} is the most. Save fewer objects, each holding several."
            )
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Manifest:
        """Reads what `encode` returned.

        Raises:
            CheckpointCorrupt: if a byte of it is not as it was written, or its schema is newer.
        """
        text, _, digest = encoded.rpartition(_DIGEST_MARK)
        if digest != hashlib.sha256(text).hexdigest().encode("ascii") + b"\n":
            raise CheckpointCorrupt("its manifest is damaged (its own hash does not fit)")
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointCorrupt(f"its manifest is no JSON text ({error})") from None
        values = values if type(values) is dict else {}
        if values.get("format") == _PARTS_FORMAT:
            return _of_parts(values)
        return cls(**_checked(values))


def _closed(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, indent=1).encode("ascii")
    return text + _DIGEST_MARK + hashlib.sha256(text).hexdigest().encode("ascii") + b"\n"


def _of_parts(values: dict[str, Any]) -> Manifest:
    """Returns the manifest of a checkpoint in parts, if it lists what one has and no more."""
    _check_schema(values)
    files = _files(values.get("files"))
    listed = {name: list(entry) for name, entry in files.items()}
    kept = {name: value for name, value in values.items() if name not in ("files", "folder")}
    whole: dict[str, Any] = {
        **kept,
        "format": _FORMAT,
        # Of parts, the schemas differ in their files' hashes only.
        "schema": _SCHEMA,
        "file": values.get("folder"),
        "size": sum(size for size, _ in files.values()),
        "sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "bare": False,
        "rank": 0,
    }
    made = Manifest(**_checked(whole), files=files)
    if not 1 <= made.world_size <= len(files):
        raise CheckpointCorrupt(f"its manifest speaks of {made.world_size} processes")
    needed = {INDEX, METADATA, *map(rank_file, range(made.world_size))}
    if missing := sorted(needed - set(files)):
        raise CheckpointCorrupt(f"its manifest lacks the file {missing[0]}")
    return made


def _files(values: Any) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
    for name, entry in values.items() if type(values) is dict else ():
        size, digest = entry if type(entry) is list and len(entry) == 2 else (None, None)
        if not (name in (INDEX, METADATA) or PART.fullmatch(name) or _OWN.fullmatch(name)):
            raise CheckpointCorrupt(f"its manifest lists the file {name!r}, which none has")
        if type(size) is not int or not 0 <= size < 2**63 or type(digest) is not str:
            raise CheckpointCorrupt(f"its manifest tells no size and hash of {name}")
        if not _OF_FILE.fullmatch(digest):
            raise CheckpointCorrupt(f"its manifest tells no hash of {name}")
        found[name] = (size, digest)
    return found


_KINDS: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "size": (int,),
    "sha256": (str,),
    "saved_at_ns": (int,),
    "objects": (list,),
    "bare": (bool,),
    "iteration": (int, type(None)),
    "epoch": (int, type(None)),
    "backend": (str, type(None)),
    "world_size": (int,),
    "rank": (int,),
    "versions": (dict,),
}
_KINDS_OF_BLOCKS: dict[str, tuple[type, ...]] = {"block_size": (int,), "blocks": (list,)}


def _check_schema(values: dict[str, Any]) -> int:
    schema = values.get("schema")
    if type(schema) is not int or schema not in (_SCHEMA, _NEW_SCHEMA):
        raise CheckpointCorrupt(
            f"its manifest has schema {schema!r} and this version of crosstrain reads schemas "
            f"{_SCHEMA} and {_NEW_SCHEMA}: install the version that wrote it, or a newer one"
        )
    return schema


def _checked(decoded: dict[str, Any]) -> dict[str, Any]:
    values = decoded
    if values.get("format") != _FORMAT:
        raise CheckpointCorrupt(f"its manifest is not one of a {_FORMAT}")
    in_blocks = _check_schema(values) == _NEW_SCHEMA
    kinds_of = {**_KINDS, **(_KINDS_OF_BLOCKS if in_blocks else {})}
    names = set(kinds_of)
    if set(values) != names | {"format", "schema"}:
        wrong = sorted(map(str, set(values) ^ (names | {"format", "schema"})))
        raise CheckpointCorrupt(f"its manifest has missing or unknown entries: {wrong}")
    for name, kinds in kinds_of.items():
        if type(values[name]) not in kinds:
            raise CheckpointCorrupt(f"its manifest's {name!r} is of type {type(values[name])}")
    texts: list[Any] = [*values["objects"], *values["versions"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointCorrupt("its manifest's names and versions are not all text")
    for name in ("size", "saved_at_ns", "iteration", "epoch", "world_size", "rank"):
        if not 0 <= (values[name] or 0) < _END_OF_TIME:
            raise CheckpointCorrupt(f"its manifest's {name!r} is {values[name]}, which cannot be")
    if values["rank"] >= values["world_size"]:
        raise CheckpointCorrupt(
            f"its manifest says rank {values['rank']} of {values['world_size']} processes"
        )
    found = {name: values[name] for name in names}
    if in_blocks:
        found["blocks"] = _blocks(values)
    return {**found, "objects": tuple(values["objects"])}


def _blocks(values: dict[str, Any]) -> tuple[str, ...]:
    """Returns the hashes of a file's blocks, if they are those of a file of this size and hash."""
    size, told, block_size = values["size"], values["blocks"], values["block_size"]
    many = block_size // LEAF
    fits = 0 < block_size < _END_OF_TIME and block_size == many * LEAF
    fits = fits and many & (many - 1) == 0 and 0 < len(told) <= MAX_BLOCKS
    if not fits or len(told) != -(-size // block_size):
        raise CheckpointCorrupt(
            f"its manifest tells {len(told)} blocks of {block_size} bytes, and {size:,} in all"
        )
    for digest in told:
        if type(digest) is not str or not _SHA256.fullmatch(digest):
            raise CheckpointCorrupt("its manifest tells a block's hash that is no sha256")
    if Tree(size, block_size, tuple(told)).root != values["sha256"]:
        raise CheckpointCorrupt("its manifest's hash is not that of its blocks")
    return tuple(told)


def software_versions() -> dict[str, str]:
    """Returns the versions that decide what a saved state means."""
    # torch's own word for its version: it tells builds apart, which a package's metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("crosstrain", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def later_than(earlier_ns: int) -> int:
    """Returns the time in nanoseconds, or the next one where the clock has been set back."""
    now = time.time_ns()
    return max(now, earlier_ns + 1) if earlier_ns < now + _YEAR_NS else now
