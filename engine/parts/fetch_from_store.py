"""The files of a checkpoint in parts that is in a store: each fetched once, verified, and kept."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Generator, Mapping
from typing import IO

from crosstrain.engine.storage.errors import CheckpointCorrupt
from crosstrain.engine.storage.locations import StorePath
from crosstrain.engine.storage.parts_files import check_hash, check_size
from crosstrain.engine.stores.by_url import store_of
from crosstrain.engine.stores.temporary import temporary_file


class Fetched:
    """What this process has needed so far, in files without names that go with this object.

    Args:
        place: the folder of the files.
        files: the size and the hash of each.
    """

    def __init__(self, place: StorePath, files: Mapping[str, tuple[int, str]]) -> None:
        self.place = place
        self._files = files
        self._store = store_of(place)
        self._kept: dict[str, int] = {}
        weakref.finalize(self, _close, self._kept)

    @contextlib.contextmanager
    def open(self, name: str) -> Generator[IO[bytes]]:
        """Opens a file; the first time, it is fetched and verified.

        Raises:
            CheckpointCorrupt: if it is not there as it was written.
            OSError: if the store cannot be read, or there is no room for it.
        """
        if name not in self._kept:
            self._fetch(name)
        os.lseek(self._kept[name], 0, os.SEEK_SET)
        with open(self._kept[name], "rb", closefd=False) as file:
            yield file

    def _fetch(self, name: str) -> None:
        told = self._files[name]
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
