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
from crosstrain.ci.trials.processes import STOPPED, Kill, Relay


class VerifyError(UsageError):
    """A training cannot be verified; the message says why and what to do."""


@dataclass
class End:
    """What became of one process, or of those that torchrun started.

    Args:
        code: its exit code, or minus the signal that killed it, or one of them.
        resumed_from: the iteration that it went on from; None: it began.
        iterations: where the training ended; None if this process did not end it.
        codes: the exit codes that processes of torchrun's told, by rank.
    """

    code: int = 0
    resumed_from: int | None = None
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
        if "begun" in line:
            self.resumed_from = line["resumed_from"]
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
        self._relay = Relay(folder)
        self._limit = time_limit
        self.sizes = sizes
        #: How many processes carry out the present order together.
        self.size = sizes[0]
        self._deadline = time.monotonic() + time_limit
        #: How many more orders are sure to come: a process is started ahead for the next of them.
        self.expected = 1
        self._start_ahead()

    def _start_ahead(self) -> None:
        if self.sizes == (1,) and self.expected > 0:
            self._relay.start_ahead(1)

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
        end = End()
        with self._relay.begin(order, self.size) as life:
            self.expected -= 1
            self._start_ahead()
            started = time.monotonic()
            life.kill_after(max(0.0, self._deadline - started))
            life.kill_when(kill)
            for line in life.lines():
                end.take(line)
                if "iteration" in line:
                    seen(life.last)
            end.code = life.wait()
        if life.processes > 1:
            end.take_codes(life.processes, life.killed)
        ended = time.monotonic()
        end.seconds = ended - started
        if ended >= self._deadline:
            raise VerifyError(
                f"The time limit of {self._limit:g} s is over, at iteration {life.last} of one of "
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
        self._relay.close()


def moments(kills: int, iterations: int, seed: int, processes: int) -> list[Kill]:
    """Returns when to kill which of the processes: at random moments, some at their start."""
    source = random.Random(seed)
    found: list[Kill] = []
    for place in sorted(source.randrange(iterations) for _ in range(kills)):
        starting = place == 0 or source.random() < 0.1
        delay = source.uniform(0, 0.5) if starting else source.uniform(0, 0.02)
        found.append(Kill(0 if starting else place, delay, source.randrange(processes)))
    return found
