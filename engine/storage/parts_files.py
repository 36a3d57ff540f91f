"""The files of a checkpoint in parts: what their folder is called, and how they are hashed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from blake3 import blake3

from .atomic import open_regular
from .errors import CheckpointCorrupt
from .locations import Location

#: So begins the hash of a file; manifests of schema 1 have its sha256, without a beginning.
BLAKE3: Final = "blake3:"
# So many bytes are in a core's cache from when they are read until they are hashed.
_PIECE: Final = 1 << 19

#: How the name of a checkpoint in parts ends.
ENDING: Final = ".sharded"
#: A manifest lists a file or two of each process, and the names of the objects.
MAX_MANIFEST: Final = 64 << 20
_FOLDER: Final = re.compile(r"(.+)\.([0-9]{1,19})\.parts", re.DOTALL)


def folder_of_parts(name: str, saved_at_ns: int) -> str:
    """Returns what the folder of a checkpoint's files is called in a store.

    By the name and the time of its manifest: two that are saved under one name share no file.
    """
    return f"{name.removesuffix(ENDING)}.{saved_at_ns}.parts"


def whose_parts(folder: str) -> tuple[str, int] | None:
    """Returns what `folder_of_parts` was given; None if it has not made the name."""
    found = _FOLDER.fullmatch(folder)
    return (found[1] + ENDING, int(found[2])) if found else None


class PartsHash:
    """Hashes a file while it is written."""

    def __init__(self) -> None:
        self._hash = blake3()

    def update(self, data: memoryview) -> None:
        """Takes the next bytes."""
        self._hash.update(data)

    def told(self) -> str:
        """Returns the hash of what was taken so far, as a manifest tells it."""
        return BLAKE3 + self._hash.hexdigest()


def _hash(file: IO[bytes]) -> str:
    made = PartsHash()
    _feed(made.update, file)
    return made.told()


def has_hash(file: IO[bytes], told: str) -> bool:
    """Tells whether an open file, from its position on, has the hash that a manifest tells."""
    if told.startswith(BLAKE3):
        return _hash(file) == told
    digest = hashlib.sha256()
    _feed(digest.update, file)
    return digest.hexdigest() == told


def check_size(found: int, told: tuple[int, str], path: Location) -> None:
    """Raises CheckpointCorrupt if a file has another number of bytes than the manifest tells."""
    if found != told[0]:
        raise CheckpointCorrupt(
            f"{path} is damaged: it has {found:,} bytes and was written with {told[0]:,}"
        )


def check_manifest_size(size: int) -> None:
    """Raises CheckpointCorrupt if a manifest has more bytes than any that is written."""
    if size > MAX_MANIFEST:
        raise CheckpointCorrupt(f"its manifest has more than {MAX_MANIFEST:,} bytes")


def check_hash(file: IO[bytes], told: tuple[int, str], path: Location) -> None:
    """Raises CheckpointCorrupt if an open file, from its position on, has another hash."""
    if not has_hash(file, told[1]):
        raise CheckpointCorrupt(
            f"{path} is damaged, or of another checkpoint: its hash is not the one that the "
            "manifest tells"
        )


def _feed(update: Callable[[memoryview], object], file: IO[bytes]) -> None:
    buffer = memoryview(bytearray(_PIECE))
    opened: Any = file
    while count := opened.readinto(buffer):
        update(buffer[:count])


def told_of(file: IO[bytes]) -> tuple[int, str]:
    """Returns size and hash of an open file, as a manifest tells them."""
    file.seek(0)
    return os.fstat(file.fileno()).st_size, _hash(file)


def told_at(path: Path) -> tuple[int, str]:
    """Returns size and hash of a file, as a manifest tells them; raises as `open_regular` does."""
    with open_regular(path, linked=False) as file:
        return told_of(file)
