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

    Where processes do it together, each does its part in a thread of its own. Whoever waits for it
    first is told what this process has met; nobody is told it twice.

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
        self._finished = False
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=False).start()

    def _run(self) -> None:
        try:
            self._do()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks
            # Logged as well: nobody may ask before the program ends.
            _logger.error("%s failed: %s", shown(self._name), shown(error))
            self._error = error
        finally:
            self._done.set()

    def _do(self) -> None:
        """Does the work, in its thread."""
        self._work()

    @property
    def running(self) -> bool:
        """Whether a process is still working; all ask together, and get the same answer.

        What is answered is the vote that was begun when it was asked the last time: so nobody
        waits for it.
        """
        if self._line is None:
            return not self._done.is_set()
        if self._all_ended:
            return False
        if self._vote is not None and self._vote():
            self._all_ended = True
            return False
        self._vote = self._line.begin_vote(self._done.is_set())
        return True

    def finish(self) -> None:
        """Waits for the end of the work; the first of several calls raises what it has met.

        All processes call it together. A wait that was interrupted goes on with the next call.

        It does not wait by the thread's own `join`: where a signal's handler raises in that, as
        Ctrl-C does, and torch where a loader's worker has died, Python takes the thread for ended.
        It then neither waits for it at exit nor survives its end.
        """
        if self._finished:
            return
        try:
            if self._vote is not None and not self._all_ended:
                self._vote()
            # Whatever interrupts the wait: the others do not vote on it again.
            self._vote, self._all_ended = None, True
            self._done.wait()
            if self._error is not None:
                raise self._error
        except BaseException:
            # The save's own error, or what interrupted the wait: a save that is over by now is told
            # as that once, and one that goes on is waited for by whoever comes next.
            if self._done.is_set():
                self._end(is_good=False)
                self._finished = True
            raise
        self._end(is_good=True)
        self._finished = True

    def _end(self, *, is_good: bool) -> None:
        """Is called by whoever has waited, when there is nothing more to wait for."""


class SaveJob(JointJob):
    """A checkpoint on its way to the disk; nobody else knows how far it is, or what waits for it.

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
        #: Called with whether the checkpoint is there, by whoever has waited for it.
        self.when_ended: Callable[[bool], None] | None = None
        self._snapshot = snapshot
        self._remove = remove
        self._to_remove: list[str] | None = []
        self._guard = threading.Lock()
        # Last of all: the thread begins here.
        super().__init__(write, f"saving {path}", line)

    def _do(self) -> None:
        self._snapshot.finish()
        self._work()
        for filename in self._take_removals():
            self._remove(filename)

    def _take_removals(self) -> list[str]:
        with self._guard:
            removals, self._to_remove = self._to_remove, None
        return removals or []

    def remove_afterwards(self, filename: str) -> bool:
        """Removes a checkpoint when the new one is good; false if nothing is to be waited for.

        Where the new one fails, the old one stays.
        """
        with self._guard:
            if self._to_remove is None:
                return False
            self._to_remove.append(filename)
            return True

    def _end(self, *, is_good: bool) -> None:
        self._snapshot.close()
        self._take_removals()
        tell, self.when_ended = self.when_ended, None
        if tell is not None:
            tell(is_good)
