"""The two forms of a checkpoint, one file and a folder of parts; and a list of those there are."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from crosstrain.engine.errors import warn_user
from crosstrain.engine.storage.archive import read_archive
from crosstrain.engine.storage.atomic import open_regular, remove_leftover
from crosstrain.engine.storage.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointWarning,
    CheckpointWriteError,
)
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.parts_read import ENDING, Parts, is_in_parts, own_states
from crosstrain.engine.storage.parts_write import ASIDE, LEFTOVER
from crosstrain.engine.storage.safe_load import LoadedFile, load_file, verify_file

from .parts import filled

__all__ = [
    "FILE",
    "PARTS",
    "Layout",
    "Told",
    "doubt_of",
    "layout_of",
    "list_checkpoints",
    "names_in",
    "newest_time",
]

_logger = logging.getLogger(__name__)


class Layout(Protocol):
    """What a checkpoint looks like on the disk, and what can be asked of it by its path."""

    ending: str

    def path_of(self, folder: Path, filename: str) -> Path:
        """Returns where the checkpoint lies that was saved under a name."""
        ...

    def is_one(self, path: Path, mode: int) -> bool:
        """Tells whether what has such a name can be one, by its kind of file."""
        ...

    def manifest(self, path: Path) -> Manifest:
        """Reads what a checkpoint says of itself, and nothing else.

        Raises:
            CheckpointError: if it says nothing that can be read.
            OSError: likewise.
        """
        ...

    def verify(self, path: Path) -> Manifest | None:
        """Checks that every byte is as it was written.

        Raises:
            CheckpointError: if one is not.
        """
        ...

    def read(self, path: Path) -> LoadedFile:
        """Reads all of it into memory, verified, on the CPU.

        Raises:
            CheckpointError: if it is damaged, or not safe.
        """
        ...

    def remove(self, path: Path) -> None:
        """Removes a checkpoint, if it is there.

        Raises:
            CheckpointWriteError: if it cannot be removed.
        """
        ...


class _File:
    """One file, which ends with its manifest."""

    ending = ".pt"

    def path_of(self, folder: Path, filename: str) -> Path:
        return folder / filename

    def is_one(self, path: Path, mode: int) -> bool:
        return stat.S_ISREG(mode)

    def manifest(self, path: Path) -> Manifest:
        with open_regular(path) as file:
            comment = read_archive(file.fileno()).comment
        if comment:
            return Manifest.decode(comment)
        raise CheckpointCorrupt(
            "it has no manifest, because another program wrote it; load it by its path if you "
            "trust it to be whole"
        )

    def verify(self, path: Path) -> Manifest | None:
        return verify_file(path)

    def read(self, path: Path) -> LoadedFile:
        return load_file(path)

    def remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except IsADirectoryError:
            return
        except OSError as error:
            raise CheckpointWriteError(
                f"Old checkpoint {path} could not be removed: {error.strerror or error}. The new "
                "one is saved",
                error,
                path,
            ) from error


class _Parts:
    """A folder into which each process has written what it held."""

    ending = ENDING

    def path_of(self, folder: Path, filename: str) -> Path:
        return folder / (Path(filename).stem + ENDING)

    def is_one(self, path: Path, mode: int) -> bool:
        return stat.S_ISDIR(mode)

    def manifest(self, path: Path) -> Manifest:
        return Parts.open(path).manifest

    def verify(self, path: Path) -> Manifest:
        found = Parts.open(path)
        found.verify()
        found.index()
        return found.manifest

    def read(self, path: Path) -> LoadedFile:
        found = Parts.open(path)
        found.verify()
        states, places, _ = own_states(found, 0)
        return LoadedFile(found.path, found.manifest, filled(found, states, places, {}))

    def remove(self, path: Path) -> None:
        """Takes a checkpoint's name away at once, then its files; a warning if it cannot."""
        aside = path.with_name(f"{LEFTOVER[0]}{secrets.token_hex(8)}{LEFTOVER[1]}")
        try:
            os.rename(path, aside)
            shutil.rmtree(aside)
        except FileNotFoundError:
            return
        except OSError as error:
            # No error: it would end this process only, and the others would wait for it.
            warn_user(
                f"Old checkpoint {path} could not be removed: {error.strerror or error}. The new "
                "one is saved",
                CheckpointWarning,
            )

    def remove_leftovers(self, folder: Path) -> list[str]:
        """Removes what killed processes have left, and puts back what was set aside for a moment.

        Only call it while holding the folder's lock.
        """
        removed: list[str] = []
        for entry in sorted(folder.iterdir()):
            home = folder / entry.name.removeprefix(ASIDE)
            if entry.name.startswith(ASIDE) and not home.exists():
                os.rename(entry, home)
            elif entry.name.startswith(ASIDE) or (
                entry.name.startswith(LEFTOVER[0]) and entry.name.endswith(LEFTOVER[1])
            ):
                remove_leftover(entry)
                removed.append(entry.name)
        return removed


FILE = _File()
PARTS = _Parts()
_LAYOUTS: tuple[Layout, ...] = (FILE, PARTS)


def layout_of(path: Path) -> Layout:
    """Returns the form that a checkpoint has, by what is at its path."""
    return PARTS if is_in_parts(path) else FILE


class Told(NamedTuple):
    """A checkpoint of a folder: its path, its form, and what it says of itself, or why nothing."""

    path: Path
    layout: Layout
    manifest: Manifest | CheckpointError


def names_in(folder: Path) -> list[str]:
    """Returns the names of the checkpoints in a folder, by their endings."""
    endings = tuple(layout.ending for layout in _LAYOUTS)
    return sorted(
        name for name in os.listdir(folder) if name.endswith(endings) and not name.startswith(".")
    )


def list_checkpoints(folder: Path, names: re.Pattern[str] | None = None) -> list[Told]:
    """Lists the checkpoints of a folder, newest first, with what each says of itself.

    Only the manifests are read. Those that do not tell their age, because theirs is missing or
    damaged, come first, by their time on the disk: they may be the newest.

    Args:
        folder: the folder.
        names: which names, without their endings, are looked at; all, by default.

    Raises:
        CheckpointNotFound: if there is no such folder.
    """
    try:
        present = names_in(folder)
    except FileNotFoundError:
        raise CheckpointNotFound(f"There is no folder {folder}") from None
    except OSError as error:
        raise CheckpointNotFound(
            f"{folder} cannot be read as a folder: {error.strerror or error}"
        ) from error
    found: list[Told] = []
    for name in present:
        layout = next(layout for layout in _LAYOUTS if name.endswith(layout.ending))
        if names is None or names.fullmatch(name.removesuffix(layout.ending)):
            told = _told(folder / name, layout)
            if told is not None:
                found.append(told)
    return sorted(found, key=_age, reverse=True)


def _told(path: Path, layout: Layout) -> Told | None:
    try:
        mode = path.stat().st_mode
        if not layout.is_one(path, mode):
            return None
        return Told(path, layout, layout.manifest(path))
    except FileNotFoundError as error:
        if path.is_symlink():
            where = os.readlink(path)
            lost = f"it is a link to {where}, where nothing is: is that disk mounted?"
            return Told(path, layout, CheckpointCorrupt(lost))
        if isinstance(error, CheckpointError):
            return Told(path, layout, error)
        return None
    except OSError as error:
        if isinstance(error, CheckpointError):
            return Told(path, layout, error)
        unreadable = CheckpointCorrupt(f"it cannot be read: {error.strerror or error}")
        return Told(path, layout, unreadable)
    except CheckpointError as error:
        return Told(path, layout, error)


def _age(told: Told) -> tuple[bool, int, str]:
    if isinstance(told.manifest, Manifest) and told.manifest.is_believable:
        return False, told.manifest.saved_at_ns, told.path.name
    try:
        return True, told.path.stat().st_mtime_ns, told.path.name
    except OSError:
        return True, 0, told.path.name


def newest_time(listed: list[Told]) -> int:
    """Returns when the newest checkpoint of a list was saved, in ns; 0 if none tells."""
    told = [one.manifest for one in listed if isinstance(one.manifest, Manifest)]
    return max((one.saved_at_ns for one in told if one.is_believable), default=0)


def doubt_of(told: Told, objects: Collection[str] = ()) -> str | None:
    """Returns why a checkpoint is not what is looked for; None if it may be.

    Args:
        told: the checkpoint.
        objects: names that it must hold.
    """
    manifest: Any = told.manifest
    if not isinstance(manifest, Manifest):
        return str(manifest)
    if not manifest.is_believable:
        return "it says that it was saved in a far future"
    if manifest.file != told.path.name:
        return f"it was saved as {manifest.file}: it was renamed, or two were swapped"
    missing = [name for name in objects if name not in manifest.objects]
    return f"it does not hold {', '.join(missing)}" if missing else None
