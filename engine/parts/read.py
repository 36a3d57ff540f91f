"""Reading a checkpoint in parts: a folder into which each process has written what it holds.

Verified first, and no code is run: what is not plain is refused, as in a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosstrain.engine.formats.safe_load import load_file
from crosstrain.engine.ranks.line import Line
from crosstrain.engine.spread import at_path
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    lack_of,
)
from crosstrain.engine.storage.locations import Location, StorePath, location_of
from crosstrain.engine.storage.manifest import INDEX, MANIFEST, Manifest, rank_file
from crosstrain.engine.storage.parts_files import ENDING
from crosstrain.engine.stores.folders import PartsFiles, folder_at

from .index import Entry, decode_index

Place = tuple[tuple[Any, ...], str]


def is_in_parts(path: str | os.PathLike[str]) -> bool:
    """Tells whether a path is a folder that is, or calls itself, a checkpoint in parts.

    Nothing is asked of a store: its name tells it there.
    """
    folder = location_of(path)
    if isinstance(folder, StorePath):
        return folder.name.endswith(ENDING)
    # Not the path's own is_dir, which raises where the ending makes a name too long.
    return os.path.isdir(folder) and (folder.name.endswith(ENDING) or (folder / MANIFEST).is_file())


@dataclass(frozen=True)
class Parts:
    """A checkpoint in parts, as far as its manifest tells."""

    #: Its folder; in a store, its manifest, which stands for it.
    path: Location
    manifest: Manifest
    #: Opened by their names; those of a store are fetched and verified the first time.
    files: PartsFiles = field(compare=False, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Parts:
        """Reads the manifest, and nothing else.

        Raises:
            CheckpointNotFound: if there is no such folder, or it has no manifest.
            CheckpointCorrupt: if the manifest is damaged.
        """
        place = location_of(path)
        try:
            manifest, files = folder_at(place.parent).parts(place.name)
            if not manifest.in_parts:
                raise CheckpointCorrupt("its manifest is that of a checkpoint in one file")
            return cls(place, manifest, files)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_manifest(place) from None
        except OSError as error:
            where = place / MANIFEST if isinstance(place, Path) else place
            raise CheckpointCorrupt(f"{where} cannot be read: {error.strerror or error}") from error
        except CheckpointError as error:
            raise CheckpointCorrupt(f"{place} is not a good checkpoint: {error}") from None

    @classmethod
    def verified(cls, path: str | os.PathLike[str], line: Line | None = None) -> Parts:
        """Opens and verifies a checkpoint; the processes of a line share the work.

        Raises:
            CheckpointError: in all of them the same, what one finds: what it lacks comes first.
        """
        error: CheckpointError | None = None
        found: Parts | None = None
        try:
            found = cls.open(path)
            found.verify((0, 1) if line is None else (line.rank, line.size))
            found.index()
        except CheckpointError as caught:
            error = caught
        mine = None if error is None else (str(error), lack_of(error))
        told = [mine]
        if line is not None:
            told = line.meet(f"verifying {location_of(path).name}", mine, of=line.everyone)
        bad = [(rank, *one) for rank, one in enumerate(told) if one is not None]
        if not bad:
            assert found is not None
            return found
        rank, text, lack = next((one for one in bad if one[2]), bad[0])
        if error is not None and (line is None or rank == line.rank):
            raise error
        cause = OSError(lack, os.strerror(lack)) if lack else None
        raise CheckpointCorrupt(f"{text} (found by rank {rank})") from cause

    def verify(self, share: tuple[int, int] = (0, 1)) -> None:
        """Checks that each file is there and as it was written.

        Args:
            share: (r, n): process r of n checks its share. Where n processes have written it, that
                is what r has written: the same that it is about to read. Of a store, what is
                checked is fetched, and kept.
        """
        rank, size = share
        for name in sorted(self.manifest.files):
            if writer_of(name) % size != rank:
                continue
            path = self.files.place / name
            try:
                self.files.verify(name, self.manifest.files[name])
            except FileNotFoundError:
                raise CheckpointCorrupt(f"{path} is missing") from None
            except OSError as error:
                raise CheckpointCorrupt(
                    f"{path} cannot be read: {error.strerror or error}"
                ) from error

    def check_same(self) -> None:
        """Makes sure, when all was read, that it was all of one checkpoint.

        Files are found by the folder's name, which a save under the same name gives to another. Not
        in a store: there they have a folder of their own, and each was held against its hash.
        """
        if self.files.can_be_replaced and Parts.open(self.path).manifest != self.manifest:
            raise CheckpointCorrupt(
                f"{self.path} was replaced by another checkpoint while it was being read: what was "
                "read may be of both. Load it again, into new objects"
            )

    def index(self) -> dict[str, Entry]:
        """Returns the index of the spread tensors, held against the files."""
        try:
            with self.files.open(INDEX) as file:
                encoded = file.read(self.manifest.files[INDEX][0])
            return decode_index(encoded, self.manifest.files)
        except OSError as error:
            raise CheckpointCorrupt(
                f"{self.files.place / INDEX} cannot be read: {error.strerror or error}"
            ) from error
        except CheckpointCorrupt as error:
            raise CheckpointCorrupt(f"{self.path} is not a good checkpoint: {error}") from None


def _no_manifest(place: Location) -> CheckpointNotFound:
    if not isinstance(place, Path):
        return CheckpointNotFound(
            f"There is no checkpoint {place}: its manifest would have that name, and is put last"
        )
    return CheckpointNotFound(
        f"{place} is no checkpoint in parts: there is no {MANIFEST} in it. A folder "
        "without one was not written by DiskSaver, or not to its end"
    )


def writer_of(name: str) -> int:
    """Returns which process has written a file of a checkpoint in parts."""
    number = re.match(r"(?:__|rank-)([0-9]+)", name)
    return int(number[1]) if number else 0


def own_states(
    found: Parts, rank: int
) -> tuple[dict[str, Any], list[Place], dict[tuple[Any, ...], list[str]]]:
    """Returns a rank's states without spread tensors, where these belong, and names."""
    first: Any = _rank_states(found, 0)
    own: Any = first if rank == 0 else _rank_states(found, rank)
    try:
        states = own["states"]
        if not isinstance(states, Mapping):
            raise TypeError("its states are not by name")
        for path in own["same"]:
            # What is as in rank 0 is stored there only.
            container, key = at_path(states, tuple(path))
            source, _ = at_path(first["states"], tuple(path))
            container[key] = source[key]
        places = [(tuple(path), str(name)) for path, name in own["places"]]
        names = {tuple(path): list(map(str, names)) for path, names in own["names"]}
        for path, _ in places:
            container, key = at_path(states, path)
            container[key] = None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointCorrupt(
            f"{found.files.place / rank_file(rank)} is not what DiskSaver writes "
            f"({type(error).__name__}: {error})"
        ) from None
    return dict(states), places, names


def _rank_states(found: Parts, rank: int) -> Any:
    path = found.files.place / rank_file(rank)
    if isinstance(path, Path):
        return load_file(path).state
    with found.files.open(path.name) as file:
        return load_file(path, opened=file).state
