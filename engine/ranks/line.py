"""RankLine: small texts between the ranks of a world, and meetings that all of them come to."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from torch import distributed

from crosstrain.backends.process_group import timeout
from crosstrain.engine.errors import RankFailed

from .patient_store import PatientStore

__all__ = ["RankLine"]

# Seconds between two looks at the store: the first, and the most. A wait of the store's own that
# runs out writes lines of warnings.
_LOOKS: Final = (0.001, 0.05)
# Looks after which it is seen to whether the wait is in vain.
_CARE: Final = 16
_HERE: Final = "CROSSTRAIN_TIMEOUT"


class RankLine:
    """Talks to the other ranks through the store of the process group, in texts of a few bytes.

    A store has no collective operations: a rank that is missing or gone blocks nobody for longer
    than it takes to find that out, and it can be named.

    Raises:
        ValueError: if there is no process group.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.timeout = timeout()
        module: Any = distributed.distributed_c10d
        # torch offers no other way to the store that the group came together by. A connection of
        # our own: a wait on torch's would hold up whoever else uses it.
        self.store = PatientStore(module._get_default_store().clone(), self.timeout)
        self._group: Any = None
        #: Called while this rank waits; raises if the wait is in vain.
        self.while_waiting: Callable[[], None] | None = None
        self.set(f"process/{self.rank}", _process())

    def clone(self) -> Any:
        """Returns another connection to the store, for another thread."""
        return self.store.clone()

    # ---------------------------------------------------------------- texts

    def set(self, key: str, text: str) -> None:
        """Sets a key, without waiting."""
        self.store.set(_key(key), text)

    def get(self, key: str) -> str:
        """Returns a key's text; it has been set."""
        return str(self.store.get(_key(key)).decode())

    def has(self, key: str) -> bool:
        """Tells whether a key has been set."""
        return bool(self.store.check([_key(key)]))

    def first(self, key: str, text: str) -> str:
        """Sets a key unless it has been set; returns what it is then."""
        return str(self.store.compare_set(_key(key), "", text).decode())

    def count(self, key: str, step: int = 1) -> int:
        """Adds to a number and returns it."""
        return int(self.store.add(_key(key), step))

    def drop(self, key: str) -> None:
        """Forgets a key."""
        self.store.delete_key(_key(key))

    def awaits(self, key: str, seconds: float, missing: Callable[[], Iterable[int]]) -> bool:
        """Waits for a key; returns whether it came.

        Args:
            key: the key.
            seconds: after how long to give up.
            missing: tells which ranks have yet to do something, in order to set it.

        Raises:
            RankFailed: if the process of one of these has ended.
        """
        deadline = time.monotonic() + seconds
        pause, longest = _LOOKS
        looks = 0
        while True:
            looks += 1
            try:
                if self.has(key):
                    return True
            except distributed.DistNetworkError as error:
                raise RankFailed(
                    f"Rank {self.rank} has lost the store of the process group, so rank 0's "
                    f"process, or torchrun on its machine, has ended or is cut off: {error}"
                ) from error
            if self.while_waiting is not None:
                self.while_waiting()
            if looks % _CARE == 0:
                for rank in missing():
                    if self.is_dead(rank):
                        raise RankFailed(f"The process of rank {rank} has ended.", rank)
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def is_dead(self, rank: int) -> bool:
        """Tells whether a rank's process, on this machine, is known to have ended."""
        if not self.has(f"process/{rank}"):
            return False
        here, process = self.get(f"process/{rank}").rsplit(" ", 1)
        if here != _process().rsplit(" ", 1)[0]:
            return False
        try:
            # A zombie is dead, too.
            state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
        except OSError:
            return True
        return state.rpartition(") ")[2].startswith(("Z", "X"))

    # ---------------------------------------------------------------- meetings

    def meet(self, what: str, told: str = "", error: BaseException | None = None) -> str:
        """Waits until all ranks do the same thing; returns what rank 0 tells.

        Args:
            what: what this rank is about to do, the same on all; a part of a sentence.
            told: what rank 0 tells the others.
            error: why this rank cannot do it; then all raise.

        Raises:
            RankFailed: if a rank does something else, cannot do it, has ended, or does not come
                within CROSSTRAIN_TIMEOUT seconds.
        """
        rank, size = self.rank, self.size
        number = self.count(f"meetings/{rank}")
        base = f"meeting/{number}"
        if rank == 0:
            self.set(f"{base}/told", told)
        if error is not None:
            self.first(f"{base}/error", f"{rank} {type(error).__name__}: {error}")
        first = self.first(f"{base}/what", what)
        if first != what:
            self.first(f"{base}/differs", f"Rank {rank} was {what}, and another rank {first}.")
        self.set(f"{base}/{rank}", "here")
        if self.count(f"{base}/came") == size:
            self.set(f"{base}/all", "yes")
        here = (
            f"Rank {rank} was {what}, which all {size} ranks do together, in the same order. "
            "Call it on every rank, not under `if rank == 0`."
        )
        try:
            if not self.awaits(f"{base}/all", self.timeout, lambda: self._absent(base)):
                absent = self._absent(base)
                raise RankFailed(
                    f"{here} {_ranks(absent)} did not come within {self.timeout:g} s ({_HERE}).",
                    absent[0] if len(absent) == 1 else None,
                )
        except RankFailed as failed:
            # Who comes later must not find this rank here; without the store nobody will.
            with contextlib.suppress(distributed.DistNetworkError):
                self.count(f"meetings/{rank}", -1)
                self.count(f"{base}/came", -1)
                self.drop(f"{base}/{rank}")
                self.drop(f"{base}/what")
                if failed.rank is not None and self.is_dead(failed.rank):
                    raise RankFailed(f"Rank {rank} was {what}. {failed}", failed.rank) from None
            raise
        self._check_met(base, error, what)
        answer = self.get(f"{base}/told")
        if number > 2:
            # All have left the meeting before the last: they have come to the last.
            for name in (rank, *(("told", "came", "all", "what") if rank == 0 else ())):
                self.drop(f"meeting/{number - 2}/{name}")
        return answer

    def _absent(self, base: str) -> list[int]:
        return [rank for rank in range(self.size) if not self.has(f"{base}/{rank}")]

    def _check_met(self, base: str, error: BaseException | None, what: str) -> None:
        if self.has(f"{base}/error"):
            rank, _, reason = self.get(f"{base}/error").partition(" ")
            if error is not None and int(rank) == self.rank:
                raise error
            raise RankFailed(f"Rank {rank} failed while {what}: {reason}", int(rank))
        if self.has(f"{base}/differs"):
            raise RankFailed(
                f"{self.get(f'{base}/differs')} All ranks of a world have to do the same things in "
                "the same order."
            )

    # ---------------------------------------------------------------- objects

    def gather(self, value: Any, destination: int) -> list[Any] | None:
        """Returns the values of all ranks, in their order, on one rank; None on the others.

        Call it after `meet`. It is a collective operation, on the host: over the process group
        itself if that works on CPU tensors, else over a group that is made for it.

        Args:
            value: tensors on the CPU and plain types, in any nest.
            destination: the rank.
        """
        group = self._on_host()
        values: list[Any] | None = [None] * self.size if self.rank == destination else None
        distributed.gather_object(value, values, destination, group)
        return values

    def _on_host(self) -> Any:
        transport = str(distributed.get_backend())
        if transport == "gloo":
            return None
        if self._group is None:
            module: Any = distributed
            self._group = module.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        return self._group


def _key(name: str) -> str:
    return f"crosstrain/{name}"


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"Rank{'s' if len(ranks) > 1 else ''} {named}"


def _process() -> str:
    """Names this process: machine, its namespace of process ids, and the id."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        # Where there is no /proc, nobody takes this process for one of its own machine.
        space, boot = 0, f"{socket.gethostname()}/{os.getpid()}/{time.time_ns()}"
    return f"{socket.gethostname()}/{boot}/{space} {os.getpid()}"
