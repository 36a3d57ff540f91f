"""A kill of any rank, at any moment of a save, leaves the last good sharded checkpoint."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SUPPORT

from crosstrain.engine import Checkpoint, read_checkpoint

pytestmark = pytest.mark.usefixtures("forked_programs")

PROGRAM = SUPPORT / "sharded_storm_program.py"


def kill_one(folder: Path, kind: str, draw: random.Random) -> tuple[int, int]:
    """Starts two ranks, kills one while they save; returns what was good before and after.

    They are started as torchrun would start them, without its start of several seconds.
    """
    before = Checkpoint.latest(folder)
    for mark in folder.glob("pid-*"):
        mark.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks: list[subprocess.Popen[bytes]] = []
    with (folder.parent / "log").open("wb") as log:
        for rank in ("0", "1"):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, str(PROGRAM), str(folder), kind]
            ranks.append(
                subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **world})
            )
        try:
            marks = [folder / "pid-0", folder / "pid-1"]
            end = time.monotonic() + 120
            while not all(mark.exists() for mark in marks):
                assert all(rank.poll() is None for rank in ranks), _read(folder)
                assert time.monotonic() < end, "the ranks did not start"
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 2.0))
            assert all(rank.poll() is None for rank in ranks), _read(folder)
            killed, other = draw.sample(ranks, 2)
            killed.kill()
            # The other one finds out by itself, from the connection.
            assert other.wait(timeout=60) != 0, _read(folder)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    after = Checkpoint.latest(folder)
    return _iteration(before), check(folder, after)


def _read(folder: Path) -> str:
    return (folder.parent / "log").read_text()


def _iteration(latest: Any) -> int:
    return 0 if latest.manifest is None else latest.manifest.iteration or 0


def check(folder: Path, latest: Any) -> int:
    """Makes sure that whatever has a checkpoint's name is whole and of one save."""
    assert not latest.passed_over, latest.describe()
    for path in folder.glob("*.sharded"):
        count = int(path.stem.split("_")[1])
        state = read_checkpoint(path)
        values: list[torch.Tensor] = [*state["model"].values()]
        values += [one["momentum_buffer"] for one in state["optimizer"]["state"].values()]
        assert len(values) == 8
        assert all(bool((value == count).all()) for value in values), path
    return _iteration(latest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "background"])
def test_kill_of_any_rank(tmp_path: Path, kind: str) -> None:
    """The next start finds the newest whole checkpoint, tidies up and goes on from there."""
    storm(tmp_path / "run", kind, kills=2, seed=7)


def storm(folder: Path, kind: str, kills: int, seed: int) -> int:
    """Kills again and again; returns the number of saves."""
    folder.mkdir()
    draw = random.Random(seed)
    newest = 0
    for done in range(kills):
        before, after = kill_one(folder, kind, draw)
        assert before == newest, "nothing is lost between the runs"
        assert after >= before
        newest = after
        print(f"kill {done + 1}: saves up to {newest} are whole", flush=True)
    assert newest > 0, "no save came to its end"
    return newest


if __name__ == "__main__":
    # By hand: test_sharded_kills.py FOLDER KIND KILLS
    print(storm(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), seed=int(sys.argv[3])))
