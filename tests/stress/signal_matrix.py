"""Each signal at each moment to each receiver: `python tests/stress/signal_matrix.py`.

A cell of the matrix is one training, `tests/support/signals_program.py`, or one `crosstrain verify`
or `crosstrain matrix`, which gets one signal at one moment and has a limited time to end. Right is

- saved: the newest checkpoint is good and is that of the iteration at which all ranks ended, which
  exit with 128 and the signal's number; or the run was over when the signal came;
- ended: it dies of the signal, or says why it ends, where nothing listens for signals: between two
  runs, and in the commands. The newest checkpoint, if there is one, is good;

and no process is left. What else happens is told in full, and the exit code is 1.

    python tests/stress/signal_matrix.py [--only TEXT] [--repeat N] [--receivers trainer group ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crosstrain.ci.trials.processes import ending, marked, torchrun
from crosstrain.engine import Checkpoint, CheckpointError

__all__ = ["Cell", "cells", "main", "play"]

_PROGRAM = Path(__file__).resolve().parent.parent / "support" / "signals_program.py"
MOMENTS = ("loader", "first", "last", "evaluation", "save", "write", "between")
COMMANDS = ("verify", "matrix")
#: `all` is what SLURM sends to: each process of the job, workers too.
RECEIVERS = ("trainer", "group", "rank", "torchrun", "all")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_END_OF_RUN = 12
# Seconds: to come to the moment, and to end.
_TO_BEGIN, _TO_END = 120.0, 90.0
_MARK = "CROSSTRAIN_TEST_CELL"


@dataclass(frozen=True)
class Cell:
    """One signal at one moment to one receiver."""

    moment: str
    receiver: str
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.moment} / {self.receiver} / {self.signal.name}"

    @property
    def many(self) -> bool:
        """Whether it is a training of two ranks, under torchrun."""
        return self.receiver in ("rank", "torchrun", "all")

    @property
    def listens(self) -> bool:
        """Whether the training listens for signals at that moment."""
        return self.moment in MOMENTS and self.moment != "between"


def cells(receivers: Sequence[str] = RECEIVERS) -> list[Cell]:
    """Returns the cells of the matrix."""
    found = [Cell(m, r, s) for m in MOMENTS for r in receivers for s in SIGNALS]
    alone = [r for r in receivers if r in ("trainer", "group")]
    return found + [Cell(c, r, s) for c in COMMANDS for r in alone for s in SIGNALS]


def play(cell: Cell, folder: Path, draw: random.Random) -> tuple[str, str]:
    """Plays a cell.

    Args:
        cell: the cell.
        folder: an empty folder.
        draw: how long after the moment has come the signal is sent.

    Returns:
        In a word or two what came of it, and what is wrong; empty: nothing.
    """
    name = f"{os.getpid()}-{folder.name}"
    # Each process that it starts has it in its environment, however it moves.
    mark = f"{_MARK}={name}"
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *_command(cell, folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CROSSTRAIN_TIMEOUT": "60", _MARK: name},
            cwd=folder,
            start_new_session=True,
        )
    try:
        wrong = _wait_for_moment(cell, folder, process)
        if not wrong:
            time.sleep(draw.uniform(0, 0.3))
            _send(cell, process.pid, mark)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TO_END)
            if process.poll() is None:
                wrong = f"did not end in {_TO_END:g} s"
        outcome = "hung" if wrong else ""
        if not wrong:
            outcome, wrong = _judge(cell, folder, process.returncode)
            wrong = wrong or _left(mark)
    finally:
        for left in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait()
    said = (folder / "output").read_text(errors="replace").strip()
    return outcome, f"{wrong}\n{said[-3000:]}" if wrong else ""


def _command(cell: Cell, folder: Path) -> list[str]:
    crosstrain = ["-c", "import sys; from crosstrain.ci.cli import main; sys.exit(main())"]
    if cell.moment == "verify":
        target = f"{_PROGRAM.with_name('verify_targets.py')}:exact"
        return [*crosstrain, "verify", target, "--kills", "20"]
    if cell.moment == "matrix":
        return [*crosstrain, "matrix", "--backends", "cpu", "--report", str(folder / "out")]
    program = [str(_PROGRAM), str(folder), cell.moment]
    return [*torchrun(2), *program] if cell.many else program


def _wait_for_moment(cell: Cell, folder: Path, process: subprocess.Popen[bytes]) -> str:
    """Returns what is wrong; empty once the moment has come."""
    deadline = time.monotonic() + _TO_BEGIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"{ending(process.returncode)} before the moment came"
        if cell.moment in COMMANDS:
            # It has children once it is at work.
            if len(_children(process.pid)) > 0:
                time.sleep(3)
                return ""
        elif (folder / "at").exists():
            return ""
        time.sleep(0.01)
    return f"the moment did not come in {_TO_BEGIN:g} s"


def _send(cell: Cell, process: int, mark: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        if cell.receiver in ("trainer", "torchrun"):
            os.kill(process, cell.signal)
        elif cell.receiver == "group":
            os.killpg(process, cell.signal)
        elif cell.receiver == "rank":
            (rank,) = set(_children(process)) & set(marked("\0RANK=1\0"))
            os.kill(rank, cell.signal)
        else:
            for each in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, cell.signal)


def _judge(cell: Cell, folder: Path, code: int) -> tuple[str, str]:
    """Returns the outcome, and what is wrong with it."""
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("end-*.json"))]
    saved: int | None = None
    if (folder / "run").is_dir():
        try:
            latest = Checkpoint.latest(folder / "run")
        except CheckpointError as error:
            return "bad checkpoint", str(error)
        if latest.passed_over:
            return "bad checkpoint", latest.describe()
        saved = None if latest.manifest is None else latest.manifest.iteration
    if not cell.listens:
        if code == 0 or (cell.moment == "between" and saved != _END_OF_RUN // 2):
            return "not ended", f"{ending(code)}, saved at {saved}"
        return f"ended, {ending(code)}", ""
    stopped = 128 + cell.signal
    ends = {(one["iteration"], one["code"]) for one in told}
    if len(told) != (2 if cell.many else 1) or len(ends) != 1:
        return f"unsaved, {ending(code)}", f"the ranks ended with {told}; saved at {saved}"
    ((iteration, own),) = ends
    over = iteration == _END_OF_RUN and own == 0
    # torchrun has an exit code of its own.
    right = {0} if over else {stopped}
    if own not in right or saved != iteration or (not cell.many and code != own):
        return f"wrong end, {ending(code)}", f"the ranks ended with {told}; saved at {saved}"
    return ("over" if over else f"saved, {own}"), ""


def _left(mark: str) -> str:
    deadline = time.monotonic() + 20
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = marked(mark)
    return f"{len(left)} processes are left" if left else ""


def _children(process: int) -> list[int]:
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line; plays the cells and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a part of a cell's name")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receivers", nargs="+", default=RECEIVERS, choices=RECEIVERS)
    given = parser.parse_args(arguments)
    for number in SIGNALS:
        # What was started by nohup, or with an &, ignores some, and its children would.
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    draw, bad = random.Random(given.seed), 0
    for cell in (one for one in cells(given.receivers) if given.only in str(one)):
        for _ in range(given.repeat):
            with tempfile.TemporaryDirectory() as name:
                began = time.monotonic()
                outcome, wrong = play(cell, Path(name), draw)
            took = time.monotonic() - began
            print(f"{'WRONG' if wrong else 'ok':<6}{cell!s:<36}{outcome:<24}{took:5.1f} s")
            if wrong:
                bad += 1
                print("    " + wrong.replace("\n", "\n    "))
            sys.stdout.flush()
    print(f"{bad} cells are wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
