"""Runs every scenario on every backend: each in a process of its own, several at a time.

A cell of the matrix is ``python -m crosstrain.ci.matrix.run_one SPEC SCENARIO --folder DIR``, which
writes ``DIR/outcome.json``, within a time limit. Whatever it starts carries a mark in its
environment, by which it is found and killed at the limit, whichever session or process group it
moved to. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
import uuid
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from crosstrain.ci.trials.processes import Child, ending, marked

from .outcome import OUTCOME, Cell, InvalidReport, Outcome

if TYPE_CHECKING:
    from .progress import PlainProgress

COMMAND = ("-m", "crosstrain.ci.matrix.run_one")

# Set in the environment of each cell, and so of all that it starts.
MARK = "CROSSTRAIN_CELL"

# How often running cells are looked at, in seconds.
_PERIOD = 0.05

# How much of a dead cell's stderr becomes its reason.
_TAIL_LINES, _TAIL_CHARACTERS = 15, 2000


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """What to run, and how.

    Args:
        folder: where the cells' folders are made; that of a cell that passed, or was skipped, is
            removed.
        timeout: how long a cell may take, in seconds.
        jobs: how many may run at a time.
        exclusive: specs whose device belongs to one process at a time.
        command: what follows `python`, and is followed by the cell's arguments.
    """

    cells: tuple[Cell, ...]
    folder: Path
    timeout: float
    jobs: int = 1
    exclusive: frozenset[str] = field(default_factory=frozenset[str])
    target: str | None = None
    command: tuple[str, ...] = COMMAND


def run_cells(plan: CellPlan, progress: PlainProgress) -> Generator[Outcome]:
    """Runs the cells and yields the outcome of each as it ends.

    Closing the generator, or an exception in it such as Ctrl-C's, kills the cells that run.
    """
    waiting = deque(plan.cells)
    running: list[_Process] = []
    try:
        while waiting or running:
            while len(running) < plan.jobs and (cell := _next(waiting, running, plan)):
                running.append(_Process(cell, plan))
                progress.started(cell)
            time.sleep(_PERIOD)
            for process in [one for one in running if one.is_over()]:
                outcome = process.finish()
                running.remove(process)
                # First, so that what was shown as ended was also kept if Ctrl-C comes now.
                yield outcome
                progress.ended(outcome)
    finally:
        for process in running:
            process.kill()


def _next(waiting: deque[Cell], running: list[_Process], plan: CellPlan) -> Cell | None:
    """Takes the first cell that waits for no device."""
    busy = any(one.cell.spec in plan.exclusive for one in running)
    for cell in waiting:
        if not (busy and cell.spec in plan.exclusive):
            waiting.remove(cell)
            return cell
    return None


class _Process:
    """A cell's process."""

    def __init__(self, cell: Cell, plan: CellPlan) -> None:
        self.cell = cell
        self._timeout = plan.timeout
        self._folder = plan.folder / cell.folder
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._mark = uuid.uuid4().hex
        command = [*plan.command, cell.spec, cell.scenario, "--folder", str(self._folder)]
        if plan.target is not None:
            command += ["--target", plan.target]
        # As many threads in all as there are cores: more would wait for each other.
        threads = max(1, len(os.sched_getaffinity(0)) // plan.jobs)
        variables = {MARK: self._mark}
        if "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(threads)
        self._began = time.monotonic()
        self._process = Child(
            command, output=self._log("stdout"), errors=self._log("stderr"), variables=variables
        )

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.txt"

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def is_over(self) -> bool:
        """Whether it has ended or has to be."""
        return self._process.poll() is not None or self._seconds() > self._timeout

    def kill(self) -> None:
        """Kills it and whatever it started, and waits for it."""
        self._process.close()
        _kill_marked(self._mark)

    def finish(self) -> Outcome:
        """Gives its outcome; kills it if it runs, and whatever it has left behind."""
        code, seconds = self._process.poll(), self._seconds()
        self.kill()
        found = self._written(code)
        if isinstance(found, Outcome):
            if found.status in ("passed", "skipped"):
                shutil.rmtree(self._folder, ignore_errors=True)
            return found
        text = self._log("stderr").read_bytes().decode(errors="replace").strip()
        tail = "\n".join(text.splitlines()[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]
        said = f"The end of its stderr:\n{tail}" if tail else "Its stderr is empty."
        return Outcome(
            spec=self.cell.spec,
            scenario=self.cell.scenario,
            status="timeout" if code is None else "error",
            reason=f"{found}\n{said}",
            seconds=seconds,
        )

    def _written(self, code: int | None) -> Outcome | str:
        """Returns the outcome that it has written, or why there is none."""
        if code is None:
            return (
                f"It had not ended after {self._timeout:g} s and was killed; "
                "`--timeout SECONDS` gives it longer."
            )
        try:
            outcome = Outcome.read(self._folder / OUTCOME)
        except FileNotFoundError:
            return f"It ended with {ending(code)} before it wrote an outcome."
        except (InvalidReport, OSError) as error:
            return f"Its outcome cannot be read: {error}."
        if outcome.cell != self.cell:
            return f"It wrote the outcome of another cell: {outcome.scenario} on {outcome.spec}."
        return outcome


def _kill_marked(mark: str) -> None:
    """Kills every process that carries a mark, until there is none left."""
    while found := marked(f"{MARK}={mark}"):
        for process in found:
            # It may have ended meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(_PERIOD)
