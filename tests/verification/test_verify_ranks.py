"""`verify` of a training in several processes: all are stopped, one is killed, all are compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedPopen, prepare
from processes import SUPPORT

from crosstrain.ci import VerifyError, cli, verify
from crosstrain.ci.trials.processes import marked

TARGETS = SUPPORT / "verify_targets.py"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the processes that a test starts, and torchrun's, forked off one that knows torch."""
    # What it shows as its environment is not to have this module's mark.
    prepare()
    monkeypatch.setattr(subprocess, "Popen", ForkedPopen)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_an_exact_training_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Parts of the weights, and a loss scale of all.
    backend = "cpu:fsdp-fp16"
    report = tmp_path / "verdict.json"
    command = ["verify", f"{TARGETS}:exact", "--backend", backend, "--nproc-per-node", "2"]
    options = ["--at", "6", "--kills", "1", "--workers", "0,1", "--keep", str(tmp_path / "kept")]
    assert cli.main([*command, *options, "--json", str(report)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"on {backend} in 2 processes, 12 iterations" in said
    assert "It resumes exactly" in said
    verdict: dict[str, Any] = json.loads(report.read_text())
    assert verdict["nproc_per_node"] == 2
    stopped, killed = verdict["runs"]
    # The signal reached both, and both saved the iteration in which it did.
    assert stopped["resumed_from"] == [6]
    assert killed["killed"] == 1
    for run in ("straight", "stopped after 6", "killed 1 time"):
        traces = [tmp_path / "kept" / f"{run}.trace{end}" for end in ("", ".rank1")]
        assert all(trace.is_file() for trace in traces)
        assert traces[0].read_bytes() != traces[1].read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_fault_of_one_rank_is_named_with_it() -> None:
    """Its batches part the weights of all, and these are not what is told."""
    verdict = verify(f"{TARGETS}:own_generator_on_rank_1", nproc_per_node=2, at=[8], kills=0)
    assert verdict.status == "not exact"
    difference = verdict.difference
    assert difference is not None
    assert difference.thing is not None
    assert (difference.rank, difference.iteration) == (1, 9)
    assert difference.thing.kind == "batch"
    assert str(difference) == "iteration 9 (epoch 2) on rank 1: the batch differs"
    assert "current_sample" in " ".join(verdict.causes)
    assert verdict.as_json()["difference"]["rank"] == 1


@pytest.mark.usefixtures("forked")
def test_what_a_rank_raises_is_told() -> None:
    # One may be told of the other's end before it comes to the same place.
    with pytest.raises(VerifyError, match=r"Rank [01].*: RuntimeError: the third iteration is bad"):
        verify(f"{TARGETS}:fails", nproc_per_node=2)


MARK = "CROSSTRAIN_TEST_OF_VERIFY"


def none_left(mark: str) -> bool:
    deadline = time.monotonic() + 20
    while marked(f"{MARK}={mark}") and time.monotonic() < deadline:
        time.sleep(0.1)
    return not marked(f"{MARK}={mark}")


@pytest.mark.usefixtures("forked")
def test_the_time_limit_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    with pytest.raises(VerifyError, match=r"limit of 6 s is over.*--time-limit"):
        verify(f"{TARGETS}:sleeps", nproc_per_node=2, time_limit=6)
    assert none_left(str(tmp_path))


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_its_processes_end_with_it(number: signal.Signals, size: int, tmp_path: Path) -> None:
    """And torchrun's folders of logs go, where it can still remove them."""
    command = [sys.executable, "-m", "crosstrain.ci.cli", "verify", f"{TARGETS}:sleeps"]
    process = subprocess.Popen(
        [*command, "--nproc-per-node", str(size)],
        env={**os.environ, "TMPDIR": str(tmp_path), MARK: str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    # Itself, and one that waits for its order or torchrun; and what forks theirs off.
    while len(marked(f"{MARK}={tmp_path}")) < 3 + size + (size > 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # They begin to train.
    time.sleep(4)
    process.send_signal(number)
    process.wait(timeout=30)
    assert none_left(str(tmp_path))
    left = [place for place in tmp_path.iterdir() if not place.name.startswith("torchinductor")]
    assert len(left) == (number == signal.SIGKILL), left


def test_under_torchrun_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**world, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["verify", f"{TARGETS}:exact"]) == 2
    assert "without torchrun, and say how many by --nproc-per-node" in capsys.readouterr().err


def test_no_process_is_too_few() -> None:
    with pytest.raises(VerifyError, match=r"nproc_per_node is at least 1; got \[2, 0\]"):
        verify(f"{TARGETS}:exact", nproc_per_node=[2, 0])
    with pytest.raises(VerifyError, match="nproc_per_node is at least 1; got 0"):
        verify(f"{TARGETS}:exact", nproc_per_node=0)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_training_in_logical_shards_is_exact_on_any_number_of_processes() -> None:
    verdict = verify(f"{TARGETS}:shards", nproc_per_node=[2, 1], at=[5], kills=0)
    assert verdict.status == "exact"
    assert verdict.nproc_per_node == (2, 1)
    [run] = verdict.runs
    assert run.resumed_from == (5,)
