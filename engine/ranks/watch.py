"""What one rank tells the others of its run's begin and end, and the thread that listens for it."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from torch import distributed

from crosstrain.engine.errors import RankFailed

from .line import Line, ended, is_timeout
from .stuck import end_if_stuck, patience

if TYPE_CHECKING:
    from crosstrain.engine.state import State

_logger = logging.getLogger(__name__)

# As long as a wait of the store can be: whoever has something to tell ends it.
_LONG: Final = timedelta(days=20)
# Seconds between two looks, once another rank's run has ended.
_LOOK: Final = 0.25
# For how many seconds the store is asked, once the run has failed on this rank, and the other ranks
# whether they live.
_HURRY: Final = 5.0
# Seconds within which the thread that listens ends.
_END: Final = 5.0
# What errors of collective operations have in them that another process's end has caused.
_CUT: Final = ("onnection", "gloo", "NCCL", "peer")
# What to do about a collective operation that not all ranks have come to.
_ALONE: Final = (
    "It waited in a collective operation for another rank, which did something else. What all "
    "ranks do together (to save, to take a state, mean_over_ranks, a metric that reduces over "
    "processes, a pass of a model that is spread over them) is called on every rank, in the same "
    "order and as often, not under `if rank == 0`."
)


def describe(error: BaseException) -> str:
    """Returns an error in one line: its type and its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Watch:
    """Listens, in a thread, for what the other ranks tell during one run, and tells them.

    Args:
        line: to the other ranks.
        base: what the run's keys begin with.
        state: of the engine whose run it is.
        answer: called, in the thread, with the number of a call to end the run and the thread's
            connection: at once, before whoever makes the watch has it, and until it has ended.
    """

    def __init__(
        self, line: Line, base: str, state: State, answer: Callable[[int, Any], None]
    ) -> None:
        #: Why the run has failed on another rank, and which; None as long as it has not.
        self.told: tuple[int, str] | None = None
        self._line, self._base, self._state, self._answer = line, base, state, answer
        self._length = state.epoch_length
        self._patience = patience()
        self._closed = threading.Event()
        self._heard = 0
        # Where another rank's run has ended already, after which iteration, and which rank.
        self._ended: tuple[int, int] | None = None
        line.store.limit = line.timeout
        self._thread_store = line.store.clone()
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._listen, name="ranks", daemon=True)
        # A thread that still runs when the interpreter ends can take the process down.
        atexit.register(self.close)
        self._thread.start()

    # ---------------------------------------------------------------- comparisons

    def compare_start(self) -> None:
        """Raises if rank 0 begins the run elsewhere, goes another way, or does not begin."""
        line, state = self._line, self._state
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
        """Raises if another rank has learned another length of an epoch from its data."""
        length = self._state.epoch_length
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
        """Raises if another rank has failed."""
        if self.told is not None:
            raise RankFailed(self.told[1], self.told[0])

    # ---------------------------------------------------------------- telling

    def tell(self, message: dict[str, Any]) -> None:
        """Sends a message to all ranks' threads, this rank's among them."""
        # By the connection of the thread that this is: one must not wait for the other.
        listens = threading.current_thread() is self._thread
        store: Any = self._thread_store if listens else self._line.store
        number = store.add(f"{self._base}/told", 1) - 1
        keys = [f"{self._base}/for/{rank}/{number}" for rank in self._line.everyone]
        text = json.dumps(message)
        if store.has_extended_api():
            store.multi_set(keys, [text] * len(keys))
            return
        for key in keys:
            store.set(key, text)

    def first_cause(self, error: BaseException) -> BaseException:
        """Returns what another rank's failure makes of an error of this rank; else the error."""
        if isinstance(error, (RankFailed, SystemExit)):
            # Who ends the program knows why, and with which exit code.
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
        cut = isinstance(error, RuntimeError) and any(word in str(error) for word in _CUT)
        if self.told is None and cut:
            fallen = self._fallen()
            if fallen and self.told is None:
                self.told = fallen[0], self._killed(fallen, error)
        if self.told is None or self.told[0] == line.rank:
            return error
        failed = RankFailed(self.told[1], self.told[0])
        failed.__cause__ = error
        return failed

    def _fallen(self) -> list[int]:
        """Calls the roll; returns the ranks that do not answer: their processes have ended.

        The rank whose connection breaks first is seldom the one that was killed.
        """
        line, base = self._line, self._base
        try:
            number = line.count(f"{base}/rolls")
            self.tell({"roll": number})
            waiting = [rank for rank in line.everyone if rank != line.rank]
            deadline = time.monotonic() + _HURRY
            while waiting and self.told is None and time.monotonic() < deadline:
                time.sleep(0.02)
                answers = f"{base}/roll/{number}", f"{base}/left"
                waiting = [r for r in waiting if not any(line.has(f"{a}/{r}") for a in answers)]
                dead = line.dead(waiting)
                if dead:
                    return dead
        except distributed.DistError:
            # Without the store nobody can be asked.
            return []
        return waiting

    def _killed(self, fallen: list[int], error: BaseException) -> str:
        return (
            f"{ended(fallen)}, which rank {self._line.rank} noticed at iteration "
            f"{self._state.iteration} ({describe(error)}). What it wrote last says why; torchrun's "
            "report has its exit code."
        )

    def leave(self, failure: BaseException | None) -> BaseException | None:
        """Tells the others how this rank's run has ended; returns what it is to raise."""
        line, base, iteration = self._line, self._base, self._state.iteration
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
                hint = _ALONE if is_timeout(failure) else ""
                if hint:
                    failure.add_note(hint)
                reason = f"Rank {line.rank} failed at iteration {iteration}: {describe(failure)}"
                reason = f"{reason.rstrip('. ')}. {hint}" if hint else reason
            blamed = failure.rank if isinstance(failure, RankFailed) else line.rank
            text = json.dumps([line.rank if blamed is None else blamed, reason])
            if line.first(f"{base}/failure", text) == text:
                self.tell({"failure": json.loads(text), "from": line.rank})
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
            key = f"{self._base}/for/{line.rank}/{self._heard}"
            try:
                message: dict[str, Any] = {}
                if self._ended is None:
                    self._thread_store.wait([key], _LONG)
                elif not self._thread_store.check([key]):
                    self._closed.wait(_LOOK)
                if self._thread_store.check([key]):
                    message = json.loads(self._thread_store.get(key))
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
                self._answer(message["call"], self._thread_store)
            if "ended" in message:
                self._ended = tuple(message["ended"])
            if "roll" in message:
                self._thread_store.set(f"{self._base}/roll/{message['roll']}/{line.rank}", "here")
            if "failure" in message:
                rank, reason = message["failure"]
                self._take(rank, reason, message["from"])
                return
            if self._ended is not None and self._compare_end():
                assert self.told is not None
                self.tell({"failure": self.told, "from": -1})

    def _compare_end(self) -> bool:
        """Tells whether this rank has come to an iteration that another one ended before."""
        assert self._ended is not None
        rank, end = self._ended
        iteration = self._state.iteration
        if iteration <= end or self.told is not None:
            return False
        self.told = rank, self._parted(rank, end, iteration)
        return True

    def _take(self, rank: int, reason: str, teller: int = -1) -> None:
        """Keeps why the run has failed, and ends this process if it cannot take note of it."""
        self.told = self.told or (rank, reason)
        if teller != self._line.rank:
            mine, longest = self._line.rank, self._line.timeout
            end_if_stuck(self._patience, self._main, self._closed, reason, mine, longest)

    def close(self) -> None:
        """Ends the thread."""
        atexit.unregister(self.close)
        self._closed.set()
        if threading.current_thread() is self._thread:
            return
        # Over a connection that was cut the thread waits until the kernel gives it up.
        deadline = time.monotonic() + _END
        while self._thread.is_alive() and not self._line.store.lost and time.monotonic() < deadline:
            # Without the store the thread's connection has ended as well.
            with contextlib.suppress(distributed.DistError):
                self._line.set(f"{self._base}/for/{self._line.rank}/{self._heard}", "{}")
            self._thread.join(0.05)
