"""Files that are whole or absent: written aside, flushed to disk, named, the folder flushed.

The order of the steps is the one of "All File Systems Are Not Created Equal" (Pillai et al., OSDI
2014): a file system may reorder whatever is not separated by an fsync.

Aside is a file without a name, where the file system has such: nobody who lists the folder sees it,
and the kernel frees it however the process ends. Elsewhere it is one with a name of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Protocol, Self

from .errors import CheckpointCorrupt, CheckpointWriteError
from .leftovers import FILES, new_name
from .mounted import is_of_this_machine
from .tree_hash import Tree, TreeHash

_BUFFER = 1 << 20
# What is smaller is buffered, and hashed where it is: handing it over would cost more.
_LARGE = 1 << 18
# Readable, too: it is checked before it gets its name.
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_EXCL
# By these a file system, or a kernel, says that it has no files without a name, ...
_NO_UNNAMED: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
# ... or that none of them can be given one.
_NO_LINKS: Final = (errno.EPERM, errno.EACCES, errno.EXDEV, errno.ENOENT, *_NO_UNNAMED)


class Hash(Protocol):
    """Is given the bytes of a file, one piece after the other."""

    def update(self, data: memoryview) -> None:
        """Takes the next bytes."""


class HashingFile:
    """A file that is only written to, and hashed on the way.

    After the first error it swallows what it is given, and `finish` raises: torch's writer takes an
    exception out of `write` for a fault of its own.

    Args:
        descriptor: an open file descriptor, at position 0; it stays the caller's to close.
        digest: hashes it.
        hasher: does so with large blocks while they are being written; None: before.
    """

    def __init__(self, descriptor: int, digest: Hash, hasher: Executor | None = None) -> None:
        self._descriptor = descriptor
        self._hasher = hasher
        self._hash = digest
        self._buffer = bytearray()
        self._error: OSError | None = None
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Takes bytes; returns their number."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self._error is None:
            try:
                self._take(view)
            except OSError as error:
                self._error = error
        return len(view)

    def _take(self, view: memoryview) -> None:
        if len(view) < _LARGE:
            self._hash.update(view)
            self._buffer += view
            if len(self._buffer) >= _BUFFER:
                self._empty_buffer()
            return
        self._empty_buffer()
        if self._hasher is None:
            self._hash.update(view)
            self._write_all(view)
            return
        # The caller's memory is ours only until write() returns, so both end here.
        hashing = self._hasher.submit(self._hash.update, view)
        try:
            self._write_all(view)
        finally:
            hashing.result()

    def _empty_buffer(self) -> None:
        with memoryview(self._buffer) as view:
            self._write_all(view)
        self._buffer.clear()

    def _write_all(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            # Linux writes at most 2 GiB at once, and less where the disk or a limit is reached.
            done += os.write(self._descriptor, view[done:])

    def flush(self) -> None:
        """Does nothing: `finish` writes what is buffered."""

    close = flush

    def tell(self) -> int:
        """Returns how many bytes it was given."""
        return self.size

    def fileno(self) -> int:
        """Returns the descriptor, of a file with all that it was given; raises as `finish` does."""
        self.finish()
        return self._descriptor

    def finish(self) -> None:
        """Writes what is buffered, or raises the first error."""
        if self._error is None:
            self._empty_buffer()
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class Contents:
    """What a file is to hold.

    Args:
        produce: writes it into the file that it is given.
        trailer: called with the hashes of that; returns bytes to append, whose number replaces the
            last two bytes before them.
        check: called with the descriptor of the whole file, before it gets its name; what it raises
            ends the writing.
        needed: its bytes at most.
        atomic: if false, it is written under its name: for file systems without rename. A kill then
            leaves a part of a file. One that was there is removed first, not written over: who has
            it open goes on to read what it was.
        parallel: hashes in a thread beside the writing.
    """

    produce: Callable[[HashingFile], None]
    trailer: Callable[[Tree], bytes]
    check: Callable[[int], None]
    needed: int = 0
    atomic: bool = True
    parallel: bool = False


def write_file(path: Path, contents: Contents) -> None:
    """Writes a file so that at any moment its name stands for a whole file or for none.

    Raises:
        CheckpointWriteError: if it does not fit, or the file system refuses a step; it names the
            file, step and cause.
    """
    check_free_space(path, contents.needed)
    step = "creating"
    try:
        with _Aside(path, named=not contents.atomic) as aside:
            step = "writing"
            fill_file(aside.descriptor, contents)
            step = "reading back"
            contents.check(aside.descriptor)
            step = "flushing"
            os.fsync(aside.descriptor)
            step = "naming"
            aside.give_name()
        step = "flushing the folder of"
        flush_folder(path.parent)
    except OSError as error:
        raise _write_error(path, step, error) from error


def fill_file(descriptor: int, contents: Contents) -> None:
    """Writes the contents of an open file, which is empty."""
    with ThreadPoolExecutor(1) if contents.parallel else contextlib.nullcontext() as hasher:
        tree = TreeHash()
        file = HashingFile(descriptor, tree, hasher)
        contents.produce(file)
        file.finish()
    trailer = contents.trailer(tree.tree())
    file.write(trailer)
    file.finish()
    os.pwrite(descriptor, len(trailer).to_bytes(2, "little"), file.size - len(trailer) - 2)


class _Aside:
    """A new file that is open, readable too, and has its name only when it is given it.

    Left by an exception, it is gone. With `named` it is opened under its name; what was there is
    removed first.
    """

    def __init__(self, path: Path, *, named: bool) -> None:
        self._path = path
        #: The name that it has now; None if it has none.
        self._name: Path | None = None
        unnamed = None if named else _open_unnamed(path.parent)
        if unnamed is not None:
            self.descriptor = unnamed
            return
        if named:
            path.unlink(missing_ok=True)
        name = path if named else path.with_name(new_name(FILES))
        self.descriptor = os.open(name, _NEW, 0o666)
        self._name = name

    def give_name(self) -> None:
        """Gives it its name, in place of a file that has it."""
        if self._name is None:
            self._link()
        if self._name is not None and self._name != self._path:
            self._close()
            os.replace(self._name, self._path)
            self._name = self._path

    def _link(self) -> None:
        """Gives it its first name: its own where that is free, or one to be renamed."""
        aside = self._path.with_name(new_name(FILES))
        for name in (self._path, aside):
            try:
                # Without a descriptor of a folder, which an absolute path does not need, Python
                # links the link in /proc, not the file behind it.
                source = f"/proc/self/fd/{self.descriptor}"
                os.link(source, name, src_dir_fd=self.descriptor)
            except FileExistsError:
                # A link replaces nothing, a rename does.
                continue
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._copy(aside)
                return
            self._name = name
            return

    def _copy(self, name: Path) -> None:
        """Goes on with a flushed copy that has a name."""
        other = os.open(name, _NEW, 0o666)
        unnamed, self.descriptor, self._name = self.descriptor, other, name
        try:
            size = os.fstat(unnamed).st_size
            at = 0
            while at < size:
                at += os.sendfile(other, unnamed, at, size - at)
            os.fsync(other)
        finally:
            os.close(unnamed)

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            # A network file system may report a failed write only here.
            self._close()
            return
        # What failed is what matters; the next start removes what cannot be removed now.
        with contextlib.suppress(OSError):
            self._close()
        if self._name is not None and self._name != self._path:
            with contextlib.suppress(OSError):
                self._name.unlink(missing_ok=True)


def _open_unnamed(folder: Path) -> int | None:
    """Opens a new file without a name in a folder; None where there are none that can be named."""
    kind = getattr(os, "O_TMPFILE", None)
    if kind is None:
        return None
    try:
        descriptor = os.open(folder, kind | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _NO_UNNAMED:
            return None
        raise
    # Of network file systems some have them in name only. Without /proc it would never get a name.
    if is_of_this_machine(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def flush_folder(folder: Path) -> None:
    """Flushes a folder's list of names to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot flush a folder, and say so by this.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _write_error(path: Path, step: str, error: OSError) -> CheckpointWriteError:
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    advice = {
        errno.ENOSPC: " Free some space, or keep fewer checkpoints (n_saved).",
        errno.EDQUOT: " The quota is used up: free some space.",
        errno.EFBIG: " The file is larger than the process or the file system allows (ulimit -f).",
        errno.EROFS: " The file system is mounted read-only.",
        errno.EACCES: " The process may not write there.",
        errno.ENOENT: " The folder is gone: it was removed, renamed, or is mounted no longer.",
        errno.EIO: " The device has a fault; its messages are in the system's log.",
    }.get(error.errno or 0, "")
    kept = " Checkpoints that were saved before are as they were."
    return CheckpointWriteError(
        f"Checkpoint {path} was not saved: {step} it failed with {error.strerror or error} "
        f"({name}).{'' if error.errno == errno.ENOENT else kept}{advice}",
        error,
        path,
    )


def free_space(folder: Path) -> int | None:
    """Returns how many bytes are free in a folder; None if its file system does not tell."""
    space = os.statvfs(folder)
    # One that counts no blocks at all does not tell its size.
    return space.f_bavail * space.f_frsize if space.f_blocks else None


def check_free_space(path: Path, needed: int) -> None:
    """Raises CheckpointWriteError, before anything is written, if a file has no room."""
    try:
        free = free_space(path.parent)
    except OSError as error:
        raise _write_error(path, "asking for the free space for", error) from error
    if free is not None and free < needed:
        raise CheckpointWriteError(
            f"Checkpoint {path} was not saved: it needs {needed:,} bytes and {free:,} are free in "
            f"{path.parent} (ENOSPC). Checkpoints that were saved before are as they were. "
            "Free some space, or keep fewer checkpoints (n_saved); a new one is written before an "
            "old one is removed, so there must be room for one more than n_saved.",
            path=path,
        )


@contextlib.contextmanager
def open_regular(path: Path, *, linked: bool = True) -> Generator[IO[bytes]]:
    """Opens a file for reading, if it is one: nothing that is only named like one is waited for.

    Args:
        path: the file.
        linked: follows a link, since people link checkpoints into other folders; what it leads to
            must be a regular file too. If false, a link is refused: a folder of parts is a whole.

    Raises:
        CheckpointCorrupt: if it is a FIFO, a socket, or a device; or a link, where none may be.
        OSError: if it cannot be opened, or is a folder.
    """
    # Opening a FIFO without O_NONBLOCK waits until somebody writes into it.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags if linked else flags | os.O_NOFOLLOW)
    except OSError as error:
        # Some systems have another number for it.
        if error.errno != errno.ENOENT and not linked and path.is_symlink():
            text = f"{path.name} in it is a link, and a checkpoint in parts holds files only"
            raise CheckpointCorrupt(text) from error
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise CheckpointCorrupt("it is no file, but a FIFO, a socket, or a device")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _no_folder(folder: Path) -> str:
    """Says what is where a folder, or one that it is in, cannot be made."""
    place = next((one for one in (folder, *folder.parents) if os.path.lexists(one)), folder)
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to {os.readlink(place)}, where nothing is: is that disk mounted?"
    return f"{place} is no folder"


def make_folder(folder: Path) -> None:
    """Creates a folder with its parents, such that it is still there after a power cut."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(error.errno, _no_folder(folder)) from None
    for place in missing:
        flush_folder(place.parent)
