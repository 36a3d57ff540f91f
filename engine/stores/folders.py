"""Which kind of folder a place has: one on a disk, or one in a store. Both can do the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

from crosstrain.engine.storage.local_folder import LocalFolder
from crosstrain.engine.storage.local_parts import LocalAside, LocalParts
from crosstrain.engine.storage.locations import Location

from .store_folder import StoreFolder
from .store_parts import StoreAside, StoreParts

Folder = LocalFolder | StoreFolder
#: Where the files of a checkpoint in parts are until it has its name. Every process has one: the
#: first begins, all join, each writes its files and delivers them, and the first commits.
Aside = LocalAside | StoreAside
#: The files of a checkpoint in parts that is there: each is opened, and verified, by its name.
PartsFiles = LocalParts | StoreParts


def folder_at(place: Location) -> Folder:
    """Returns the folder that is at a place; of a URL, raises as `store_of` does."""
    return LocalFolder(place) if isinstance(place, Path) else StoreFolder(place)


def open_place(place: Location) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Opens a file at a place, as one of this machine; raises as `open_regular` does."""
    return folder_at(place.parent).open(place.name)
