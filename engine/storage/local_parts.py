"""A checkpoint in parts on a disk: its files go into a folder aside, which then gets its name.

`LocalAside` is that folder while it is written, `LocalParts` when it is read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import IO

from crosstrain.engine.errors import warn_user

from .atomic import Contents, check_free_space, flush_folder, open_regular, write_file
from .errors import CheckpointCorrupt, CheckpointWarning, CheckpointWriteError
from .leftovers import ASIDE, PARTS, new_name
from .manifest import INDEX, MANIFEST, Manifest
from .parts_files import MAX_MANIFEST, check_hash, check_manifest_size, check_size, told_at


class LocalParts:
    """The files of one that is there; see `PartsFiles`."""

    # By a save under the same name, which gives that to another folder.
    can_be_replaced = True

    def __init__(self, place: Path) -> None:
        self.place = place

    def manifest(self) -> Manifest:
        """Reads what it says of itself; FileNotFoundError if nothing."""
        with self.open(MANIFEST) as file:
            encoded = file.read(MAX_MANIFEST + 1)
        check_manifest_size(len(encoded))
        return Manifest.decode(encoded)

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Opens a file, which is not verified; raises as `open_regular` does."""
        return open_regular(self.place / name, linked=False)

    def verify(self, name: str, told: tuple[int, str]) -> None:
        """Raises CheckpointCorrupt if a file is not what the manifest tells of it."""
        path = self.place / name
        found = path.lstat().st_size
        if path.is_symlink() or not path.is_file():
            raise CheckpointCorrupt(f"{path} is no file, but a link or a folder")
        check_size(found, told, path)
        with self.open(name) as file:
            check_hash(file, told, path)


class LocalAside:
    """A folder aside, on a file system that all processes see; see `Aside`."""

    # What is behind the manifest has to be on the disk before it.
    flushes = True

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._path: Path | None = None

    @property
    def root(self) -> Path:
        """The folder, as torch's writer is told it."""
        assert self._path is not None
        return self._path

    def begin(self, needed: int) -> str:
        """Makes it, where so many bytes are free; returns by what the others join it."""
        path = self._folder / new_name(PARTS)
        check_free_space(path, needed)
        path.mkdir()
        return path.name

    def join(self, token: str, needed: int, rank: int) -> None:
        """Looks that it is there."""
        self._path = self._folder / token
        if not self._path.is_dir():
            raise CheckpointWriteError(
                f"{self._path} was made by rank 0 and is not there for rank {rank}: save into a "
                "folder on a file system that all processes share"
            )

    def create(self, name: str) -> IO[bytes]:
        """Opens a new file."""
        return (self.root / name).open("wb")

    def rename(self, name: str, new: str) -> None:
        """Renames a file."""
        os.rename(self.root / name, self.root / new)

    def write(self, name: str, contents: Contents) -> tuple[int, str]:
        """Writes a file; returns its size and hash."""
        path = self.root / name
        write_file(path, contents)
        return told_at(path)

    def deliver(self) -> None:
        """Does nothing: the files are where they belong."""

    def commit(self, index: bytes, manifest: Manifest) -> None:
        """Writes index and manifest, and gives the folder its name, when all have delivered."""
        aside, folder = self.root, self._folder
        _write_flushed(aside / INDEX, index)
        found = {INDEX: told_at(aside / INDEX)}
        # The manifest vouches for what is on the disk, so all else is flushed before it.
        flush_folder(aside)
        told = replace(manifest, files={**manifest.files, **found})
        _write_flushed(aside / MANIFEST, told.encode())
        flush_folder(aside)
        target = folder / self._name
        kept = folder / f"{ASIDE}{self._name}"
        with contextlib.suppress(FileNotFoundError):
            # A folder cannot be renamed over one that is not empty. The next start puts this one
            # back, if this process is killed before the new one has the name.
            os.rename(target, kept)
        os.rename(aside, target)
        flush_folder(folder)
        _remove_aside(kept, target)

    def drop(self) -> None:
        """Removes it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)

    def close(self) -> None:
        """Does nothing: nothing is open."""


def _remove_aside(kept: Path, target: Path) -> None:
    """Removes what had the name before, if anything; the new one is saved, come what may."""
    leftover = kept.with_name(new_name(PARTS))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.rename(kept, leftover)
            shutil.rmtree(leftover)
    except OSError as error:
        warn_user(
            f"Checkpoint {target} is saved, and the one that had its name before could not be "
            f"removed: {error.strerror or error}. What is left of it is {leftover.name}; the next "
            "start in this folder tries again",
            CheckpointWarning,
        )


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
