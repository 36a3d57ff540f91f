"""The processes of a scenario: started ahead, given orders, followed, killed; without torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from .order import Order

__all__ = ["Life", "ScenarioFailed"]

_STOPPED = 128 + signal.SIGTERM
_TAIL = 2000


class ScenarioFailed(Exception):
    """A process of a scenario ended otherwise than it should; the message has its last words."""


class Life:
    """One process: a fresh interpreter, which imports torch while nothing is asked of it yet.

    Args:
        errors: the file for what it writes to stderr.
    """

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        self._killed = False
        # A group of its own: a kill takes the loader's workers along, as a scheduler's does.
        with errors.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "crosstrain.ci.trials.life"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    def probe(self, spec: str, target: str | None) -> dict[str, Any]:
        """Returns what the probe of a backend says, its `capabilities`, and how a target looks.

        Raises:
            ScenarioFailed: if the process ends instead.
        """
        self._send({"probe": spec, "target": target})
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            raise self._failure("")
        found: dict[str, Any] = json.loads(answer)
        return found

    def train(self, order: Order) -> Iterator[dict[str, Any]]:
        """Has it train, and yields what it says, until it ends.

        Raises:
            ScenarioFailed: if it ends before its run does and was neither stopped nor killed.
        """
        self._send({"train": order.as_json()})
        assert self._process.stdout is not None
        error = ""
        for text in self._process.stdout:
            if not text.endswith("\n"):
                break  # cut off by a kill
            line = json.loads(text)
            error = line.get("error", error)
            if "error" not in line:
                yield line
        code = self._process.wait()
        wanted = -signal.SIGKILL if self._killed else _STOPPED if order.stop_at else 0
        if code != wanted:
            raise self._failure(error)

    def kill(self, delay: float) -> None:
        """Kills it and its workers with SIGKILL, so many seconds from now."""
        time.sleep(delay)
        self._killed = True
        # It may have ended meanwhile, which its exit code will tell.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        # If it has ended, reading its answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _failure(self, error: str) -> ScenarioFailed:
        text = self._errors.read_text(errors="replace").strip()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return ScenarioFailed(f"A process ended with {how}: {error or text[-_TAIL:] or 'no word'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
