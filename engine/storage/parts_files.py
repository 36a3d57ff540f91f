"""The files of a checkpoint in parts: what their folder is called, and how they are hashed."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import IO, Final

from .atomic import open_regular

__all__ = ["ENDING", "MAX_MANIFEST", "folder_of_parts", "hash_file", "hash_open", "whose_parts"]

#: How the name of a checkpoint in parts ends.
ENDING: Final = ".sharded"
#: A manifest lists a file or two of each process, and the names of the objects.
MAX_MANIFEST: Final = 64 << 20
_FOLDER: Final = re.compile(r"(.+)\.([0-9]{1,19})\.parts", re.DOTALL)


def folder_of_parts(name: str, saved_at_ns: int) -> str:
    """Returns what the folder of the files is called in a store.

    Args:
        name: the checkpoint's, which is that of its manifest.
        saved_at_ns: as its manifest tells: two that are saved under one name share no file.
    """
    return f"{name.removesuffix(ENDING)}.{saved_at_ns}.parts"


def whose_parts(folder: str) -> tuple[str, int] | None:
    """Returns what `folder_of_parts` was given; None if it has not made the name."""
    found = _FOLDER.fullmatch(folder)
    return (found[1] + ENDING, int(found[2])) if found else None


def hash_open(file: IO[bytes]) -> str:
    """Returns the sha256 of an open file from its position on, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal.

    Raises:
        CheckpointCorrupt: if it is no regular file.
        OSError: if it cannot be read.
    """
    with open_regular(path, linked=False) as file:
        return hash_open(file)
