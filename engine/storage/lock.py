"""One writer to a folder: a lock that the kernel releases when its process dies, however.

On a file system of this machine's own it is a lock on the folder itself, which leaves no file in
it. Network file systems lock no folders, or only for the processes of one machine: there it is a
lock on a file in the folder. Both are in this file, since what they promise is the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from crosstrain.engine.errors import warn_user

from .errors import CheckpointBusy, CheckpointWarning
from .mounted import is_of_this_machine

LOCK_NAME = ".crosstrain.lock"

# File systems that have no locks say so by one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """Holds a folder for this process, as long as the object lives or until `release`.

    DataLoader workers that outlive a killed trainer for some seconds do not keep it. All holders in
    one process share one lock.

    Raises:
        CheckpointBusy: if another process holds the folder; names its id and host.
        OSError: if the folder or the lock's file cannot be opened, or what has its name is no file
            of its own: a link is not followed, since what it leads to would be written over.
    """

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
        with self._guard:
            self._lock, self.first = self._find_or_take()

    def _find_or_take(self) -> tuple[_Lock, bool]:
        kind: type[_Lock] = _LockOnFolder if _is_of_this_machine(self.folder) else _LockOnFile
        known = self._held.get(kind.key_of(self.folder) or (0, 0))
        # One that was forked off has never had it.
        if known is not None and known.pid == os.getpid():
            return known, False
        lock = kind(self.folder)
        self._held[lock.key] = lock
        return lock, True

    @property
    def exclusive(self) -> bool:
        """Whether the folder is held: not where its file system has no locks, nor once released."""
        return self._lock is not None and self._lock.taken

    def renew(self) -> None:
        """Takes the lock once more, where this process has lost it without knowing.

        Whatever reads the lock's file in this process and closes it drops the lock, as a copy of
        the whole folder does. A folder that was removed and made anew is another one.

        Raises:
            CheckpointBusy: if another process has taken it meanwhile.
            OSError: if the file system has no locks any more.
        """
        lock = self._lock
        if lock is None or not lock.taken or lock.pid != os.getpid():
            return
        with self._guard:
            key = lock.key_of(self.folder)
            if key is not None and key != lock.key:
                self._lock, _ = self._find_or_take()
            else:
                lock.renew()

    def release(self) -> None:
        """Gives the folder up; another holder in this process keeps it."""
        with self._guard:
            self._lock = None


class _Lock(ABC):
    """A lock of this process on a folder; given up when nobody refers to it any more."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid = folder, os.getpid()
        descriptor = self._open()
        try:
            status = os.fstat(descriptor)
            self.key = (status.st_dev, status.st_ino)
            self.descriptor = descriptor
            self.taken = self._take()
        except BaseException:
            # Whatever ended it: nobody else knows the descriptor.
            os.close(descriptor)
            raise
        self._close = weakref.finalize(self, os.close, descriptor)

    @staticmethod
    @abstractmethod
    def key_of(folder: Path) -> tuple[int, int] | None:
        """Returns by what the lock of a folder is known; None where there is none yet."""

    @abstractmethod
    def renew(self) -> None:
        """Takes the lock once more."""

    @abstractmethod
    def _open(self) -> int: ...

    @abstractmethod
    def _take(self) -> bool:
        """Takes the lock; tells whether the file system has locks."""

    def _try(self, how: Callable[[int, int], Any], holder: Callable[[], str]) -> bool:
        try:
            how(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointBusy(
                    f"{holder()} is saving checkpoints into {self.folder}; two runs in one folder "
                    "would remove each other's. Give this run a folder of its own, or end the "
                    "other one."
                ) from None
            if error.errno not in _NO_LOCKS:
                raise
            warn_user(
                f"The file system of {self.folder} has no locks ({error.strerror}): two processes "
                "that save checkpoints there would not notice each other, and what a killed one "
                f"has left half written ({self.folder}/.crosstrain-*.tmp) is not removed.",
                CheckpointWarning,
            )
            return False
        return True


class _LockOnFolder(_Lock):
    """A lock on the folder itself, as `flock` takes it.

    It belongs to what was opened, which a fork shares: a child lets go of it at once.
    """

    _all: ClassVar[weakref.WeakSet[_LockOnFolder]] = weakref.WeakSet()
    _lets_go: ClassVar[bool] = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._all.add(self)
        if not _LockOnFolder._lets_go:
            _LockOnFolder._lets_go = True
            os.register_at_fork(after_in_child=_LockOnFolder._let_go)

    @classmethod
    def _let_go(cls) -> None:
        for lock in list(cls._all):
            # Closed here, it stays locked for whoever took it.
            lock._close()

    @staticmethod
    def key_of(folder: Path) -> tuple[int, int] | None:
        try:
            status = os.stat(folder)
        except OSError:
            return None
        return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None

    def renew(self) -> None:
        """Does nothing: nothing else in this process can drop it."""

    def _open(self) -> int:
        return os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _take(self) -> bool:
        return self._try(fcntl.flock, self._holder)

    def _holder(self) -> str:
        number = self.key[1]
        with contextlib.suppress(OSError):
            for line in Path("/proc/locks").read_text().splitlines():
                found = re.search(rf"FLOCK .* WRITE (\d+) [0-9a-f:]+:{number} ", line)
                if found:
                    return f"process {found[1]} on host {socket.gethostname()}"
        return "another process"


class _LockOnFile(_Lock):
    """A lock on a file in the folder, as `lockf` takes it: one that other machines see, too.

    Such a record lock belongs to a process, is not inherited by fork, and is dropped when the
    process closes any descriptor of the file. So there must be one descriptor of each in a process,
    and one place that knows of it.
    """

    @staticmethod
    def key_of(folder: Path) -> tuple[int, int] | None:
        # Without opening the file: closing it again would drop a lock that is held.
        try:
            status = os.lstat(folder / LOCK_NAME)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def renew(self) -> None:
        self._try(fcntl.lockf, self._holder)

    def _open(self) -> int:
        path = self.folder / LOCK_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise _no_lock() from error
            raise
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise _no_lock()
        return descriptor

    def _take(self) -> bool:
        taken = self._try(fcntl.lockf, self._holder)
        if taken:
            text = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, text, 0)
        return taken

    def _holder(self) -> str:
        try:
            holder: dict[str, Any] = json.loads(os.pread(self.descriptor, 4096, 0))
            return f"process {holder['pid']} on host {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            # It may be writing its name at this moment.
            return "another process"


def _no_lock() -> OSError:
    return OSError(
        errno.EEXIST,
        f"{LOCK_NAME} is a link, a folder, or no file at all, which crosstrain has not made: look "
        "who has put it there, and remove it",
    )


def _is_of_this_machine(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return is_of_this_machine(descriptor)
    finally:
        os.close(descriptor)
