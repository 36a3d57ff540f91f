"""The lives of a training that is verified: one after the other, followed, killed; no torch."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from crosstrain.ci.options import UsageError
from crosstrain.ci.trials.order import UNUSABLE, Order
from crosstrain.ci.trials.processes import STOPPED, Life


class VerifyError(UsageError):
    """A training cannot be verified; the message says why and what to do."""


@dataclass(frozen=True)
class Kill:
    """When a process shall be killed.

    Args:
        at: once it has done this iteration; 0: once it has got its order.
        delay: so many seconds later.
        rank: which of several processes; torchrun ends the others.
    """

    at: int
    delay: float
    rank: int = 0


@dataclass
class End:
    """What became of one process, or of those that torchrun started.

    Args:
        code: its exit code, or minus the signal that killed it, or one of them.
        resumed_from: the iteration that it went on from; None: it began.
        last: the last iteration that it reported.
        iterations: where the training ended; None if this process did not end it.
        codes: the exit codes that processes of torchrun's told, by rank.
    """

    code: int = 0
    resumed_from: int | None = None
    last: int = 0
    iterations: int | None = None
    epoch_length: int | None = None
    error: str = ""
    warnings: list[str] = field(default_factory=list[str])
    traits: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    seconds: float = 0.0
    codes: dict[int, int] = field(default_factory=dict[int, int])

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.code == -signal.SIGKILL

    def take(self, line: dict[str, Any]) -> None:
        """Takes in a line of the process."""
        if "iteration" in line:
            self.last = line["iteration"]
        elif "begun" in line:
            self.resumed_from = line["resumed_from"]
            self.last = line["resumed_from"] or 0
            self.traits = line["traits"]
        elif "done" in line:
            self.iterations, self.epoch_length = line["iterations"], line["length"]
        elif "error" in line:
            # What others raise because of it comes later.
            self.error = self.error or line["error"]
        elif "left" in line:
            self.codes[line.get("rank", 0)] = line["left"]
        elif "warning" in line and line["warning"] not in self.warnings:
            self.warnings.append(line["warning"])

    def take_codes(self, processes: int, killed: bool) -> None:
        """Takes the exit code from what the processes told: torchrun's is 1 if one's is not 0."""
        codes = set(self.codes.values())
        if self.code == 0:
            return
        if killed:
            # What the others raised is that it is missing.
            self.code, self.error = -signal.SIGKILL, ""
        elif UNUSABLE in codes:
            self.code = UNUSABLE
        elif len(self.codes) == processes and len(codes) == 1:
            self.code = codes.pop()


class Processes:
    """Runs orders, each in fresh interpreters; a single one imports torch ahead of its order.

    Args:
        folder: for what the processes write to stderr.
        time_limit: seconds after which whatever still runs is killed.
        sizes: how many processes carry out an order together, under torchrun: one number, or
            several, which orders name in turn.
    """

    def __init__(self, folder: Path, time_limit: float, sizes: tuple[int, ...]) -> None:
        self._folder = folder
        self._limit = time_limit
        self.sizes = sizes
        #: How many processes carry out the present order together.
        self.size = sizes[0]
        self._deadline = time.monotonic() + time_limit
        self._count = 0
        #: How many more orders are sure to come: a process is started ahead for the next of them.
        self.expected = 1
        self._spare = self._start_ahead()

    def _errors(self) -> Path:
        self._count += 1
        return self._folder / f"process_{self._count}.txt"

    def _start_ahead(self) -> Life | None:
        # torchrun's processes get their order when they are started.
        ahead = self.sizes == (1,) and self.expected > 0
        return Life(self._errors()) if ahead else None

    def _start(self, order: Order) -> Life:
        spare, self._spare = self._spare, None
        if spare is None:
            return Life(self._errors(), order, self.size)
        spare.give(order)
        return spare

    def run(
        self,
        order: Order,
        kill: Kill | None,
        seen: Callable[[int], None],
        number: int,
    ) -> End:
        """Has processes carry out an order, and follows them to their end.

        Args:
            order: the order.
            kill: when to kill one of them.
            seen: called with each iteration that they have done.
            number: which of the sizes, in turn.
        """
        self.size = self.sizes[number % len(self.sizes)]
        with self._start(order) as life:
            self.expected -= 1
            self._spare = self._start_ahead()
            started = time.monotonic()
            life.kill_after(max(0.0, self._deadline - started))
            end = _follow(life, kill, seen)
        ended = time.monotonic()
        end.seconds = ended - started
        if ended >= self._deadline:
            raise VerifyError(
                f"The time limit of {self._limit:g} s is over, at iteration {end.last} of one of "
                "the runs. Raise it by --time-limit, or make the training shorter."
            )
        if end.code == UNUSABLE and end.error:
            raise VerifyError(end.error)
        if end.code not in (0, STOPPED, -signal.SIGKILL):
            end.error = end.error or life.last_words(end.code)
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._spare is not None:
            self._spare.close()


def _follow(life: Life, kill: Kill | None, seen: Callable[[int], None]) -> End:
    """Reads what processes say until they have ended, and kills one of them when it is time."""
    end = End()
    due = kill

    def arm() -> None:
        nonlocal due
        # A process of torchrun's takes a while to be there.
        there = life.processes == 1 or (due is not None and due.rank in life.groups)
        if due is not None and there and end.last >= due.at:
            life.kill_rank_after(due.delay, due.rank)
            due = None

    arm()
    for line in life.lines():
        end.take(line)
        if "iteration" in line:
            seen(end.last)
        arm()
    end.code = life.wait()
    if life.processes > 1:
        end.take_codes(life.processes, life.killed)
    return end


def moments(kills: int, iterations: int, seed: int, processes: int) -> list[Kill]:
    """Returns when to kill which of the processes: at random moments, some at their start."""
    source = random.Random(seed)
    found: list[Kill] = []
    for place in sorted(source.randrange(iterations) for _ in range(kills)):
        starting = place == 0 or source.random() < 0.1
        delay = source.uniform(0, 0.5) if starting else source.uniform(0, 0.02)
        found.append(Kill(0 if starting else place, delay, source.randrange(processes)))
    return found
