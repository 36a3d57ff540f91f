"""Worlds of several processes, each told its place as torchrun does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from forked import ForkedPopen, run

from crosstrain.ci.trials.processes import torchrun as started_by

# The folder of the programs that tests start.
SUPPORT = Path(__file__).resolve().parent


def told_by(program: str, name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Runs a function of a program of the tests in a process; returns what it left in a folder."""
    command = [sys.executable, str(SUPPORT / program), name, str(folder), *arguments]
    subprocess.run(command, check=True, timeout=280)
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return told


def run_world(processes: int, program: str, *arguments: str, **extra: str) -> str:
    """Runs a program of the tests in a world of processes; returns what they printed.

    They are forked (see `forked`), and no torchrun looks after them: those that restart or kill a
    rank start it themselves.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile("w+") as printed:
        started = [
            ForkedPopen(
                [sys.executable, str(SUPPORT / program), *arguments],
                env={**os.environ, **world, **extra, "RANK": rank, "LOCAL_RANK": rank},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
            for rank in map(str, range(processes))
        ]
        try:
            codes = [process.wait(timeout=240) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        printed.seek(0)
        told = printed.read()
    assert codes == [0] * processes, told
    return told


def torchrun(processes: int, program: str, *arguments: str, **extra: str) -> str:
    """Runs a program of the tests under torchrun, all forked; returns what they printed."""
    command = [sys.executable, *started_by(processes), str(SUPPORT / program), *arguments]
    done = run(command, 240, env={**os.environ, **extra})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_program(program: str, *arguments: str, timeout: float = 120) -> None:
    """Runs a program of the tests alone, forked."""
    assert exit_of(program, *arguments, timeout=timeout) == 0


def exit_of(program: str, *arguments: str, timeout: float = 120) -> int:
    """Runs a program of the tests alone, forked; returns what it ended with."""
    command = [sys.executable, str(SUPPORT / program), *arguments]
    with ForkedPopen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            return process.wait(timeout)
        finally:
            process.kill()


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    """Reads what each rank of a world wrote."""
    return [json.loads((folder / f"{r}-of-{size}.json").read_text()) for r in range(size)]
