"""What becomes of the processes of a verification, and when each is killed; no torch."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass, field
from typing import Any

from crosstrain.ci.options import UsageError
from crosstrain.ci.trials.order import UNUSABLE
from crosstrain.ci.trials.processes import Kill


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


def moments(kills: int, iterations: int, seed: int, processes: int) -> list[Kill]:
    """Returns when to kill which of the processes: at random moments, some at their start."""
    source = random.Random(seed)
    found: list[Kill] = []
    for place in sorted(source.randrange(iterations) for _ in range(kills)):
        starting = place == 0 or source.random() < 0.1
        delay = source.uniform(0, 0.5) if starting else source.uniform(0, 0.02)
        found.append(Kill(0 if starting else place, delay, source.randrange(processes)))
    return found
