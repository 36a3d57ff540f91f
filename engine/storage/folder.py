"""What a folder of checkpoints can do, wherever it is: on a disk, or in a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from .archive import Readable
from .atomic import Contents
from .locations import Location
from .manifest import Manifest


@dataclass(frozen=True)
class Entry:
    """Something in a folder that is named like a checkpoint.

    Args:
        name: its name.
        is_file: whether it is a file.
        is_folder: whether it is a folder, or what stands for one in a store; what is neither cannot
            be a checkpoint.
        modified_ns: when it was written, in ns; 0 if that is not told.
        lost: why there is nothing behind its name; None if there is.
    """

    name: str
    is_file: bool
    is_folder: bool
    modified_ns: int = 0
    lost: str | None = None


def check_name(name: str) -> None:
    """Makes sure that a checkpoint can have a name, as a file in a folder, and is found there.

    Args:
        name: the name.

    Raises:
        ValueError: if it cannot.
    """
    why = ""
    if not name:
        why = "it is empty"
    elif "/" in name or os.sep in name:
        why = "it leads into another folder: give that to DiskSaver, and the name without it"
    elif "\0" in name:
        why = "no file system has names with that character"
    elif name.startswith("."):
        why = "what begins with a dot is hidden, and no start would find it"
    if why:
        raise ValueError(
            f"{name!r} cannot be the name of a checkpoint: {why}. It is made of filename_prefix, "
            "filename_pattern and the names in to_save"
        )


class Claim(Protocol):
    """A folder that belongs to this process, as far as that can be made sure."""

    removed: Sequence[str]

    def renew(self) -> None:
        """Makes sure that it still does.

        Raises:
            CheckpointBusy: if another process has it by now.
            OSError: if that cannot be found out.
        """
        ...

    def release(self) -> None:
        """Gives it up; another holder in this process keeps it."""
        ...


class Aside(Protocol):
    """Where the files of a checkpoint in parts are until it has its name.

    Every process has one: the first begins, all join, each writes its files and delivers them, and
    the first commits.
    """

    #: Whether what is written has to be flushed.
    flushes: bool

    @property
    def root(self) -> Path:
        """The folder, as torch's writer is told it."""
        ...

    def begin(self, needed: int) -> str:
        """Makes what all processes share; returns by what the others join it.

        Args:
            needed: the bytes of all files, at most.

        Raises:
            OSError: if that cannot be.
        """
        ...

    def join(self, token: str, needed: int, rank: int) -> None:
        """Takes part.

        Args:
            token: what `begin` has returned.
            needed: the bytes of this process's files, at most.
            rank: of this process.

        Raises:
            OSError: if it cannot.
        """
        ...

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a new file for writing."""
        ...

    def rename(self, name: str, new: str) -> None:
        """Renames a file of this process."""
        ...

    def write(self, name: str, contents: Contents) -> tuple[int, str]:
        """Writes a file; returns its size and hash.

        Raises:
            OSError: if a step is refused.
            CheckpointError: what the check raises.
        """
        ...

    def deliver(self) -> None:
        """Brings this process's files to where the others see them.

        Raises:
            OSError: if that cannot be.
        """
        ...

    def commit(self, index: bytes, manifest: Manifest) -> None:
        """Gives the checkpoint its name, when all have delivered; called in the first process.

        Args:
            index: what its index says.
            manifest: what it says of itself and all files but the index.

        Raises:
            OSError: if that cannot be.
            CheckpointBusy: if another run has the folder by now.
        """
        ...

    def drop(self) -> None:
        """Removes what there is of it; called in the first process, where one has failed."""
        ...

    def close(self) -> None:
        """Frees what this process has open."""
        ...


class Folder(Protocol):
    """A folder of checkpoints."""

    @property
    def place(self) -> Location:
        """Where it is."""
        ...

    def check_name(self, name: str) -> None:
        """Makes sure that a checkpoint can have a name here.

        Raises:
            ValueError: if it cannot.
        """
        ...

    def make(self) -> None:
        """Makes it, if it is not there.

        Raises:
            OSError: if that cannot be.
        """
        ...

    def exists(self) -> bool:
        """Tells whether it is there; of a store, whether something can be put there."""
        ...

    def claim(self) -> Claim:
        """Takes it for this process, and removes what a killed one has left half written.

        Raises:
            CheckpointBusy: if another process has it.
            OSError: if that cannot be.
        """
        ...

    def entries(self, endings: tuple[str, ...]) -> list[Entry]:
        """Lists what is named like a checkpoint, by the endings, in the order of the names.

        Raises:
            FileNotFoundError: if there is no such folder.
            OSError: if it cannot be read.
        """
        ...

    def write(self, name: str, contents: Contents) -> None:
        """Writes a file so that at any moment its name stands for a whole file or for none.

        Raises:
            CheckpointWriteError: if a step is refused; says which, and why.
        """
        ...

    def aside(self, manifest: Manifest) -> Aside:
        """Returns where the files of a new checkpoint in parts go first.

        Args:
            manifest: what it says of itself, without its files.
        """
        ...

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Opens a file as one of this machine, with a descriptor.

        Raises:
            CheckpointCorrupt: if it is no regular file.
            OSError: if it cannot be opened.
        """
        ...

    def peek(self, name: str) -> AbstractContextManager[Readable]:
        """Opens a file of which little is to be read.

        Raises:
            CheckpointCorrupt: if it is no regular file.
            OSError: if it cannot be opened.
        """
        ...

    def remove(self, name: str) -> None:
        """Removes a file, if it is there; a folder of its name is left alone.

        Raises:
            OSError: if it cannot be removed.
        """
        ...

    def remove_parts(self, name: str) -> None:
        """Takes a checkpoint's name away at once, if it is there, then its parts.

        Raises:
            OSError: if it cannot be removed.
        """
        ...
