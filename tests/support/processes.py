"""Worlds of several processes, started by torchrun for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# The folder of the programs that tests start.
SUPPORT = Path(__file__).resolve().parent


def torchrun(processes: int, program: str, *arguments: str, **extra: str) -> str:
    """Runs a program of the tests in a world of processes; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc-per-node", str(processes), str(SUPPORT / program), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    """Reads what each rank of a world wrote."""
    return [json.loads((folder / f"{r}-of-{size}.json").read_text()) for r in range(size)]
