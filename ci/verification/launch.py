"""The processes of one life of a training that is verified: one, or those of torchrun; no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .order import Order

__all__ = ["Launch"]

_LIFE: Final = "crosstrain.ci.verification.life"
_TAIL: Final = 2000


class Launch:
    """Starts the processes of one life; they end with it, whatever happens.

    Args:
        errors: the file for what they write to stderr.
        order: what they do; None: one process is started, which waits until `give` says.
        processes: how many torchrun starts, on this machine; 1: it is started without torchrun.
    """

    def __init__(self, errors: Path, order: Order | None = None, processes: int = 1) -> None:
        self._errors = errors
        self.processes = processes
        #: The process groups of torchrun's processes, by rank, as they tell them.
        self.groups: dict[int, int] = {}
        command = [sys.executable, "-m"]
        if processes > 1:
            assert order is not None
            # It makes folders of logs, of which there are none.
            logs = str(errors.with_suffix(".torchrun"))
            command += ["torch.distributed.run", "--standalone", "--log-dir", logs]
            command += ["--nproc-per-node", str(processes), "-m", _LIFE, order.as_json()]
        else:
            command.append(_LIFE)
        # A group of its own: a kill takes the loader's workers along, as a scheduler's does.
        with errors.open("w") as stderr:
            self._process: Any = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        if processes == 1 and order is not None:
            self.give(order)

    def give(self, order: Order) -> None:
        """Tells the process that waits for it what to do."""
        # If it has ended, reading its answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(order.as_json() + "\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Yields each line that the processes say, until they have ended."""
        for text in self._process.stdout:
            if text.endswith("\n"):  # it may be cut off by a kill
                yield text

    def wait(self) -> int:
        """Returns the exit code, or minus the signal: of the process, or of torchrun."""
        code: int = self._process.wait()
        return code

    def kill(self) -> None:
        """Kills all."""
        # It may have ended by itself meanwhile.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # torchrun's processes are in sessions of their own, and end when their stdin does.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill_rank(self, rank: int) -> None:
        """Kills one process, with its loader's workers, and leaves the others to torchrun."""
        if self.processes == 1:
            self.kill()
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.groups[rank], signal.SIGKILL)

    def close(self) -> None:
        """Kills what still runs, and takes the exit code."""
        self.kill()
        self._process.stdout.close()
        self._process.wait()

    def last_words(self, code: int) -> str:
        """Returns a sentence with the end of what was written to stderr.

        Args:
            code: what `wait` returned.
        """
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        text = self._errors.read_text(errors="replace").strip()
        return f"A process ended with {how}: {text[-_TAIL:] or 'it said nothing'}"
