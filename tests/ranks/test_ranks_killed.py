"""Ranks that die: killed under torchrun, or left in a collective operation by one that fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SUPPORT
from rank_storm import signal_storm

from crosstrain.ci.cli import main
from crosstrain.ci.trials.digests import leaf_digests
from crosstrain.engine import Checkpoint

pytestmark = pytest.mark.usefixtures("forked_programs")

EXAMPLE = SUPPORT.parent.parent / "examples" / "digits.py"


def start(
    restarts: int, *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.Popen[str]:
    """Starts a script in several processes under torchrun, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(restarts), *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 150, errors: bool = False) -> str:
    """Waits for the end; returns what was printed, or what was printed as errors."""
    try:
        return process.communicate(timeout=seconds)[int(errors)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def process_of(agent: int, rank: int) -> int | None:
    """Returns the process id of a rank that an agent of torchrun has started."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
            variables = (place / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == agent and b"RANK=%d" % rank in variables:
            return int(place.name)
    return None


def state_of(folder: Path) -> dict[str, Any]:
    """Returns a digest of each value of the last checkpoint."""
    path = Checkpoint.latest(folder).path
    assert path is not None
    return leaf_digests(torch.load(path, weights_only=True), "state")


TRAINING = (str(EXAMPLE), "--backend", "cpu", "--epochs", "2", "--workers", "0", "--out")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last state of the example, run by two processes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(0, *TRAINING, str(folder))
    printed = finish(process)
    assert process.returncode == 0, printed
    return state_of(folder)


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    """Waits until a run has saved past its twentieth iteration."""
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoint_2?.pt")):
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.01)


@pytest.mark.slow
def test_rank_killed_and_restarted_by_torchrun(tmp_path: Path, straight: dict[str, Any]) -> None:
    """The example, unchanged: it ends with the bits of a run that nobody killed, in every value."""
    killed = start(1, *TRAINING, str(tmp_path))
    wait_for_checkpoint(killed, tmp_path)
    victim = process_of(killed.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    printed = finish(killed)
    assert killed.returncode == 0, printed
    assert "resumed from" in printed
    assert state_of(tmp_path) == straight


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["cpu", "cpu:fsdp"])
def test_traces_of_all_ranks_are_those_of_a_run_that_nobody_killed(
    tmp_path: Path, spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each rank has its own, without a gap; they are told apart by their batches."""
    for name, restarts, death in (("straight", 0, "0"), ("killed", 1, "7")):
        program = str(SUPPORT / "ranks_trace_program.py")
        process = start(restarts, program, name, spec, death, cwd=tmp_path)
        printed = finish(process)
        assert process.returncode == 0, printed
    for rank in ("", ".rank1"):
        straight, killed = (str(tmp_path / n / f"trace{rank}") for n in ("straight", "killed"))
        assert main(["diff", straight, killed]) == 0, capsys.readouterr().out
        shown = capsys.readouterr().out
        assert "iterations 1 to 12, resumed after 4" in shown
        assert "over 12 iterations" in shown
    first = str(tmp_path / "straight" / "trace")
    assert main(["diff", first, f"{first}.rank1"]) == 1
    assert "part at iteration 1 (epoch 1): the batch differs" in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_itself_is_asked_to_end(tmp_path: Path, straight: dict[str, Any]) -> None:
    """As a scheduler does: its ranks save, it does not restart them, and the next start goes on."""
    # The folder as people write it: as seen from where they are.
    process = start(3, *TRAINING, "run", cwd=tmp_path)
    wait_for_checkpoint(process, tmp_path / "run")
    os.kill(process.pid, signal.SIGTERM)
    printed = finish(process)
    assert process.returncode != 0
    assert printed.count("SIGTERM: saved at iteration") == 2, printed
    assert "resumed from" not in printed
    saved = Checkpoint.latest(tmp_path / "run").manifest
    assert saved is not None
    assert f"saved at iteration {saved.iteration};" in printed
    again = start(0, *TRAINING, "run", cwd=tmp_path)
    printed = finish(again)
    assert again.returncode == 0, printed
    assert "resumed from" in printed
    assert state_of(tmp_path / "run") == straight


def without_torchrun(how: str, size: int) -> list[subprocess.Popen[str]]:
    """Starts ranks by themselves: torchrun would end the others before they could say anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "ranks_fail_program.py"), how],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]


@pytest.mark.slow
def test_exception_on_one_rank_frees_the_others() -> None:
    """From the collective operation that they wait in; the cause is shown, and nobody hangs."""
    processes = without_torchrun("raise", 2)
    first, second = (finish(process, 120, errors=True) for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert "RankFailed: Rank 1 failed at iteration 3: ValueError: no such batch" in first
    assert "ValueError: no such batch" in second


@pytest.mark.slow
def test_rank_that_waits_in_vain_is_ended(tmp_path: Path) -> None:
    """One whose run has ended lives on, and the other waits for its gradients.

    Both have a thread that is no daemon and does nothing. What was waited in is shown.
    """
    program = str(SUPPORT / "ranks_fail_program.py")
    process = start(0, program, "stay", CROSSTRAIN_END_STUCK="3")
    printed = finish(process, 120)
    assert process.returncode == 1
    assert "The run has ended on rank 1 after 3 iterations" in printed
    assert "Rank 0 waits in vain and is ended" in printed
    assert "most recent call first" in printed
    assert "in backward" in printed


@pytest.mark.slow
def test_rank_that_was_killed_is_the_one_that_is_named() -> None:
    """Not the one whose connection breaks first: of four, three live and say the same."""
    processes = without_torchrun("killed", 4)
    printed = [finish(process, 120, errors=True) for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL, 1, 1]
    for rank in (0, 2, 3):
        (failure,) = re.findall(r"RankFailed: .*", printed[rank])
        assert failure.startswith("RankFailed: The process of rank 1 has ended"), printed


@pytest.mark.slow
def test_signals_at_random_moments(tmp_path: Path) -> None:
    """A short form of `python tests/stress/rank_storm.py --signals 100`."""
    wrong, _ = signal_storm("cpu", 10, 2, tmp_path / "storm", seed=7)
    assert not wrong
