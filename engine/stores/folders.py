"""Which owner a place has: a folder on a disk, or one in a store."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

from crosstrain.engine.storage.folder import Folder
from crosstrain.engine.storage.local_folder import LocalFolder
from crosstrain.engine.storage.locations import Location

from .store_folder import StoreFolder


def folder_at(place: Location) -> Folder:
    """Returns the folder that is at a place.

    Args:
        place: a path, or a URL.

    Raises:
        CheckpointStoreMissing: if the package that reaches such a store is not installed.
        ValueError: if there is no such kind of store.
    """
    return LocalFolder(place) if isinstance(place, Path) else StoreFolder(place)


def open_place(place: Location) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Opens a file at a place, as one of this machine.

    Raises:
        CheckpointCorrupt: if it is no regular file.
        OSError: if it cannot be opened.
    """
    return folder_at(place.parent).open(place.name)
