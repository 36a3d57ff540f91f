"""A folder of checkpoints on a disk of this machine, or one that is mounted here."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Generator
from pathlib import Path
from typing import IO

from crosstrain.engine.shown import shown

from .archive import Window
from .atomic import Contents, make_folder, open_regular, write_file
from .errors import lack_of
from .folder import Entry, check_name
from .leftovers import PARTS, new_name, remove_leftovers
from .local_parts import LocalAside, LocalParts
from .lock import FolderLock
from .manifest import Manifest


class LocalFolder:
    """A folder on a disk: files are written aside, flushed and renamed; the kernel has its lock."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._lock: FolderLock | None = None

    def check_name(self, name: str) -> None:
        """Raises ValueError if a checkpoint cannot have a name here."""
        check_name(name)
        try:
            most = os.pathconf(self.place, "PC_NAME_MAX")
        except (OSError, ValueError):
            return
        length = len(os.fsencode(name))
        if length > most:
            raise ValueError(
                f"{shown(name)!r} cannot be the name of a checkpoint: it has {length} bytes, and "
                f"{most} are the most in {self.place}. Shorten filename_prefix, filename_pattern "
                "or the names in to_save"
            )

    def make(self) -> None:
        """Makes it, if it is not there."""
        make_folder(self.place)

    def exists(self) -> bool:
        """Tells whether it is there."""
        return self.place.is_dir()

    def claim(self) -> int:
        """Takes it for this process, and removes what killed ones have left; returns how many.

        Raises:
            CheckpointBusy: if another process has it.
        """
        self._lock = FolderLock(self.place)
        # What another saver of this process is writing looks the same.
        alone = self._lock.exclusive and self._lock.first
        return remove_leftovers(self.place) if alone else 0

    def renew(self) -> None:
        """Makes sure that what was claimed still is this process's; raises as `claim` does."""
        if self._lock is not None:
            self._lock.renew()

    def release(self) -> None:
        """Gives it up; another holder in this process keeps it."""
        if self._lock is not None:
            self._lock.release()

    def entries(self, endings: tuple[str, ...]) -> list[Entry]:
        """Lists what is named like a checkpoint, in the order of the names."""
        names = sorted(
            name
            for name in os.listdir(self.place)
            if name.endswith(endings) and not name.startswith(".")
        )
        found = [_entry(self.place / name) for name in names]
        return [entry for entry in found if entry is not None]

    def write(self, name: str, contents: Contents) -> None:
        """Writes a file so that at any moment its name stands for a whole file or for none."""
        write_file(self.place / name, contents)

    def aside(self, manifest: Manifest) -> LocalAside:
        """Returns where the files of a new checkpoint in parts go first."""
        return LocalAside(self.place, manifest.file)

    def parts(self, name: str) -> tuple[Manifest, LocalParts]:
        """Opens a checkpoint in parts: reads what it says of itself, and nothing else."""
        found = LocalParts(self.place / name)
        return found.manifest(), found

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Opens a file with a descriptor; raises as `open_regular` does."""
        return open_regular(self.place / name)

    @contextlib.contextmanager
    def peek(self, name: str) -> Generator[Window]:
        """Opens a file of which little is to be read."""
        with open_regular(self.place / name) as file:
            yield Window.whole(file.fileno())

    def remove(self, name: str) -> None:
        """Removes a file, if it is there; a folder of its name is left alone."""
        with contextlib.suppress(IsADirectoryError):
            (self.place / name).unlink(missing_ok=True)

    def remove_parts(self, name: str) -> None:
        """Takes a checkpoint's name away at once, if it is there, then its parts."""
        if not os.path.lexists(self.place / name):
            # Also where the ending of one in parts makes a name too long.
            return
        aside = self.place / new_name(PARTS)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.place / name, aside)
            shutil.rmtree(aside)


def _entry(path: Path) -> Entry | None:
    """Returns what a name stands for; None if it is gone."""
    try:
        told = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        lost = f"it is a link to {os.readlink(path)}, where nothing is: is that disk mounted?"
        return Entry(path.name, False, False, lost=lost)
    except OSError as error:
        if lack_of(error):
            raise
        lost = f"it cannot be read: {error.strerror or error}"
        return Entry(path.name, False, False, lost=lost)
    mode = told.st_mode
    return Entry(path.name, stat.S_ISREG(mode), stat.S_ISDIR(mode), told.st_mtime_ns)
