"""Failures: what one rank tells the others of its run's begin and end, and who listens for it."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from torch import distributed

from crosstrain.engine.errors import RankFailed

from .line import RankLine

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine

__all__ = ["Failures", "describe"]

_logger = logging.getLogger(__name__)

# As long as a wait of the store can be: whoever has something to tell ends it.
_LONG: Final = timedelta(days=20)
# Seconds between two looks, once another rank's run has ended.
_LOOK: Final = 0.25
# A rank that does nothing in Python for this long after another has failed waits for it in vain.
_STUCK: Final = 15.0
# For how many seconds the store is asked, once the run has failed on this rank.
_HURRY: Final = 5.0


def describe(error: BaseException) -> str:
    """Returns an error in one line: its type and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Failures:
    """Listens, in a thread, for what the other ranks tell during one run, and tells them.

    Args:
        line: to the other ranks.
        base: what the run's keys begin with.
        engine: whose run it is.
        answer: called, in the thread, with the number of a call to end the run.
    """

    def __init__(
        self, line: RankLine, base: str, engine: Engine, answer: Callable[[int], None]
    ) -> None:
        #: Why the run has failed on another rank, and which; None as long as it has not.
        self.told: tuple[int, str] | None = None
        self._line, self._base, self._engine, self._answer = line, base, engine, answer
        self._length = engine.state.epoch_length
        self._closed = threading.Event()
        self._heard = 0
        # Where another rank's run has ended already, after which iteration, and which rank.
        self._ended: tuple[int, int] | None = None
        line.store.limit = line.timeout
        self._ears = line.clone()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        # A thread that still runs when the interpreter ends can take the process down.
        atexit.register(self.close)
        self._thread.start()

    def ears_or_line(self) -> Any:
        """Returns the connection of the thread that asks: one must not wait for the other."""
        here = threading.current_thread() is self._thread
        return self._ears if here else self._line.store

    # ---------------------------------------------------------------- comparisons

    def compare_start(self) -> None:
        """Compares with rank 0 where the run begins and how far it goes.

        Raises:
            RankFailed: if there is a difference, or rank 0 does not begin.
        """
        line, state = self._line, self._engine.state
        names = ("iteration", "epoch_length", "max_epochs", "max_iters")
        mine: dict[str, Any] = {name: getattr(state, name) for name in names}
        line.set(f"{self._base}/start/{line.rank}", json.dumps(mine))
        if line.rank == 0:
            return
        key = f"{self._base}/start/0"
        if not line.awaits(key, line.timeout, lambda: [0]):
            raise RankFailed(f"Rank 0 did not begin the run within {line.timeout:g} s.", 0)
        theirs = json.loads(line.get(key))
        other = [name for name in names if mine[name] != theirs[name]]
        if other:
            raise RankFailed(
                "The ranks do not begin the same run: "
                + "; ".join(
                    f"{name} is {mine[name]} on rank {line.rank} and {theirs[name]} on rank 0"
                    for name in other
                )
                + ". Give all ranks as many batches, the same limits, and the same checkpoint."
            )

    def compare_lengths(self) -> None:
        """Compares an epoch's length that was learned from the data with the other ranks'.

        Raises:
            RankFailed: if another rank has learned another one.
        """
        length = self._engine.state.epoch_length
        if length == self._length:
            return
        self._length = length
        mine = f"{self._line.rank} {length}"
        first = self._line.first(f"{self._base}/length", mine)
        rank, theirs = map(int, first.split())
        if theirs != length:
            raise RankFailed(
                f"An epoch has {theirs} iterations on rank {rank} and {length} on rank "
                f"{self._line.rank}: their data gives other numbers of batches. Give all ranks as "
                "many."
            )

    def check(self) -> None:
        """Raises if another rank has failed.

        Raises:
            RankFailed: names it, and says of what.
        """
        if self.told is not None:
            raise RankFailed(self.told[1], self.told[0])

    # ---------------------------------------------------------------- telling

    def tell(self, message: dict[str, Any], ears: bool = False) -> None:
        """Sends a message to all ranks' threads, this rank's among them."""
        store = self._ears if ears else self._line.store
        number = store.add(f"crosstrain/{self._base}/told", 1) - 1
        keys = [f"crosstrain/{self._base}/for/{r}/{number}" for r in range(self._line.size)]
        text = json.dumps(message)
        if store.has_extended_api():
            store.multi_set(keys, [text] * len(keys))
            return
        for key in keys:
            store.set(key, text)

    def first_cause(self, error: BaseException) -> BaseException:
        """Returns what another rank's failure makes of an error of this rank; else the error."""
        if isinstance(error, RankFailed):
            return error
        line, base = self._line, self._base
        self._hurry()
        try:
            if self.told is None and line.has(f"{base}/failure"):
                rank, reason = json.loads(line.get(f"{base}/failure"))
                self.told = rank, reason
            if self.told is None and line.has(f"{base}/ended"):
                self._ended = tuple(json.loads(line.get(f"{base}/ended")))
                self._compare_end()
        except distributed.DistError as gone:
            error.add_note(
                f"The store of the process group is gone, so other ranks have ended or are cut "
                f"off: {describe(gone)}"
            )
        if self.told is None or self.told[0] == line.rank:
            if isinstance(error, RuntimeError) and "onnection" in str(error):
                error.add_note(
                    "Another rank's process has ended, or cannot be reached. What it wrote last "
                    "says why; torchrun's report has its exit code."
                )
            return error
        failed = RankFailed(self.told[1], self.told[0])
        failed.__cause__ = error
        return failed

    def leave(self, failure: BaseException | None) -> BaseException | None:
        """Tells the others how this rank's run has ended; returns what it is to raise."""
        line, base, iteration = self._line, self._base, self._engine.state.iteration
        if failure is None:
            mine = json.dumps([line.rank, iteration])
            rank, end = json.loads(line.first(f"{base}/ended", mine))
            if rank == line.rank:
                self.tell({"ended": [rank, iteration]})
            elif end != iteration:
                failure = RankFailed(self._parted(rank, end, iteration), rank)
        if failure is not None:
            self._hurry()
            reason = str(failure)
            if not isinstance(failure, RankFailed):
                reason = f"Rank {line.rank} failed at iteration {iteration}: {describe(failure)}"
            text = json.dumps([line.rank, reason])
            if line.first(f"{base}/failure", text) == text:
                self.tell({"failure": [line.rank, reason]})
        left = {"passed": 2 * iteration + 1, "wish": 0, "signal": 0}
        line.set(f"{base}/left/{line.rank}", json.dumps(left))
        return failure

    def _hurry(self) -> None:
        # What has failed may have waited for the timeout already: not for another one.
        store = self._line.store
        store.limit = min(store.limit, _HURRY)

    def _parted(self, rank: int, end: int, iteration: int) -> str:
        return (
            f"The run has ended on rank {rank} after {end} iterations, and rank {self._line.rank} "
            f"has come to iteration {iteration}. Give all ranks as many batches and the same "
            "limits."
        )

    # ---------------------------------------------------------------- listening

    def _listen(self) -> None:
        line = self._line
        while not self._closed.is_set():
            key = f"crosstrain/{self._base}/for/{line.rank}/{self._heard}"
            try:
                message: dict[str, Any] = {}
                if self._ended is None:
                    self._ears.wait([key], _LONG)
                elif not self._ears.check([key]):
                    self._closed.wait(_LOOK)
                if self._ears.check([key]):
                    message = json.loads(self._ears.get(key))
                    self._heard += 1
            except distributed.DistNetworkError as error:
                if not self._closed.is_set():
                    self._take(-1, f"The store of the process group is gone: {describe(error)}")
                return
            except distributed.DistStoreError:
                continue
            if self._closed.is_set():
                return
            if "call" in message:
                self._answer(message["call"])
            if "ended" in message:
                self._ended = tuple(message["ended"])
            if "failure" in message:
                self._take(*message["failure"])
                return
            if self._ended is not None and self._compare_end():
                assert self.told is not None
                self.tell({"failure": self.told}, ears=True)

    def _compare_end(self) -> bool:
        """Tells whether this rank has come to an iteration that another one ended before."""
        assert self._ended is not None
        rank, end = self._ended
        iteration = self._engine.state.iteration
        if iteration <= end or self.told is not None:
            return False
        self.told = rank, self._parted(rank, end, iteration)
        return True

    def _take(self, rank: int, reason: str) -> None:
        """Keeps why another rank has failed, and ends this process if it cannot take note of it."""
        self.told = self.told or (rank, reason)
        if rank == self._line.rank or self._is_moving():
            return
        # Its main thread is in an operation, such as a collective one, that will not end: gloo has
        # no means to end it from here, and the watchdog of the other transports does the same.
        sys.stderr.write(f"{reason} Rank {self._line.rank} waits in vain and is ended.\n")
        sys.stderr.flush()
        os._exit(1)

    def _is_moving(self) -> bool:
        """Watches the main thread until it has left the run (true) or is stuck (false)."""
        place, since = None, time.monotonic()
        while not self._closed.wait(0.1):
            frames: Any = sys
            frame = frames._current_frames().get(self._main)
            now = None if frame is None else (id(frame), frame.f_lasti)
            del frame
            busy = any(
                not thread.daemon and thread.is_alive() and thread.ident != self._main
                for thread in threading.enumerate()
            )
            if now != place or busy:
                place, since = now, time.monotonic()
            elif time.monotonic() - since > _STUCK:
                return False
        return True

    def close(self) -> None:
        """Ends the thread."""
        atexit.unregister(self.close)
        self._closed.set()
        if threading.current_thread() is self._thread:
            return
        # Over a connection that was cut the thread waits until the kernel gives it up.
        while self._thread.is_alive() and not self._line.store.lost:
            try:
                key = f"crosstrain/{self._base}/for/{self._line.rank}/{self._heard}"
                self._line.store.set(key, "{}")
            except distributed.DistError:
                # Then the thread's connection has ended as well.
                pass
            self._thread.join(0.05)
