"""SaveJob: a checkpoint on its way to the disk, written by a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from crosstrain.engine.ranks.line import Line
from crosstrain.engine.storage.background import BackgroundJob
from crosstrain.engine.storage.locations import Location
from crosstrain.engine.storage.staging import Snapshot

__all__ = ["SaveJob"]


class SaveJob:
    """A checkpoint on its way to the disk, and what is to be removed when it is there.

    Args:
        filename: the name that it was given.
        snapshot: the copy of the state.
        write: writes the snapshot, once it is there.
        remove: removes the checkpoint of a name.
        path: where it will be, for messages.
        line: to the other processes that write it too, which all learn in the same iteration that
            it is there; None if this one writes alone.
    """

    def __init__(
        self,
        filename: str,
        snapshot: Snapshot,
        write: Callable[[], None],
        remove: Callable[[str], None],
        path: Location,
        line: Line | None = None,
    ) -> None:
        self.filename = filename
        self.failure_told = False
        self._snapshot = snapshot
        self._write = write
        self._remove = remove
        self._line = line
        self._vote: Callable[[], bool] | None = None
        self._ended = False
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
    def writing(self) -> bool:
        """Whether this process is still writing."""
        return self._thread.running

    @property
    def running(self) -> bool:
        """Whether a process is still writing; all that write ask together, and get the same answer.

        What is answered is the vote that was begun when it was asked the last time: so nobody
        waits for it.
        """
        if self._line is None:
            return self._thread.running
        if self._ended:
            return False
        if self._vote is not None and self._vote():
            self._ended = True
            return False
        self._vote = self._line.begin_vote(not self._thread.running)
        return True

    def finish(self) -> None:
        """Waits until the checkpoint is on the disk; all processes that write call it together.

        Raises:
            CheckpointError: if it could not be saved.
        """
        if self._vote is not None and not self._ended:
            self._vote()
        self._vote, self._ended = None, True
        self._thread.join()
        self._snapshot.close()
        if self._thread.error is not None:
            self.failure_told = True
            raise self._thread.error
