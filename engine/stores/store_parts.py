"""A checkpoint in parts in a store: its files are put first, by all processes; its manifest last.

`checkpoint_5.sharded` is the manifest, an object like any other: it appears at once, and with it
the checkpoint. Its files are in the folder `checkpoint_5.NS.parts`, NS being when the manifest says
that it was saved. So a second checkpoint of the same name takes the place of the first at once, and
shares no file with it; and files whose manifest is not there are leftovers.

`StoreAside` is what becomes one, `StoreParts` one that is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

from crosstrain.engine.storage.atomic import Contents, fill_file
from crosstrain.engine.storage.errors import CheckpointCorrupt, CheckpointError
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.storage.manifest import INDEX, Manifest
from crosstrain.engine.storage.parts_files import (
    check_hash,
    check_manifest_size,
    check_size,
    folder_of_parts,
    told_of,
    whose_parts,
)

from .by_url import store_of
from .store import Store, temporary_file

# So many seconds a save that has failed tries to leave nothing; the next start does it, too.
_SHORT: Final = 2.0


class StoreParts:
    """The files of one that is there, each fetched and verified once; see `PartsFiles`.

    What was fetched is kept in files without names, which go with this object.

    Args:
        place: the folder that they are in.
        files: what the manifest tells of each.
    """

    # Each save has a folder of files of its own.
    can_be_replaced = False

    def __init__(self, place: StorePath, files: Mapping[str, tuple[int, str]]) -> None:
        self.place = place
        self._files = files
        self._store = store_of(place)
        self._kept: dict[str, int] = {}
        weakref.finalize(self, _close, self._kept)

    @contextlib.contextmanager
    def open(self, name: str) -> Generator[IO[bytes]]:
        """Opens a file, which is verified."""
        self.verify(name, self._files[name])
        os.lseek(self._kept[name], 0, os.SEEK_SET)
        with open(self._kept[name], "rb", closefd=False) as file:
            yield file

    def verify(self, name: str, told: tuple[int, str]) -> None:
        """Raises CheckpointCorrupt if a file is not what the manifest tells of it."""
        if name in self._kept:
            return
        where = self.place / name
        try:
            check_size(self._store.head(name).size, told, where)
            with temporary_file(told[0]) as file:
                self._store.fetch(name, told[0], file.fileno())
                file.seek(0)
                check_hash(file, told, where)
                self._kept[name] = os.dup(file.fileno())
        except FileNotFoundError:
            raise CheckpointCorrupt(f"{where} is missing") from None


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class StoreAside:
    """The files of this process, staged without names until they are uploaded; see `Aside`.

    Args:
        store: the folder of the checkpoints.
        manifest: what the new one says of itself, without its files.
        keep: makes sure that the folder is still this run's.
        put: does so, and puts an open file there under a name.
    """

    # What the disk of this machine holds is only on its way.
    flushes = False

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        keep: Callable[[], None],
        put: Callable[[str, int], None],
    ) -> None:
        self._store = store
        self._keep = keep
        self._manifest = manifest
        self._put = put
        self._parts: Store | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._committing = False

    @property
    def root(self) -> Path:
        """A name: there is no such folder on this machine."""
        return Path(self._manifest.file)

    @property
    def _there(self) -> Store:
        assert self._parts is not None
        return self._parts

    def begin(self, needed: int) -> str:
        """Makes the folder of the files, where the store has such; returns by what all join it."""
        self._keep()
        name = folder_of_parts(self._manifest.file, self._manifest.saved_at_ns)
        store_of(self._store.place / name).make()
        return name

    def join(self, token: str, needed: int, rank: int) -> None:
        """Looks whether there is room for what this process stages."""
        self._parts = store_of(self._store.place / token)
        temporary_file(needed).close()

    def _stage(self, name: str) -> IO[bytes]:
        file = self._files[name] = temporary_file(0)
        return file

    def create(self, name: str) -> IO[bytes]:
        """Opens a new file."""
        return open(os.dup(self._stage(name).fileno()), "wb")

    def take(self, files: Mapping[str, IO[bytes]]) -> None:
        """Takes open files of this machine for its own: they are put as they are."""
        self._files.update(files)

    def rename(self, name: str, new: str) -> None:
        """Renames a file."""
        self._files[new] = self._files.pop(name)

    def write(self, name: str, contents: Contents) -> tuple[int, str]:
        """Writes a file; returns its size and hash."""
        file = self._stage(name)
        fill_file(file.fileno(), contents)
        contents.check(file.fileno())
        return told_of(file)

    def deliver(self) -> None:
        """Uploads what this process has written; each file is compared with what is there then."""
        for name, file in self._files.items():
            _upload(self._there, name, file)

    def commit(self, index: bytes, manifest: Manifest) -> None:
        """Puts the index, looks that all is there, and puts the manifest."""
        self.close()
        with self.create(INDEX) as file:
            file.write(index)
        self.deliver()
        told = replace(manifest, files={**manifest.files, INDEX: told_of(self._files[INDEX])})
        self._look_for_all(told)
        with temporary_file(0) as file:
            file.write(told.encode())
            file.flush()
            self._committing = True
            self._put(told.file, file.fileno())
        # Those of one that had the name before.
        with contextlib.suppress(OSError):
            _remove_folders(self._store, _folders_of(self._store, told.file, told))

    def _look_for_all(self, manifest: Manifest) -> None:
        """Makes sure that what every process has put is in one and the same store."""
        there = {one.name: one.size for one in self._there.list()}
        for name, (size, _) in manifest.files.items():
            try:
                # A list may lag behind.
                found = there[name] if name in there else self._there.head(name).size
            except FileNotFoundError:
                found = -1
            if found != size:
                raise OSError(
                    errno.EIO,
                    f"{name} is not in {self._there.place} as a rank has put it: do all ranks reach"
                    " the same store",
                )

    def drop(self) -> None:
        """Removes what was uploaded, unless the manifest may be there; as far as that can be."""
        if self._parts is None or self._committing:
            return
        with contextlib.suppress(OSError):
            _remove_folder(self._parts.within(_SHORT))

    def close(self) -> None:
        """Frees what was staged."""
        for file in self._files.values():
            file.close()
        self._files = {}


def _upload(parts: Store, name: str, file: IO[bytes]) -> None:
    try:
        parts.upload(name, file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        why = f"uploading {name} it failed with {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, why) from None


def mend_parts(store: Store, manifest: Manifest, files: Mapping[str, IO[bytes]]) -> None:
    """Puts what is missing or has other bytes of a checkpoint in parts."""
    parts = store_of(store.place / folder_of_parts(manifest.file, manifest.saved_at_ns))
    parts.make()
    for name, file in files.items():
        if not parts.holds(name, file.fileno(), os.fstat(file.fileno()).st_size):
            _upload(parts, name, file)


def read_manifest(store: Store, name: str) -> Manifest:
    """Reads the manifest of a checkpoint in parts; FileNotFoundError if there is none."""
    check_manifest_size(store.head(name).size)
    return Manifest.decode(store.get(name))


def remove_parts(store: Store, name: str, keep: Callable[[], None]) -> None:
    """Removes a checkpoint in parts, if it is there: its manifest first, and with it its name.

    Args:
        store: the folder.
        name: of the checkpoint.
        keep: makes sure that the folder is still this run's.
    """
    try:
        manifest: Manifest | None = read_manifest(store, name)
    except FileNotFoundError:
        return
    except CheckpointError:
        manifest = None
    keep()
    folders = set(_folders_of(store, name))
    if manifest is not None:
        # A list may lag behind.
        folders.add(folder_of_parts(name, manifest.saved_at_ns))
    store.remove(name)
    _remove_folders(store, sorted(folders))


def remove_orphans(store: Store) -> int:
    """Removes files whose checkpoint was never completed, or is half removed; returns how many.

    Only call it while holding the folder: what another process is writing looks the same.
    """
    orphans: list[str] = []
    for one in store.list():
        owner = whose_parts(one.name) if one.is_folder else None
        if owner is None:
            continue
        try:
            saved_at_ns: int | None = read_manifest(store, owner[0]).saved_at_ns
        except FileNotFoundError:
            saved_at_ns = None
        except CheckpointError:
            continue
        if saved_at_ns != owner[1]:
            orphans.append(one.name)
    _remove_folders(store, orphans)
    return len(orphans)


def _folders_of(store: Store, name: str, kept: Manifest | None = None) -> list[str]:
    """Lists the folders of files of a checkpoint's name, but for those of one."""
    found = [(one.name, whose_parts(one.name)) for one in store.list() if one.is_folder]
    keep = None if kept is None else kept.saved_at_ns
    return [each for each, owner in found if owner and owner[0] == name and owner[1] != keep]


def _remove_folders(store: Store, names: list[str]) -> None:
    for name in names:
        _remove_folder(store_of(store.place / name))


def _remove_folder(folder: Store) -> None:
    for one in folder.list():
        folder.remove(one.name)
    folder.unmake()
