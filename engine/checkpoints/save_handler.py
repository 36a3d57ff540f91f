"""BaseSaveHandler, and FolderSaver: what all handlers that save into a folder have in common."""

from __future__ import annotations

import os
import threading
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from crosstrain.engine.storage.background import BackgroundJob
from crosstrain.engine.storage.lock import FolderLock
from crosstrain.engine.storage.manifest import later_than, software_versions
from crosstrain.engine.storage.staging import HostBuffers, Snapshot

if TYPE_CHECKING:
    from .loading import Latest

__all__ = ["BaseSaveHandler", "FolderSaver", "SaveJob"]


class BaseSaveHandler(metaclass=ABCMeta):
    """The base of what stores a checkpoint somewhere and removes it again.

    With several processes, see to it that one of them stores.
    """

    @abstractmethod
    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a checkpoint.

        Args:
            checkpoint: the objects' states by their names, or the state of the only one itself.
            filename: the name to store it under; what is there already is replaced.
            metadata: `basename` (prefix and name), `score_name`, `priority` (more is better), and
                `run`: plain facts about the run, see `Manifest`.
        """

    @abstractmethod
    def remove(self, filename: str) -> None:
        """Removes a stored checkpoint.

        Args:
            filename: the name that it was stored under.
        """


class SaveJob:
    """A checkpoint on its way to the disk, and what is to be removed when it is there.

    Args:
        filename: the name that it was given.
        snapshot: the copy of the state.
        write: writes the snapshot, once it is there.
        remove: removes the checkpoint of a name.
        path: where it will be, for messages.
    """

    def __init__(
        self,
        filename: str,
        snapshot: Snapshot,
        write: Callable[[], None],
        remove: Callable[[str], None],
        path: Path,
    ) -> None:
        self.filename = filename
        self.failure_told = False
        self._snapshot = snapshot
        self._write = write
        self._remove = remove
        self._to_remove: list[str] | None = []
        self._guard = threading.Lock()
        self._thread = BackgroundJob(self._run, f"saving {path}")

    def _run(self) -> None:
        self._snapshot.finish()
        self._write()
        with self._guard:
            removable, self._to_remove = self._to_remove or [], None
        for filename in removable:
            self._remove(filename)

    def remove_afterwards(self, filename: str) -> bool:
        """Removes a checkpoint when the new one is good; false if it is good already."""
        with self._guard:
            if self._to_remove is None:
                return False
            self._to_remove.append(filename)
            return True

    @property
    def running(self) -> bool:
        """Whether the checkpoint is still being written."""
        return self._thread.running

    def finish(self) -> None:
        """Waits until the checkpoint is on the disk.

        Raises:
            CheckpointError: if it could not be saved.
        """
        self._thread.join()
        self._snapshot.close()
        if self._thread.error is not None:
            self.failure_told = True
            raise self._thread.error


class FolderSaver(BaseSaveHandler):
    """The half of a saver that does not depend on what a checkpoint looks like on the disk.

    It holds the folder's lock, the one save that may be pending, and the time of the newest.

    Args:
        dirname: the folder.
        background: whether a thread writes.
    """

    def __init__(self, dirname: str | os.PathLike[str], background: bool) -> None:
        self.dirname = Path(dirname).expanduser()
        self._background = background
        self._lock: FolderLock | None = None
        self._newest_ns = 0
        self._versions = software_versions()
        self._buffers = HostBuffers()
        self._job: SaveJob | None = None

    @property
    def background(self) -> bool:
        """Whether a thread writes."""
        return self._background

    @property
    def job(self) -> SaveJob | None:
        """What the thread is writing, or has written and was not asked about; None if nothing."""
        return self._job

    def follow(self, latest: Latest) -> None:
        """Makes sure that what is saved from now on is newer than what a run has gone on from."""
        if latest.manifest is not None:
            self._newest_ns = max(self._newest_ns, latest.manifest.saved_at_ns)

    def _next_time(self) -> int:
        """Returns the time of a new checkpoint, in ns: after that of every other in the folder."""
        self._newest_ns = later_than(self._newest_ns)
        return self._newest_ns

    def remove(self, filename: str) -> None:
        """Removes a checkpoint; in the background, after the pending one is good.

        If the pending one fails, it stays. Does nothing if it is gone already.
        """
        if self._job is None or not self._job.remove_afterwards(filename):
            self._remove_now(filename)

    @abstractmethod
    def _remove_now(self, filename: str) -> None:
        """Removes a checkpoint, if this process is the one that does."""

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Where all processes save together, all call it together.

        Raises:
            CheckpointError: what the thread raised, once.
        """
        job = self._job
        try:
            if job is not None and not job.failure_told:
                job.finish()
        finally:
            # A wait that was interrupted, as by Ctrl-C, goes on with the next one.
            if job is None or not job.running:
                self._job = None

    def close(self) -> None:
        """Waits, and gives the folder up."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
