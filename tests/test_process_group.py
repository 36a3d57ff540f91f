"""Several processes: joining and leaving the process group, and the gradients that they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosstrain.backends import BackendError, get

TESTS = Path(__file__).parent


def torchrun(processes: int, program: str, *arguments: str, **extra: str) -> str:
    """Runs a program of the tests in a world of processes; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    command += ["--nproc-per-node", str(processes), str(TESTS / program), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **extra}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    """Reads what each rank of a world wrote."""
    return [json.loads((folder / f"{r}-of-{size}.json").read_text()) for r in range(size)]


def test_processes_train_as_one(tmp_path: Path) -> None:
    """Two and four processes end with the weights of one, and each rank with the same bits."""
    subprocess.run(
        [sys.executable, str(TESTS / "ranks_program.py"), str(tmp_path)], check=True, timeout=120
    )
    (alone,) = results(tmp_path, 1)
    assert alone["wrapped"] == "Sequential"
    for size in (2, 4):
        torchrun(size, "ranks_program.py", str(tmp_path))
        told = results(tmp_path, size)
        assert [one["rank"] for one in told] == list(range(size))
        # Within a window nothing is shared yet.
        assert len({tuple(one["kept"]) for one in told}) == size
        for one in told:
            assert one["wrapped"] == "DistributedDataParallel"
            assert one["weights"] == told[0]["weights"]
            for mine, theirs in zip(one["weights"], alone["weights"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-12)


def test_address_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-set environment is an error that names what is missing."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(BackendError, match=r"MASTER_ADDR is not set, but WORLD_SIZE=2"):
        get("cpu").open()


def test_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A world that does not come together is an error after the timeout, and nothing stays open."""
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": "1", "CROSSTRAIN_TIMEOUT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=r"Rank 1 of 2 could not join .* 127.0.0.1:1"):
        get("cpu").open()
    monkeypatch.setenv("CROSSTRAIN_TIMEOUT", "soon")
    with pytest.raises(BackendError, match=r"CROSSTRAIN_TIMEOUT='soon' is no number"):
        get("cpu").open()
