"""A folder of a store as bytes that are put, fetched and listed, through fsspec.

Any file system of fsspec will do; S3 and the local disk have more to offer, see `s3` and `by_url`.
What is put appears whole or not at all. What is said about an error is free of credentials, and so
is what is behind it: the errors of the packages themselves are not passed on.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from crosstrain.engine.storage.atomic import free_space
from crosstrain.engine.storage.errors import CheckpointError
from crosstrain.engine.storage.leftovers import FILES, is_leftover, new_name
from crosstrain.engine.storage.locations import StorePath

from .patience import Patience, patience_seconds

_T = TypeVar("_T")

#: Fetched and put at once; with so many at a time, that is the memory that it takes.
PIECE: Final = 16 << 20
AT_A_TIME: Final = 4
# These show nothing of what is being put before it is complete.
_WHOLE_OR_ABSENT: Final = frozenset({"gs", "gcs", "az", "abfs", "abfss"})


@dataclass(frozen=True)
class Stored:
    """What a store tells of something in a folder.

    `md5` is that of its bytes in hexadecimal, of S3 what S3 makes of it, None if not told;
    `version` what another object of this name would have another of; `modified` seconds since 1970,
    0 if not told.
    """

    name: str
    size: int
    is_folder: bool = False
    md5: str | None = None
    version: str = ""
    modified: float = 0.0


class Store:
    """A folder of a store; `root` is how the file system of fsspec names it."""

    def __init__(self, place: StorePath, filesystem: Any, root: str) -> None:
        self.place = place
        self.fs = filesystem
        self.root = root.rstrip("/")
        self.patience = Patience(patience_seconds())
        self._is_object_store = bool(_WHOLE_OR_ABSENT & set(_protocols(filesystem)))

    def within(self, seconds: float) -> Store:
        """Returns the same folder, asked with a patience of so many seconds."""
        made = copy.copy(self)
        made.patience = Patience(seconds)
        return made

    def at(self, name: str) -> str:
        """Returns how the file system names what is in the folder."""
        return f"{self.root}/{name}"

    # -------------------------------------------------------------- asked

    def ask(self, what: str, do: Callable[[], _T]) -> _T:
        """Returns what a function returns that asks the store; repeated where that may help.

        Raises:
            FileNotFoundError: as the function does, as the other errors of the system.
            OSError: in place of any other error of the package's.
        """
        try:
            return self.patience(f"{what} {self.place}", do)
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001 - each package has errors of its own
            told = self.told(error)
        try:
            # Outside of the handler: the error that was caught may show credentials.
            raise told
        finally:
            # It holds this frame, and that of whoever asks, until the collector runs.
            del told

    def told(self, error: Exception) -> OSError:
        """Returns an error of a package as one of the system, free of credentials."""
        text = self.place.hide(str(error)) or type(error).__name__
        for kind, code in (
            (FileNotFoundError, errno.ENOENT),
            (FileExistsError, errno.EEXIST),
            (PermissionError, errno.EACCES),
            (IsADirectoryError, errno.EISDIR),
        ):
            if isinstance(error, kind):
                return kind(code, text)
        number = error.errno if isinstance(error, OSError) else None
        kind_told = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return OSError(number or errno.EIO, f"{kind_told}{text}")

    def list(self) -> list[Stored]:
        """Lists what is in the folder; nothing where there is no folder."""

        def ask() -> list[Any]:
            self.fs.invalidate_cache()
            try:
                return list(self.fs.ls(self.root, detail=True))
            except FileNotFoundError:
                return []

        found = [self._stored(info) for info in self.ask("listing", ask)]
        # Some list the folder itself, as an empty object.
        return [one for one in found if one.name]

    def head(self, name: str) -> Stored:
        """Returns what the store tells of an object; FileNotFoundError if there is none."""

        def ask() -> Any:
            self.fs.invalidate_cache()
            return self.fs.info(self.at(name))

        return self._stored(self.ask("asking after", ask))

    def _stored(self, info: Any) -> Stored:
        path = str(info["name"]).rstrip("/")
        name = path.rpartition("/")[2] if path.strip("/") != self.root.strip("/") else ""
        md5 = info.get("md5Hash")
        modified = info.get("LastModified") or info.get("mtime") or info.get("created")
        seconds: Any = modified.timestamp() if hasattr(modified, "timestamp") else modified
        version = [info.get(key) for key in ("ETag", "etag", "generation", "mtime", "ino")]
        return Stored(
            name,
            int(info.get("size") or 0),
            info.get("type") == "directory",
            base64.b64decode(md5).hex() if isinstance(md5, str) else None,
            " ".join(str(one) for one in version if one is not None),
            float(seconds) if isinstance(seconds, (int, float)) else 0.0,
        )

    def get(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Returns the bytes of an object, or some of them; FileNotFoundError if there is none."""

        def ask() -> bytes:
            found: bytes = self.fs.cat_file(self.at(name), start=begin, end=end)
            if begin is not None and end is not None and len(found) != end - begin:
                raise OSError(errno.EIO, f"{len(found)} bytes came in place of {end - begin}")
            return found

        return self.ask("reading from", ask)

    def fetch(self, name: str, size: int, descriptor: int) -> None:
        """Fetches an object into an open file, in pieces, several at a time."""

        def one(begin: int) -> None:
            data = self.get(name, begin, min(begin + PIECE, size))
            _write_all(descriptor, data, begin)

        in_pieces(one, size)

    # -------------------------------------------------------------- put

    def make(self) -> None:
        """Makes the folder, where the store has such a thing."""
        if not self._is_object_store:
            self.ask("making", lambda: self.fs.makedirs(self.root, exist_ok=True))

    def unmake(self) -> None:
        """Removes the folder, where the store has such a thing, and if it is empty."""
        if not self._is_object_store:
            self.ask("removing", self._unmake)

    def _unmake(self) -> None:
        # An empty folder that stays harms nobody.
        with contextlib.suppress(OSError):
            self.fs.rmdir(self.root)

    def put(self, name: str, data: bytes) -> None:
        """Puts a small object, in place of one that is there."""
        self.ask("writing to", lambda: self._place(name, lambda to: self.fs.pipe_file(to, data)))

    def create(self, name: str, data: bytes) -> None:
        """Puts a small object where none of its name is; FileExistsError if one is.

        Of several that try it at a time, one does not get this.
        """
        self.ask("writing to", lambda: self._create(name, data))

    def _create(self, name: str, data: bytes) -> None:
        self.fs.pipe_file(self.at(name), data, mode="create")

    def upload(self, name: str, descriptor: int, size: int) -> None:
        """Puts a file, whole or not at all, in place of one that is there; looks that it is so."""
        self.ask("writing to", lambda: self._upload(name, descriptor, size))
        self._check(name, descriptor, size, self._md5(descriptor, size))

    def _upload(self, name: str, descriptor: int, size: int) -> None:
        source = f"/proc/self/fd/{descriptor}"
        self._place(name, lambda to: self.fs.put_file(source, to))

    def _place(
        self,
        name: str,
        write: Callable[[str], None],
        give_name: Callable[[str, str], None] | None = None,
    ) -> None:
        """Lets a function write an object; aside first, where it would be seen unfinished."""
        if self._is_object_store:
            write(self.at(name))
            return
        aside = self.at(new_name(FILES))
        try:
            write(aside)
            (give_name or self._rename)(aside, self.at(name))
        finally:
            if self.fs.exists(aside):
                self.fs.rm_file(aside)

    def _rename(self, aside: str, path: str) -> None:
        self.fs.mv(aside, path)

    def _md5(self, descriptor: int, size: int) -> str | None:
        """Returns what the store should tell of a file; None if it tells nothing."""
        if not {"gs", "gcs"} & set(_protocols(self.fs)):
            return None
        digest = hashlib.md5(usedforsecurity=False)
        for begin in range(0, size, PIECE):
            digest.update(os.pread(descriptor, PIECE, begin))
        return digest.hexdigest()

    def holds(self, name: str, descriptor: int, size: int) -> bool:
        """Tells whether an object has an open file's bytes: by the md5 that is told, or by all."""
        try:
            self._check(name, descriptor, size, self._md5(descriptor, size))
        except OSError:
            # Whatever it was, it is not known to be good.
            return False
        return True

    def _check(self, name: str, descriptor: int, size: int, md5: str | None) -> None:
        """Makes sure that the store has what was put: by the md5 that it tells, or all is read."""
        found = self.head(name)
        if found.size != size:
            told = f"it has {found.size:,} bytes of {name}, and {size:,} were put"
            raise OSError(errno.EIO, told)
        if md5 is not None and found.md5 == md5:
            return

        def one(begin: int) -> None:
            end = min(begin + PIECE, size)
            if self.get(name, begin, end) != os.pread(descriptor, end - begin, begin):
                raise OSError(errno.EIO, f"it has other bytes of {name} than were put")

        in_pieces(one, size)

    # -------------------------------------------------------------- removed

    def remove(self, name: str) -> None:
        """Removes an object, if it is there."""

        def ask() -> None:
            try:
                self.fs.rm_file(self.at(name))
            except FileNotFoundError:
                return

        self.ask("removing from", ask)

    def end_uploads(self) -> int:
        """Ends what killed processes have begun to put and not finished; returns how many."""
        left = [one.name for one in self.list() if is_leftover(one.name, FILES)]
        for name in left:
            self.remove(name)
        return len(left)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    told: Any = filesystem.protocol
    return (told,) if isinstance(told, str) else tuple(told)


def in_pieces(do: Callable[[int], None], size: int, piece: int = PIECE) -> None:
    """Calls a function with the begin of each piece of so many bytes, several at a time."""
    begins = range(0, size, piece)
    if len(begins) < 2:
        for begin in begins:
            do(begin)
        return
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        try:
            waiting = [pool.submit(do, begin) for begin in begins]
        except RuntimeError:
            # The interpreter is about to end, waits for this thread, and lets none begin.
            for begin in begins:
                do(begin)
            return
        # Asking for the results raises what went wrong; the rest is not begun then.
        try:
            for one in waiting:
                one.result()
        finally:
            for one in waiting:
                one.cancel()


def _write_all(descriptor: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, at)
        view, at = view[done:], at + done


def temporary_file(needed: int) -> IO[bytes]:
    """Opens a file without a name among the temporary ones (`TMPDIR`), if it has room."""
    folder = Path(tempfile.gettempdir())
    free = free_space(folder)
    if free is not None and free < needed:
        raise OSError(
            errno.ENOSPC,
            f"ENOSPC: it takes {needed:,} bytes on its way and {free:,} are free in {folder}; free "
            "some there, or set TMPDIR to another folder",
        )
    return tempfile.TemporaryFile(dir=folder)
