"""A checkpoint on its way to the disk, written by a thread while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from crosstrain.engine.formats.staging import Snapshot
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.shown import shown
from crosstrain.engine.storage.locations import Location

_logger = logging.getLogger(__name__)


def own_lines(of: str) -> tuple[Line | None, Line | None]:
    """Returns lines to the other processes: one for the thread that works, one to vote on.

    None and None where there are no others; all ask for the same ones in the same order.

    Args:
        of: whose they are, in a word.
    """
    if not has_ranks():
        return None, None
    with Line() as line:
        number = line.count(f"{of}/{line.rank}")
    return Line(f"{of}/{number}/write"), Line(f"{of}/{number}/vote")


class JointJob:
    """A piece of work in a thread, which the interpreter waits for before it exits.

    Where processes do it together, each does its part in a thread of its own.

    Args:
        work: this process's part of it.
        name: what it is, for the log and for debuggers.
        line: to the other processes, which all learn in the same iteration that it has ended; None
            if this one works alone.
    """

    def __init__(self, work: Callable[[], None], name: str, line: Line | None = None) -> None:
        self._name = name
        self._work = work
        self._line = line
        self._vote: Callable[[], bool] | None = None
        self._all_ended = False
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=False).start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks
            # Logged as well: nobody may ask before the program ends.
            _logger.error("%s failed: %s", shown(self._name), shown(error))
            self._error = error
        finally:
            self._done.set()

    @property
    def working(self) -> bool:
        """Whether this process is still working."""
        return not self._done.is_set()

    @property
    def running(self) -> bool:
        """Whether a process is still working; all ask together, and get the same answer.

        What is answered is the vote that was begun when it was asked the last time: so nobody
        waits for it.
        """
        if self._line is None:
            return self.working
        if self._all_ended:
            return False
        if self._vote is not None and self._vote():
            self._all_ended = True
            return False
        self._vote = self._line.begin_vote(not self.working)
        return True

    def finish(self) -> BaseException | None:
        """Waits for the end of the work; returns what this process has met. All call it together.

        Not by the thread's own `join`: where a signal's handler raises in that, as Ctrl-C does, and
        torch where a loader's worker has died, Python takes the thread for ended. It then neither
        waits for it at exit nor survives its end.
        """
        if self._vote is not None and not self._all_ended:
            self._vote()
        self._vote, self._all_ended = None, True
        self._done.wait()
        return self._error


class SaveJob:
    """A checkpoint on its way to the disk, and what is to be removed when it is there.

    Args:
        filename: the name that it was given.
        snapshot: the copy of the state.
        write: writes the snapshot, once it is there.
        remove: removes the checkpoint of a name.
        path: where it will be, for messages.
        line: as of `JointJob`.
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
        self._to_remove: list[str] | None = []
        self._guard = threading.Lock()
        self._job = JointJob(self._run, f"saving {path}", line)

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
        return self._job.working

    @property
    def running(self) -> bool:
        """Whether a process is still writing; see `JointJob`."""
        return self._job.running

    def finish(self) -> None:
        """Waits until the checkpoint is on the disk, and raises what this process has met.

        All processes that write call it together.
        """
        error = self._job.finish()
        self._snapshot.close()
        if error is not None:
            self.failure_told = True
            raise error
