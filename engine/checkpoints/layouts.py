"""The two forms of a checkpoint, one file and a folder of parts; and a list of those there are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from crosstrain.engine.formats.safe_load import LoadedFile, load_file, verify_file
from crosstrain.engine.parts.fill import filled
from crosstrain.engine.parts.read import Parts, is_in_parts, own_states
from crosstrain.engine.storage.archive import read_comment
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    lack_of,
)
from crosstrain.engine.storage.folder import Entry
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.parts_files import ENDING
from crosstrain.engine.stores.folders import folder_at


class _File:
    """One file, which ends with its manifest."""

    ending = ".pt"

    def is_one(self, entry: Entry) -> bool:
        """Tells whether what has such a name can be one, by its kind of file."""
        return entry.is_file

    def manifest(self, path: Location) -> Manifest:
        """Reads what a checkpoint says of itself, and nothing else."""
        with folder_at(path.parent).peek(path.name) as file:
            comment = read_comment(file)
        if comment:
            return Manifest.decode(comment)
        raise CheckpointCorrupt(
            "it has no manifest, because another program wrote it; load it by its path if you "
            "trust it to be whole"
        )

    def verify(self, path: Location) -> Manifest | None:
        """Checks that every byte is as it was written."""
        return verify_file(path)

    def read(self, path: Location) -> LoadedFile:
        """Reads all of it into memory, verified, on the CPU."""
        return load_file(path)


class _Parts:
    """A folder into which each process has written what it held; see `store_parts` for a store.

    What it tells is what `_File` tells.
    """

    ending = ENDING

    def path_of(self, folder: Location, filename: str) -> Location:
        """Returns where the checkpoint lies that was saved under a file's name."""
        return folder / (Path(filename).stem + ENDING)

    def is_one(self, entry: Entry) -> bool:
        return entry.is_folder

    def manifest(self, path: Location) -> Manifest:
        return Parts.open(path).manifest

    def verify(self, path: Location) -> Manifest:
        return Parts.verified(path).manifest

    def read(self, path: Location) -> LoadedFile:
        found = Parts.verified(path)
        states, places, _ = own_states(found, 0)
        return LoadedFile(found.path, found.manifest, filled(found, states, places, {}))


FILE = _File()
PARTS = _Parts()
Layout = _File | _Parts
_LAYOUTS: tuple[Layout, ...] = (FILE, PARTS)


def layout_of(path: Location) -> Layout:
    """Returns the form that a checkpoint has: by what is at its path; in a store, by its name."""
    return PARTS if is_in_parts(path) else FILE


def is_there(parts: Location) -> bool:
    """Tells whether there is a checkpoint in parts, good or damaged."""
    try:
        PARTS.manifest(parts)
    except CheckpointError as error:
        return not isinstance(error, CheckpointNotFound)
    return True


def is_checkpoint(path: Location) -> bool:
    """Tells whether a path is to be looked at as a checkpoint, and not as a folder of them."""
    if isinstance(path, Path):
        return not path.is_dir() or is_in_parts(path)
    return path.name.endswith(endings()) or is_in_parts(path)


class Told(NamedTuple):
    """A checkpoint of a folder: its path, its form, and what it says of itself, or why nothing."""

    path: Location
    layout: Layout
    manifest: Manifest | CheckpointError
    modified_ns: int = 0


def endings() -> tuple[str, ...]:
    """Returns how the names of checkpoints end."""
    return tuple(layout.ending for layout in _LAYOUTS)


def list_checkpoints(folder: Location, names: re.Pattern[str] | None = None) -> list[Told]:
    """Lists the checkpoints of a folder, newest first, with what each says of itself.

    Only the manifests are read. Those that do not tell their age, because theirs is missing or
    damaged, come first, by their time on the disk: they may be the newest.

    Args:
        folder: the folder.
        names: which names, without their endings, are looked at; all, by default.

    Raises:
        CheckpointNotFound: if there is no such folder.
        CheckpointCorrupt: if this machine has not what it takes to read it, or one in it: it may be
            the newest good one.
    """
    try:
        present = folder_at(folder).entries(endings())
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no folder {folder}") from None
    except OSError as error:
        kind = CheckpointCorrupt if lack_of(error) else CheckpointNotFound
        text = f"{folder} cannot be read as a folder: {error.strerror or error}"
        raise kind(text) from error
    found: list[Told] = []
    for entry in present:
        layout = next(layout for layout in _LAYOUTS if entry.name.endswith(layout.ending))
        if names is None or names.fullmatch(entry.name.removesuffix(layout.ending)):
            told = _told(folder / entry.name, layout, entry)
            if told is not None:
                found.append(told)
    return newest_first(found)


def newest_first(listed: Iterable[Told]) -> list[Told]:
    """Sorts checkpoints as `list_checkpoints` does; of the same age, the first stays the first."""
    return sorted(listed, key=_age, reverse=True)


def _told(path: Location, layout: Layout, entry: Entry) -> Told | None:
    doubt: CheckpointError
    if entry.lost is not None:
        return Told(path, layout, CheckpointCorrupt(entry.lost), entry.modified_ns)
    if not layout.is_one(entry):
        return None
    try:
        return Told(path, layout, layout.manifest(path), entry.modified_ns)
    except CheckpointError as error:
        if lack_of(error):
            raise
        doubt = error
    except FileNotFoundError:
        return None
    except OSError as error:
        if lack_of(error):
            text = f"{path} cannot be read: {error.strerror or error}"
            raise CheckpointCorrupt(text) from error
        doubt = CheckpointCorrupt(f"it cannot be read: {error.strerror or error}")
    return Told(path, layout, doubt, entry.modified_ns)


def _age(told: Told) -> tuple[bool, int, str]:
    if isinstance(told.manifest, Manifest) and told.manifest.is_believable:
        return False, told.manifest.saved_at_ns, told.path.name
    return True, told.modified_ns, told.path.name


def newest_time(listed: list[Told]) -> int:
    """Returns when the newest checkpoint of a list was saved, in ns; 0 if none tells."""
    told = [one.manifest for one in listed if isinstance(one.manifest, Manifest)]
    return max((one.saved_at_ns for one in told if one.is_believable), default=0)


def doubt_of(told: Told, objects: Collection[str] = ()) -> str | None:
    """Returns why a checkpoint is not what is looked for, with these objects; None if it may be."""
    manifest: Any = told.manifest
    if not isinstance(manifest, Manifest):
        return str(manifest)
    if not manifest.is_believable:
        return "it says that it was saved in a far future"
    if manifest.file != told.path.name:
        return f"it was saved as {manifest.file}: it was renamed, or two were swapped"
    missing = [name for name in objects if name not in manifest.objects]
    return f"it does not hold {', '.join(missing)}" if missing else None
