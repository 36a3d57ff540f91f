"""A folder of checkpoints in a store, where the disk of this machine is only passed through.

What is written is staged in an unnamed file among the temporary ones (`TMPDIR`), which the system
frees however this process ends; so is what is read. That is one checkpoint at a time, and the free
space is looked at first.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Generator, Mapping
from typing import IO, Any, Final

from crosstrain.engine.storage.atomic import Contents, fill_file
from crosstrain.engine.storage.errors import CheckpointError, CheckpointWriteError
from crosstrain.engine.storage.folder import Entry, check_name
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.parts_files import ENDING, folder_of_parts

from .by_url import store_of
from .lease import Lease
from .store import Store, Stored, temporary_file
from .store_parts import (
    StoreAside,
    StoreParts,
    mend_parts,
    read_manifest,
    remove_orphans,
    remove_parts,
)

#: Names the checkpoints that were put: a list of a store may lag behind what is in it.
SAVED: Final = ".crosstrain.saved"
_MOST_NAMES: Final = 100
# Of one that is replaced again and again while it is read.
_TRIES: Final = 3


class StoreFolder:
    """A folder in a store, as fsspec reaches them; made, it raises as `store_of` does.

    What it does is what `LocalFolder` does, and more.
    """

    def __init__(self, place: StorePath) -> None:
        self.place = place
        self._store = store_of(place)
        self._lease: Lease | None = None

    def check_name(self, name: str) -> None:
        """Raises ValueError if a checkpoint cannot have a name here."""
        check_name(name)
        if "?" in name:
            raise ValueError(
                f"{name!r} cannot be the name of a checkpoint in {self.place}: in a URL, what is "
                "behind a ? is no part of the name. Leave it out of filename_prefix, "
                "filename_pattern and the names in to_save"
            )

    def make(self) -> None:
        """Makes it, if it is not there."""
        self._store.make()

    def exists(self) -> bool:
        """Tells whether something can be put there."""
        return True

    def claim(self) -> int:
        """Takes it for this process, and removes what killed ones have left; returns how many.

        Raises:
            CheckpointBusy: if another process has it.
        """
        self._lease = Lease(self._store)
        if not self._lease.first:
            return 0
        return self._store.end_uploads() + remove_orphans(self._store)

    def renew(self) -> None:
        """Does nothing: each write asks the store, in whichever thread it is."""

    def release(self) -> None:
        """Gives it up; another holder in this process keeps it."""
        if self._lease is not None:
            self._lease.release()

    def entries(self, endings: tuple[str, ...]) -> list[Entry]:
        """Lists what is named like a checkpoint."""
        there = {one.name: one for one in self._store.list()}
        for name in self._saved():
            if name not in there:
                with contextlib.suppress(FileNotFoundError):
                    there[name] = self._store.head(name)
        return [
            _entry(name, one)
            for name, one in sorted(there.items())
            if name.endswith(endings) and not name.startswith(".")
        ]

    def _saved(self) -> list[str]:
        try:
            values: Any = json.loads(self._store.get(SAVED))
        except (FileNotFoundError, ValueError):
            return []
        names: list[Any] = values if type(values) is list else []
        return [name for name in names if type(name) is str and name and "/" not in name]

    def write(self, name: str, contents: Contents) -> None:
        """Writes a file, whole or not at all."""
        place = self.place / name
        with _step("staging", place), temporary_file(contents.needed) as file:
            fill_file(file.fileno(), contents)
            with _step("reading back", place):
                contents.check(file.fileno())
            self.copy(name, file.fileno())

    def copy(self, name: str, descriptor: int) -> None:
        """Puts an open file of this machine, whole or absent; an error says whether it is saved."""
        with _step("looking who else saves there, before uploading", self.place / name):
            self._keep()
        with _step("uploading", self.place / name):
            self._store.upload(name, descriptor, os.fstat(descriptor).st_size)
        self._note(name)

    def _note(self, name: str) -> None:
        """Notes the name of what was put, for lists that lag behind."""
        try:
            saved = [name, *(one for one in self._saved() if one != name)][:_MOST_NAMES]
            self._store.put(SAVED, json.dumps(saved).encode())
        except OSError as error:
            place = self.place / name
            raise CheckpointWriteError(
                f"Checkpoint {place} is saved, but noting its name in {SAVED} failed with "
                f"{error.strerror or error}: where the store's lists lag behind, it may not be "
                "found for a while",
                error,
                place,
                is_saved=True,
            ) from None

    def holds(self, name: str, descriptor: int) -> bool:
        """Tells whether a file of a name is there, with the bytes of an open one."""
        return self._store.holds(name, descriptor, os.fstat(descriptor).st_size)

    def _keep(self) -> None:
        if self._lease is not None:
            self._lease.renew()

    def aside(self, manifest: Manifest) -> StoreAside:
        """Returns where the files of a new checkpoint in parts go first."""
        return StoreAside(self._store, manifest, self._keep, self.copy)

    def parts(self, name: str) -> tuple[Manifest, StoreParts]:
        """Opens a checkpoint in parts: reads what it says of itself, and nothing else."""
        manifest = read_manifest(self._store, name)
        files = self.place / folder_of_parts(name, manifest.saved_at_ns)
        return manifest, StoreParts(files, manifest.files)

    @contextlib.contextmanager
    def open(self, name: str) -> Generator[IO[bytes]]:
        """Opens a file as one of this machine, with a descriptor; OSError if it cannot be."""
        for tries_left in reversed(range(_TRIES)):
            told = self._file(name)
            with temporary_file(told.size) as file:
                try:
                    self._store.fetch(name, told.size, file.fileno())
                    is_same = self._file(name).version == told.version
                except OSError:
                    # It may have been replaced by a shorter one.
                    if not tries_left or self._file(name).version == told.version:
                        raise
                    is_same = False
                if is_same or not tries_left:
                    yield file
                    return

    def _file(self, name: str) -> Stored:
        told = self._store.head(name)
        if told.is_folder:
            raise IsADirectoryError(f"{self.place / name} is a folder")
        return told

    @contextlib.contextmanager
    def peek(self, name: str) -> Generator[_Peek]:
        """Opens a file of which little is to be read."""
        yield _Peek(self._store, name, self._file(name).size)

    def has_manifest(self, manifest: Manifest) -> bool:
        """Tells whether a checkpoint in parts is there that says the same of its files."""
        try:
            there = read_manifest(self._store, manifest.file)
        except (OSError, CheckpointError):
            # Whatever it was, it is not known to be good.
            return False
        return there.saved_at_ns == manifest.saved_at_ns and there.files == manifest.files

    def mend_parts(self, manifest: Manifest, files: Mapping[str, IO[bytes]]) -> None:
        """Puts what is missing or has other bytes of a checkpoint in parts that is there."""
        self._keep()
        mend_parts(self._store, manifest, files)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        self._keep()
        self._store.remove(name)

    def remove_parts(self, name: str) -> None:
        """Takes a checkpoint's name away at once, if it is there, then its parts."""
        remove_parts(self._store, name, self._keep)


@contextlib.contextmanager
def _step(step: str, place: StorePath) -> Generator[None]:
    """Says in which step of saving a checkpoint something was refused."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        why = f"{step} it failed with {error.strerror or error}"
        raise CheckpointWriteError.of(place, why, error) from None


class _Peek:
    """A file of a store, of which few bytes are fetched."""

    def __init__(self, store: Store, name: str, length: int) -> None:
        self._store = store
        self._name = name
        self.length = length

    def read(self, count: int, at: int) -> bytes:
        """Reads bytes at a position: fewer where the file ends."""
        end = min(at + count, self.length)
        if not 0 <= at < end:
            return b""
        return self._store.get(self._name, at, end)


def _entry(name: str, one: Stored) -> Entry:
    # The manifest of one in parts stands for the folder that it would be on a disk.
    is_parts = name.endswith(ENDING) and not one.is_folder
    is_file = not (one.is_folder or is_parts)
    return Entry(name, is_file, is_parts, int(one.modified * 1e9))
