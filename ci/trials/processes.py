"""Child processes: how each one that ci starts is started, followed and killed; without torch.

`Child` is any command, alone or under torchrun. `TrainingChild` trains: it takes an `Order` and
tells what it does (`crosstrain.ci.trials.child` is the other end). A `Relay` starts one after the
other. Whatever happens to their starter, they end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from .course import Course
from .order import UNUSABLE, Order

#: The exit code of a process that SIGTERM has stopped.
STOPPED: Final = 128 + signal.SIGTERM
_CHILD: Final = "crosstrain.ci.trials.child"
# How much of what a process wrote to stderr is told.
_TAIL: Final = 2000
# What torchrun gets to end its processes, which are in sessions of their own.
_GRACE: Final = 10.0


class TrainingFailed(Exception):
    """A process ended otherwise than it should; the message has its last words."""


def torchrun(processes: int, *options: object) -> list[str]:
    """Returns what follows `python` to start several processes on this machine."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    return [*words, "--nproc-per-node", str(processes), *map(str, options)]


def ending(code: int) -> str:
    """Returns how a process ended, such as `exit code 3` or `signal SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def marked(text: str) -> list[int]:
    """Returns the processes that have a text in their environment, such as `NAME=value`."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        # It may end while we look, or be another user's.
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


class Child:
    """A process in a group of its own: a kill takes its workers along, as a scheduler's does.

    Use it as a context manager, or call `close`.

    Args:
        command: what follows `python`.
        output: the file for what it writes to stdout; None: it is read by `lines` or `text`.
        errors: the file for what it writes to stderr; None: that goes where stdout does.
        variables: what is set in its environment besides ours.
        folder: where it runs; None: here.
        orders: whether it is written to. It is told by the end of its stdin that we have gone.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        output: Path | None = None,
        errors: Path | None = None,
        variables: Mapping[str, str] | None = None,
        folder: Path | None = None,
        orders: bool = False,
    ) -> None:
        self._errors = errors
        self._timers: list[threading.Timer] = []
        #: Whether we have killed it.
        self.killed = False
        with contextlib.ExitStack() as files:
            out = subprocess.PIPE if output is None else files.enter_context(output.open("wb"))
            err = subprocess.STDOUT if errors is None else files.enter_context(errors.open("wb"))
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE if orders else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                errors="replace",
                cwd=folder,
                env=None if variables is None else {**os.environ, **variables},
                start_new_session=True,
            )

    def write(self, line: str) -> None:
        """Writes a line to its stdin."""
        assert self._process.stdin is not None
        # If it has ended, reading its answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields each line of JSON that it writes to stdout, until it has ended."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.endswith("\n"):  # it may be cut off by a kill
                yield json.loads(text)

    def text(self, timeout: float | None = None) -> str:
        """Returns all that it writes to stdout, once it has ended."""
        found: str = self._process.communicate(timeout=timeout)[0]
        return found

    def poll(self) -> int | None:
        """Returns the exit code, or minus the signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Waits for its end; returns the exit code, or minus the signal."""
        code = self._process.wait()
        self._cancel()
        return code

    def kill(self) -> None:
        """Kills it and its workers with SIGKILL."""
        self.killed = True
        self._kill()

    def _kill(self) -> None:
        self._kill_group(self._process.pid)
        # Those of torchrun are in sessions of their own, and end when their stdin does.
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def kill_after(self, seconds: float) -> None:
        """Kills it so many seconds from now, unless it has been closed until then."""
        self._later(seconds, self.kill)

    def _later(self, seconds: float, strike: Any, *arguments: Any) -> None:
        self._timers.append(threading.Timer(seconds, strike, arguments))
        self._timers[-1].start()

    def _cancel(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _kill_group(self, group: int) -> None:
        # It may have ended by itself meanwhile.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)

    def end(self) -> int:
        """Ends it by SIGTERM, upon which torchrun ends its processes, then kills what is left."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
        self.close()
        return self._process.returncode

    def close(self) -> None:
        """Kills what still runs of it, and takes the exit code."""
        self._cancel()
        self._kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process.wait()

    def last_words(self, code: int, error: str = "") -> str:
        """Returns a sentence about its end."""
        text = "" if self._errors is None else self._errors.read_text(errors="replace").strip()
        return f"A process ended with {ending(code)}: {error or text[-_TAIL:] or 'it said nothing'}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Kill(NamedTuple):
    """When a process that trains shall be killed, by SIGKILL.

    Args:
        at: once it has done this iteration; 0: once it has got its order.
        delay: so many seconds later.
        rank: which of those that torchrun has started, so that torchrun ends the others; None: all.
    """

    at: int
    delay: float = 0.0
    rank: int | None = None


class TrainingChild(Child):
    """A process that trains, or those of torchrun: each a fresh interpreter.

    A single one imports torch while nothing is asked of it yet, and waits until `give` says what it
    does. Those of torchrun, which share a stdin, get their order when they are started.
    """

    def __init__(self, errors: Path, order: Order | None = None, processes: int = 1) -> None:
        self.processes = processes
        self._order = order
        #: The exit code, or minus the signal, once they have been followed to their end.
        self.code = 0
        #: The last iteration that they have told.
        self.last = 0
        #: The first error that they have told: what others raise because of it comes later.
        self.error = ""
        self._due: Kill | None = None
        # The process groups and the exit codes of torchrun's processes, by rank.
        self._groups: dict[int, int] = {}
        self._codes: dict[int, int] = {}
        command = ["-m", _CHILD]
        if processes > 1:
            assert order is not None
            # It makes folders of logs, of which there are none.
            logs = str(errors.with_suffix(".torchrun"))
            command = [*torchrun(processes, "--log-dir", logs), *command, order.as_json()]
        super().__init__(command, errors=errors, orders=True)
        if processes == 1 and order is not None:
            self.give(order)

    def give(self, order: Order) -> None:
        """Tells the process that waits for it what to do."""
        self._order = order
        self.write(json.dumps({"train": order.as_json()}))

    def probe(self, spec: str, target: str | None) -> dict[str, Any]:
        """Returns what the probe of a backend says, its `capabilities`, and how a target looks."""
        self.write(json.dumps({"probe": spec, "target": target}))
        answer = next(self.lines(), None)
        if answer is None:
            raise TrainingFailed(self.last_words(self.wait()))
        return answer

    def follow(self, course: Course, kill: Kill | None = None) -> Iterator[dict[str, Any]]:
        """Yields what the processes say until they have ended, and notes it in a run's course.

        Args:
            course: that of the run which their order is a part of.
            kill: when to kill one of them; None: never.
        """
        began = time.monotonic()
        self._due = kill
        self._kill_if_due()
        for line in self.lines():
            self._take(line)
            course.take(line)
            yield line
        self.code = self.wait()
        course.kills += self.code == -signal.SIGKILL
        course.stops += self.code == STOPPED
        course.seconds += time.monotonic() - began

    def _take(self, line: Mapping[str, Any]) -> None:
        if "born" in line:
            self._groups[line["rank"]] = line["born"]
        elif "left" in line:
            self._codes[line.get("rank", 0)] = line["left"]
        self.error = self.error or line.get("error", "")
        self.last = line.get("iteration") or line.get("resumed_from") or self.last
        self._kill_if_due()

    def wait(self) -> int:
        """Waits for their end; returns the exit code, or minus the signal, of one of them."""
        code = super().wait()
        codes = set(self._codes.values())
        # Of several torchrun ends with 0, or with 1 whatever theirs are.
        if self.processes == 1 or code == 0:
            return code
        if self.killed:
            # What the others raised is that it is missing.
            self.error = ""
            return -signal.SIGKILL
        if UNUSABLE in codes:
            return UNUSABLE
        return codes.pop() if len(self._codes) == self.processes and len(codes) == 1 else code

    def _kill_if_due(self) -> None:
        kill = self._due
        if kill is None or self.last < kill.at:
            return
        rank = None if self.processes == 1 else kill.rank
        # A process of torchrun's takes a while to be there.
        if rank is None or rank in self._groups:
            self._due = None
            self._later(kill.delay, self._kill_rank, rank)

    def train(self, course: Course, kill: Kill | None = None) -> Iterator[dict[str, Any]]:
        """Follows processes that are to carry out their order; see `follow`.

        Raises:
            TrainingFailed: if they end before their run does and were neither stopped nor killed.
        """
        yield from self.follow(course, kill)
        stopped = self._order is not None and self._order.stop_at
        wanted = -signal.SIGKILL if self.killed else STOPPED if stopped else 0
        if self.code != wanted:
            raise TrainingFailed(self.last_words(self.code, self.error))

    def _kill_rank(self, rank: int | None) -> None:
        """Kills one process, with its loader's workers, and leaves the others to torchrun."""
        if rank is None:
            self.kill()
        else:
            self.killed = True
            self._kill_group(self._groups[rank])


class Relay:
    """Training processes, one after the other; each is started while the one before it trains.

    Args:
        folder: for what the processes write to stderr.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = 0
        #: Those that wait for an order.
        self.waiting: deque[TrainingChild] = deque()

    def start_ahead(self, number: int) -> None:
        """Starts processes until so many wait for an order."""
        while len(self.waiting) < number:
            self.waiting.append(TrainingChild(self._errors()))

    def begin(self, order: Order, processes: int = 1) -> TrainingChild:
        """Has a process carry out an order, or several, which torchrun starts with it."""
        if processes > 1 or not self.waiting:
            return TrainingChild(self._errors(), order, processes)
        child = self.waiting.popleft()
        child.give(order)
        return child

    def _errors(self) -> Path:
        self._started += 1
        return self._folder / f"process_{self._started}.txt"

    def close(self) -> None:
        """Ends those that wait."""
        for child in self.waiting:
            child.close()
