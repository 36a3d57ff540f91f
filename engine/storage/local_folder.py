"""A folder of checkpoints on a disk of this machine, or one that is mounted here."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO

from crosstrain.engine.shown import shown

from .archive import Window
from .atomic import Contents, make_folder, open_regular, write_file
from .errors import is_lack
from .folder import Entry, check_name
from .leftovers import PARTS, new_name, remove_leftovers
from .local_parts import LocalAside
from .lock import FolderLock
from .manifest import Manifest


class _LocalClaim:
    """The lock of a folder.

    Args:
        folder: the folder.
    """

    removed: Sequence[str] = ()

    def __init__(self, folder: Path) -> None:
        self._lock = FolderLock(folder)
        # What another saver of this process is writing looks the same.
        if self._lock.exclusive and self._lock.first:
            self.removed = remove_leftovers(folder)

    def renew(self) -> None:
        self._lock.renew()

    def release(self) -> None:
        self._lock.release()


class LocalFolder:
    """A folder on a disk: files are written aside, flushed and renamed; the kernel has its lock.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def place(self) -> Path:
        """Where it is."""
        return self._path

    def check_name(self, name: str) -> None:
        """Makes sure that a checkpoint can have a name here."""
        check_name(name)
        try:
            most = os.pathconf(self._path, "PC_NAME_MAX")
        except (OSError, ValueError):
            return
        length = len(os.fsencode(name))
        if length > most:
            raise ValueError(
                f"{shown(name)!r} cannot be the name of a checkpoint: it has {length} bytes, and "
                f"{most} are the most in {self._path}. Shorten filename_prefix, filename_pattern "
                "or the names in to_save"
            )

    def make(self) -> None:
        """Makes it, if it is not there."""
        make_folder(self._path)

    def exists(self) -> bool:
        """Tells whether it is there."""
        return self._path.is_dir()

    def claim(self) -> _LocalClaim:
        """Takes it for this process."""
        return _LocalClaim(self._path)

    def entries(self, endings: tuple[str, ...]) -> list[Entry]:
        """Lists what is named like a checkpoint."""
        names = sorted(
            name
            for name in os.listdir(self._path)
            if name.endswith(endings) and not name.startswith(".")
        )
        found = [_entry(self._path / name) for name in names]
        return [entry for entry in found if entry is not None]

    def write(self, name: str, contents: Contents) -> None:
        """Writes a file, whole or not at all."""
        write_file(self._path / name, contents)

    def aside(self, manifest: Manifest) -> LocalAside:
        """Returns where the files of a new checkpoint in parts go first."""
        return LocalAside(self._path, manifest.file)

    def open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Opens a file."""
        return open_regular(self._path / name)

    @contextlib.contextmanager
    def peek(self, name: str) -> Generator[Window]:
        """Opens a file of which little is to be read."""
        with open_regular(self._path / name) as file:
            yield Window.whole(file.fileno())

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with contextlib.suppress(IsADirectoryError):
            (self._path / name).unlink(missing_ok=True)

    def remove_parts(self, name: str) -> None:
        """Removes a checkpoint in parts, if it is there."""
        if not os.path.lexists(self._path / name):
            # Also where the ending of one in parts makes a name too long.
            return
        aside = self._path / new_name(PARTS)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path / name, aside)
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
        if is_lack(error):
            raise
        lost = f"it cannot be read: {error.strerror or error}"
        return Entry(path.name, False, False, lost=lost)
    mode = told.st_mode
    return Entry(path.name, stat.S_ISREG(mode), stat.S_ISDIR(mode), told.st_mtime_ns)
