"""The line between the ranks of a world: short messages, and meetings that all of them come to."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterable
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

import torch
from torch import distributed

from crosstrain.backends.process_group import group_store, timeout
from crosstrain.engine.errors import RankFailed
from crosstrain.engine.machine import began, machine
from crosstrain.engine.shown import harmless, shown

from .store import AskedStore
from .world import joined

# Seconds between two looks at the store: the first, and the most. A wait of the store's own that
# runs out writes lines of warnings.
_LOOKS: Final = (0.001, 0.05)
# Looks after which it is seen to whether the wait is in vain.
_CARE: Final = 16
_HERE: Final = "CROSSTRAIN_TIMEOUT"
# What is larger than this goes over a process group: the store is one process's.
_LARGE: Final = 1 << 20
# What gloo says then.
_IN_VAIN: Final = ("Timed out waiting", "Application timeout")
T = TypeVar("T")


def has_ranks() -> bool:
    """Tells whether this process has joined a process group of several."""
    world = joined()
    return world is not None and world.size > 1


class Line:
    """Talks to the other ranks through the store of the process group, in texts of a few bytes.

    A store has no collective operations: a rank that is missing or gone blocks nobody for longer
    than it takes to find that out, and it can be named. Each wait ends after `timeout` seconds.

    A line for a thread of its own has a name: what meets on it does not meet on others. All ranks
    make it.
    """

    def __init__(self, name: str = "") -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        #: Seconds that a meeting waits for the others: CROSSTRAIN_TIMEOUT.
        self.timeout = timeout()
        # A connection of our own: a wait on the group's would hold up whoever else uses it.
        module: Any = distributed
        own = module.PrefixStore("crosstrain", group_store().clone())
        self.store = AskedStore(own, self.timeout)
        self._name = f"{name}/" if name else ""
        self._group: Any = None
        #: Called while this rank waits; raises if the wait is in vain.
        self.while_waiting: Callable[[], None] | None = None
        self.set(f"process/{self.rank}", f"{machine()} {os.getpid()} {began(os.getpid())}")

    def close(self) -> None:
        """Gives back the connection."""
        self.store.close()
        group, self._group = self._group, None
        if group is not None and distributed.is_initialized():
            distributed.destroy_process_group(group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def everyone(self) -> range:
        """All ranks."""
        return range(self.size)

    # ---------------------------------------------------------------- texts

    def set(self, key: str, text: str | bytes) -> None:
        """Sets a key, without waiting."""
        self.store.set(key, text)

    def get(self, key: str) -> str:
        """Returns a key's text; it has been set."""
        return str(self.store.get(key), "utf-8")

    def has(self, key: str) -> bool:
        """Tells whether a key has been set."""
        return bool(self.store.check([key]))

    def first(self, key: str, text: str) -> str:
        """Sets a key unless it has been set; returns what it is then."""
        return str(self.store.compare_set(key, "", text), "utf-8")

    def count(self, key: str, step: int = 1) -> int:
        """Adds to a number and returns it."""
        return int(self.store.add(key, step))

    def drop(self, key: str) -> None:
        """Forgets a key."""
        self.store.delete_key(key)

    def awaits(self, key: str, seconds: float, missing: Callable[[], Iterable[int]]) -> bool:
        """Waits some seconds for a key; returns whether it came.

        `missing` tells which ranks have yet to do something in order to set it: if the process of
        one of these has ended, RankFailed is raised.
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
                dead = self.dead(missing())
                if dead:
                    raise RankFailed(f"{ended(dead)}.", dead[0])
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def dead(self, ranks: Iterable[int]) -> list[int]:
        """Returns those of some ranks whose process, on this machine, is known to have ended."""
        return [rank for rank in ranks if self._is_dead(rank)]

    def _is_dead(self, rank: int) -> bool:
        if rank == self.rank or not self.has(f"process/{rank}"):
            return False
        there, pid, then = self.get(f"process/{rank}").rsplit(" ", 2)
        return there == machine() and began(int(pid)) != then

    # ---------------------------------------------------------------- meetings

    def meet(
        self,
        what: str,
        value: Any = None,
        *,
        error: BaseException | None = None,
        of: Iterable[int] = (),
    ) -> list[Any]:
        """Waits until all ranks do the same thing; returns what some of them say.

        It is the one way for ranks to agree on something: each says what it is about to do, whether
        it can, and a value.

        Args:
            what: what this rank is about to do, the same on all; a part of a sentence.
            value: what this rank says; anything that can be pickled, of a few bytes.
            error: why this rank cannot do it; then all raise, this one its error.
            of: the ranks whose values this one wants, and gets in their order.

        Raises:
            RankFailed: if a rank does something else, cannot do it, has ended, or does not come
                within CROSSTRAIN_TIMEOUT seconds.
        """
        # The store takes text that is UTF-8, and a file's name may be none.
        what = shown(what)
        rank, counter = self.rank, f"{self._name}meetings/{self.rank}"
        number = self.count(counter)
        base = f"{self._name}meeting/{number}"
        if error is not None:
            self.first(f"{base}/error", f"{rank} {type(error).__name__}: {harmless(error)}")
        first = self.first(f"{base}/what", what)
        if first != what:
            self.first(f"{base}/differs", f"Rank {rank} was {what}, and another rank {first}.")
        self.set(f"{base}/{rank}", pickle.dumps(value))
        self._come(base)
        try:
            self._wait_for_all(base, what)
        except RankFailed as failed:
            # Who comes later must not find this rank here; without the store nobody will.
            with contextlib.suppress(distributed.DistNetworkError):
                self.count(counter, -1)
                self.count(f"{base}/came", -1)
                self.drop(f"{base}/{rank}")
                self.drop(f"{base}/what")
                dead = failed.rank is not None and self.dead([failed.rank])
                if dead or is_timeout(failed):
                    # The other rank's message does not say what it was that it did not come to.
                    raise RankFailed(f"Rank {rank} was {what}. {failed}", failed.rank) from None
            raise
        self._check_met(base, error, what)
        # Read by us and pickled by a process of our own run, as by torch's collectives of objects.
        answers = [pickle.loads(text) for text in self._texts([f"{base}/{r}" for r in of])]
        self._forget("meeting", number, "what")
        return answers

    def _texts(self, keys: list[str]) -> list[bytes]:
        if keys and self.store.has_extended_api():
            return list(self.store.multi_get(keys))
        return [self.store.get(key) for key in keys]

    def _come(self, base: str) -> None:
        if self.count(f"{base}/came") == self.size:
            self.set(f"{base}/all", "yes")

    def _forget(self, kind: str, number: int, also: str) -> None:
        """Drops the keys of the meeting before the last: all have come to the last, and left it."""
        if number > 2:
            for name in (self.rank, *(("came", "all", also) if self.rank == 0 else ())):
                self.drop(f"{self._name}{kind}/{number - 2}/{name}")

    def _wait_for_all(self, base: str, what: str) -> None:
        if self.awaits(f"{base}/all", self.timeout, lambda: self._absent(base)):
            return
        absent = self._absent(base)
        raise RankFailed(
            f"Rank {self.rank} was {what}, which all {self.size} ranks do together, in the same "
            f"order. Call it on every rank, not under `if rank == 0`. {said_of(absent)} did not "
            f"come within {self.timeout:g} s ({_HERE}).",
            absent[0] if len(absent) == 1 else None,
        )

    def _absent(self, base: str) -> list[int]:
        return [rank for rank in self.everyone if not self.has(f"{base}/{rank}")]

    def _check_met(self, base: str, error: BaseException | None, what: str) -> None:
        if error is not None:
            raise error
        if self.has(f"{base}/error"):
            rank, _, reason = self.get(f"{base}/error").partition(" ")
            raise RankFailed(f"Rank {rank} failed while {what}: {reason}", int(rank))
        if self.has(f"{base}/differs"):
            raise RankFailed(
                f"{self.get(f'{base}/differs')} All ranks of a world have to do the same things in "
                "the same order."
            )

    @contextlib.contextmanager
    def together(self, what: str) -> Generator[None, None, None]:
        """Ends a block on all ranks where it raises on one: on the others by RankFailed."""
        failed: Exception | None = None
        try:
            yield
        except RankFailed:
            raise
        except Exception as error:  # noqa: BLE001  raised again when the others know of it
            failed = error
        self.meet(what, error=failed)

    def from_first(self, what: str, ask: Callable[[], T]) -> T:
        """Returns what a function returns on rank 0; raises RankFailed where it raises there."""
        answer, failed = None, None
        try:
            answer = ask() if self.rank == 0 else None
        except Exception as error:  # noqa: BLE001  raised again when the others know of it
            failed = error
        told = self.meet(what, answer, error=failed, of=(0,))
        return told[0]  # type: ignore[no-any-return]

    def begin_vote(self, yes: bool) -> Callable[[], bool]:
        """Begins to ask whether all ranks say yes; returns what waits for the answer.

        All ranks begin each vote, and ask for its answer, in the same order.
        """
        number = self.count(f"{self._name}votes/{self.rank}")
        base = f"{self._name}vote/{number}"
        if not yes:
            self.set(f"{base}/no", "no")
        self.set(f"{base}/{self.rank}", "came")
        self._come(base)

        def answer() -> bool:
            self._wait_for_all(base, "asking whether all ranks are done")
            agreed = not self.has(f"{base}/no")
            self._forget("vote", number, "no")
            return agreed

        return answer

    # ---------------------------------------------------------------- objects

    def gather(self, what: str, value: Any, destination: int) -> list[Any] | None:
        """Returns the values of all ranks, in their order, on one rank; None on the others.

        Large ones go over the process group if that works on CPU tensors, else over a group that
        is made for it. `what` is as of `meet`, and a value a nest of CPU tensors and plain types.
        """
        packed = bytearray(pickle.dumps(value))
        large = len(packed) > _LARGE
        told = self.meet(what, len(packed) if large else packed, of=self.everyone)
        group = self._on_host() if any(isinstance(one, int) for one in told) else None
        if self.rank != destination:
            if large:
                distributed.send(torch.frombuffer(packed, dtype=torch.uint8), destination, group)
            return None
        told[destination] = packed
        for rank, one in enumerate(told):
            if isinstance(one, int):
                # Not by gather, which takes the memory of the largest for each.
                told[rank] = bytearray(one)
                distributed.recv(torch.frombuffer(told[rank], dtype=torch.uint8), rank, group)
        return [pickle.loads(one) for one in told]

    def _on_host(self) -> Any:
        transport = str(distributed.get_backend())
        if transport == "gloo":
            return None
        if self._group is None:
            module: Any = distributed
            self._group = module.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))
        return self._group


def is_timeout(error: BaseException) -> bool:
    """Tells whether a rank has waited in vain in a collective operation, by what it says."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _IN_VAIN)


def said_of(ranks: list[int]) -> str:
    """Names some ranks, as the subject of a sentence."""
    named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"Rank{'s' if len(ranks) > 1 else ''} {named}"


def ended(ranks: list[int]) -> str:
    """Says of some ranks that their processes have ended."""
    if len(ranks) == 1:
        return f"The process of rank {ranks[0]} has ended"
    return f"The processes of {said_of(ranks).lower()} have ended"
