"""One writer to a folder: a lock that the kernel releases when its process dies, however."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar, Self

from crosstrain.engine.errors import warn_user

from .errors import CheckpointBusy, CheckpointWarning

__all__ = ["LOCK_NAME", "FolderLock"]

LOCK_NAME = ".crosstrain.lock"

# File systems that have no locks say so by one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """Holds a folder for this process, as long as the object lives or until `release`.

    The lock is a POSIX record lock. Such a lock belongs to a process and is not inherited by fork:
    DataLoader workers that outlive a killed trainer for some seconds do not keep it. All holders in
    one process share one lock.

    Args:
        folder: an existing folder.

    Raises:
        CheckpointBusy: if another process holds the folder; names its id and host.
        OSError: if the lock's file cannot be opened, or what has its name is no file of its own: a
            link is not followed, since what it leads to would be written over.
    """

    # A record lock is the whole process's, and closing any descriptor of its file drops it; so
    # there must be one descriptor of each file in a process, and one place that knows of it.
    _held: ClassVar[weakref.WeakValueDictionary[tuple[int, int], _Lock]] = (
        weakref.WeakValueDictionary()
    )
    _guard: ClassVar = threading.Lock()

    #: Whether nobody else in this process held the folder when this one took it: what then looks
    #: like left by a killed process is.
    first: bool

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: _Lock | None = None
        path = folder / LOCK_NAME
        with self._guard:
            # Found without opening the file: closing it again would drop a lock that is held.
            try:
                known = os.lstat(path)
                lock = self._held.get((known.st_dev, known.st_ino))
            except FileNotFoundError:
                lock = None
            self.first = lock is None or lock.pid != os.getpid()
            if lock is None or self.first:
                lock = _Lock(path)
                self._held[lock.key] = lock
            self._lock = lock

    @property
    def exclusive(self) -> bool:
        """Whether the folder is held: not where its file system has no locks, nor once released."""
        return self._lock is not None and self._lock.taken

    def renew(self) -> None:
        """Takes the lock once more, where this process has lost it without knowing.

        Whatever reads the lock's file in this process and closes it drops the lock, as a copy of
        the whole folder does.

        Raises:
            CheckpointBusy: if another process has taken it meanwhile.
            OSError: if the file system has no locks any more.
        """
        lock = self._lock
        # One that was forked off has never had it.
        if lock is not None and lock.taken and lock.pid == os.getpid():
            with self._guard:
                _take(lock.descriptor, self.folder / LOCK_NAME)

    def release(self) -> None:
        """Gives the folder up; another holder in this process keeps it."""
        with self._guard:
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class _Lock:
    """The one open descriptor of a lock's file; closes it when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.pid = os.getpid()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise _no_lock(path) from error
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise _no_lock(path)
            self.key = (status.st_dev, status.st_ino)
            self.taken = _take(descriptor, path)
            if self.taken:
                _describe_holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)


def _no_lock(path: Path) -> OSError:
    return OSError(
        errno.EEXIST,
        f"{path.name} is a link, a folder, or no file at all, which crosstrain has not made: look "
        "who has put it there, and remove it",
    )


def _take(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointBusy(_busy(descriptor, path.parent)) from None
        if error.errno not in _NO_LOCKS:
            raise
        warn_user(
            f"The file system of {path.parent} has no locks ({error.strerror}): two processes that "
            "save checkpoints there would not notice each other, and what a killed one has left "
            f"half written ({path.parent}/.crosstrain-*.tmp) is not removed.",
            CheckpointWarning,
        )
        return False
    return True


def _describe_holder(descriptor: int) -> None:
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _busy(descriptor: int, folder: Path) -> str:
    try:
        holder: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        who = f"process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        # It may be writing its name at this moment.
        who = "another process"
    return (
        f"{who} is saving checkpoints into {folder}; two runs in one folder would remove each "
        "other's. Give this run a folder of its own, or end the other one."
    )
