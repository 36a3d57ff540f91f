"""How a scenario is played: a run straight through, and one that is interrupted and resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from .course import Course, deviation, first_difference
from .order import OURS, Order
from .processes import Kill, Relay

# Of these each process has as many as it likes.
_IN_SOFTWARE = ("cpu", "emulated")


class NotApplicable(Exception):
    """A scenario cannot be played with a training; the message says why."""


class Verdict(NamedTuple):
    """How a scenario ended: the first thing that differs, as a sentence; empty if it passed."""

    problem: str
    figures: dict[str, int | float | str]


class Play:
    """Plays a scenario on a backend: each process is a fresh interpreter, started ahead.

    Use it as a context manager: leaving it ends its processes.

    Args:
        spec: the backend.
        folder: an empty one, for checkpoints and the processes' last words.
        target: a user's training; None: the scenario's own.
        seed: of the moments of the kills.
        processes: how many the scenario will need; they are started ahead.
    """

    def __init__(
        self, spec: str, folder: Path, target: str | None, seed: int, processes: int
    ) -> None:
        self.spec = spec
        self.target = target
        self.straight = Course()
        self.resumed = Course()
        self._chance = random.Random(seed)
        self._seed = seed
        self._order = Order(spec, target or OURS, None)
        self._folder = folder
        self._relay = Relay(folder)
        self._processes = processes
        self._takes_workers = True
        self._devices = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._relay.close()

    def probe(self) -> dict[str, Any]:
        """Returns what the backend's probe says, in a process that will train later."""
        self._relay.start_ahead(1)
        found = self._relay.waiting[0].probe(self.spec, self.target)
        self._takes_workers = found["takes_workers"]
        self._devices = len(found["devices"])
        return found

    def need_workers(self) -> None:
        """Raises `NotApplicable` if a user's training does not offer another number of workers."""
        if not self._takes_workers:
            raise NotApplicable(
                f"{self.target} has no argument `workers`, so it cannot be run with other numbers "
                "of them."
            )

    def need_processes(self, number: int) -> None:
        """Raises `NotApplicable` if each process takes a device of its own, and there are fewer."""
        if self.spec.partition(":")[0] not in _IN_SOFTWARE and self._devices < number:
            raise NotApplicable(
                f"It takes {number} devices for as many processes, and there is {self._devices}."
            )

    def begin(self, training: str = "plain", **order: Any) -> None:
        """Trains straight through, a user's training or one of ours; the lengths become known.

        What is given differs from an `Order`'s defaults in all processes of the play.
        """
        self._relay.start_ahead(self._processes)
        target = self.target or f"{OURS}:{training}"
        self._order = replace(self._order, target=target, **order)
        self._live(self.straight, self._ordered("straight"))

    @property
    def length(self) -> int:
        """The iterations of an epoch."""
        return self.straight.length

    @property
    def total(self) -> int:
        """The iterations of the run."""
        return self.straight.total

    def stop(self, at: int, **order: Any) -> None:
        """Goes on, and is asked by SIGTERM to stop after an iteration."""
        if not 0 < at < self.total:
            raise NotApplicable(
                f"The training has {self.total} iterations in epochs of {self.length}, which is "
                "too few to interrupt it there."
            )
        self._live(self.resumed, self._ordered("resumed", stop_at=at, **order))

    def kill(self, first: int, last: int, together: int = 1, **order: Any) -> None:
        """Goes on, and is killed by SIGKILL at a random moment.

        Args:
            first: after which iteration at the earliest.
            last: after which iteration at the latest; it comes to one more at most.
            together: how many processes train together, under torchrun.
            **order: what differs from an `Order`'s defaults in this process.
        """
        if not 0 < first <= last < self.total - 1:
            raise NotApplicable(
                f"The training has {self.total} iterations, which is too few to kill it at a "
                "random one after the first checkpoints."
            )
        after = self._chance.randint(first, last)
        ordered = self._ordered("resumed", hold_at=after + 2, **order)
        # Within this iteration's save or within the next two.
        self._live(self.resumed, ordered, together, Kill(after, self._chance.uniform(0.0, 0.05)))

    def finish(self, together: int = 1, **order: Any) -> None:
        """Goes on to the end, alone or in several processes under torchrun."""
        self._live(self.resumed, self._ordered("resumed", **order), together)

    def verdict(
        self,
        compare: Callable[[Course, Course], str] = first_difference,
        /,
        **figures: int | float | str,
    ) -> Verdict:
        """Compares the runs, bit for bit if nothing else is said, and tells figures of them."""
        places = self.resumed.resumed_from[1:]
        if None in places:
            # Equal runs would show nothing.
            number = places.index(None) + 2
            problem = f"Process {number} found no checkpoint and began anew."
        else:
            problem = compare(self.straight, self.resumed)
        found: dict[str, int | float | str] = {
            "iterations": self.total,
            "kills": self.resumed.kills,
            "stops": self.resumed.stops,
            "resumed_from": ", ".join(map(str, places)),
            "largest_deviation": deviation(self.straight, self.resumed),
            **figures,
        }
        if self.resumed.kills:
            found["seed"] = self._seed
        return Verdict(problem, found)

    def _ordered(self, folder: str, **order: Any) -> Order:
        # What is resumed must not depend on the seed that its process begins with.
        seed = len(self.resumed.resumed_from) if folder == "resumed" else 0
        return replace(self._order, folder=str(self._folder / folder), seed=seed, **order)

    def _live(
        self, course: Course, order: Order, together: int = 1, kill: Kill | None = None
    ) -> None:
        with self._relay.begin(order, together) as child:
            for _ in child.train(course, kill):
                pass
