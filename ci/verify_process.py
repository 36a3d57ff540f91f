"""The processes of a verification: started ahead, given an order, followed, killed; no torch."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from .verify_order import UNUSABLE, Order

__all__ = ["End", "Kill", "Processes", "VerifyError", "moments"]

_STOPPED: Final = 128 + signal.SIGTERM
_TAIL: Final = 2000


class VerifyError(Exception):
    """A training cannot be verified; the message says why and what to do."""


@dataclass(frozen=True)
class Kill:
    """When a process shall be killed.

    Args:
        at: once it has done this iteration; 0: once it has got its order.
        delay: so many seconds later.
    """

    at: int
    delay: float


@dataclass
class End:
    """What became of one process.

    Args:
        code: its exit code, or minus the signal that killed it.
        resumed_from: the iteration that it went on from; None: it began.
        last: the last iteration that it reported.
        iterations: where the training ended; None if this process did not end it.
        epoch_length: the iterations of an epoch; None where the process did not tell.
        error: what it raised; empty if nothing.
        warnings: the `ResumeWarning`s of the engine.
        seconds: how long it took from its order on.
    """

    code: int = 0
    resumed_from: int | None = None
    last: int = 0
    iterations: int | None = None
    epoch_length: int | None = None
    error: str = ""
    warnings: list[str] = field(default_factory=list[str])
    seconds: float = 0.0

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
        elif "done" in line:
            self.iterations, self.epoch_length = line["iterations"], line["epoch_length"]
        elif "error" in line:
            self.error = line["error"]
        elif "warning" in line and line["warning"] not in self.warnings:
            self.warnings.append(line["warning"])


class Processes:
    """Runs orders, each in a fresh interpreter, the next of which imports torch ahead of its order.

    Args:
        folder: for what the processes write to stderr.
        time_limit: seconds after which whatever still runs is killed.
    """

    def __init__(self, folder: Path, time_limit: float) -> None:
        self._folder = folder
        self._limit = time_limit
        self._deadline = time.monotonic() + time_limit
        self._count = 0
        #: How many more orders are sure to come: a process is started ahead for the next of them.
        self.expected = 1
        self._spare: tuple[subprocess.Popen[str], Path] | None = self._start()

    def _start(self) -> tuple[subprocess.Popen[str], Path]:
        self._count += 1
        errors = self._folder / f"process_{self._count}.txt"
        # A group of its own: a kill takes the loader's workers along, as a scheduler's does.
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "crosstrain.ci.verify_life"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        return process, errors

    def run(
        self, order: Order, kill: Kill | None = None, seen: Callable[[int], None] | None = None
    ) -> End:
        """Has a process carry out an order, and follows it to its end.

        Args:
            order: the order.
            kill: when to kill it.
            seen: called with each iteration that it has done.

        Raises:
            VerifyError: if its target or its backend cannot be used, or the time is up.
        """
        process, errors = self._spare or self._start()
        self.expected -= 1
        self._spare = self._start() if self.expected > 0 else None
        started = time.monotonic()
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        watch = threading.Timer(max(0.0, self._deadline - started), stop)
        watch.start()
        try:
            end = self._follow(process, order, kill, seen or (lambda _: None))
        finally:
            watch.cancel()
            _end(process)
        end.seconds = time.monotonic() - started
        if late.is_set():
            raise VerifyError(
                f"The time limit of {self._limit:g} s is over, at iteration {end.last} of one of "
                "the runs. Raise it by --time-limit, or make the training shorter."
            )
        if end.code == UNUSABLE and end.error:
            raise VerifyError(end.error)
        if end.code not in (0, _STOPPED, -signal.SIGKILL):
            end.error = end.error or _last_words(end.code, errors)
        return end

    def _follow(
        self,
        process: subprocess.Popen[str],
        order: Order,
        kill: Kill | None,
        seen: Callable[[int], None],
    ) -> End:
        assert process.stdin is not None
        assert process.stdout is not None
        end = End()
        # If it has ended, reading its answer says so.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(order.as_json() + "\n")
            process.stdin.flush()
        killer = None if kill is None else threading.Timer(kill.delay, _kill, (process,))
        armed = killer is not None and kill is not None and kill.at == 0
        if killer is not None and armed:
            killer.start()
        for text in process.stdout:
            if not text.endswith("\n"):
                break  # cut off by a kill
            line = json.loads(text)
            end.take(line)
            if "iteration" in line:
                seen(end.last)
            if killer is not None and kill is not None and not armed and end.last >= kill.at:
                armed = True
                killer.start()
        end.code = process.wait()
        if killer is not None:
            killer.cancel()
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._spare is not None:
            _end(self._spare[0])


def moments(kills: int, iterations: int, seed: int) -> list[Kill]:
    """Returns when to kill a training's processes: spread over it at random, some at their start.

    Args:
        kills: how many.
        iterations: how many the training has.
        seed: of the moments.
    """
    source = random.Random(seed)
    found: list[Kill] = []
    for place in sorted(source.randrange(iterations) for _ in range(kills)):
        starting = place == 0 or source.random() < 0.1
        delay = source.uniform(0, 0.5) if starting else source.uniform(0, 0.02)
        found.append(Kill(0 if starting else place, delay))
    return found


def _kill(process: subprocess.Popen[str]) -> None:
    # It may have ended by itself meanwhile.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and what it has started, and takes its exit code."""
    _kill(process)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()


def _last_words(code: int, errors: Path) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    text = errors.read_text(errors="replace").strip()
    return f"A process ended with {how}: {text[-_TAIL:] or 'it said nothing'}"
