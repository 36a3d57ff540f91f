"""A save that is killed with SIGKILL at any moment leaves the last good checkpoint as it was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer
from saving_programs import load_newest, save_and_die, save_for_ever

# The last two by way of a store, whose disk is this one's.
WAYS = [
    ("", "sync"),
    ("", "background"),
    ("", "same-name"),
    ("", "named"),
    ("file://", "background"),
    ("file://", "same-name"),
]
each_way = pytest.mark.parametrize(("scheme", "mode"), WAYS)
KILLS_AT_RANDOM = 20


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("saving_programs") as server:
        yield server


@each_way
def test_killed_at_each_system_call_of_a_save(
    server: ForkServer, tmp_path: Path, scheme: str, mode: str
) -> None:
    folder = f"{scheme}{tmp_path}"
    saved, kills, finished = 0, 0, False
    moment = 0
    while not finished:
        moment += 1
        for half in (False, True):
            value = saved + 1
            code = server.run(save_and_die, folder, mode, value, moment, half)
            finished = code == 0
            if not finished:
                assert code == -signal.SIGKILL
                kills += 1
            if not scheme and mode in ("sync", "background"):
                # What is unfinished has no name.
                assert all(name.endswith(".pt") for name in os.listdir(tmp_path))
            if saved or list(tmp_path.glob("*.pt")):
                found = load_newest(folder)
                assert found in (saved, value)
                saved = found
    # Opening, writing, flushing, naming, flushing the folder, removing: twice each.
    assert kills >= 20
    assert saved == value
    assert not list(tmp_path.glob(".crosstrain-*.tmp")), "the last start removes what is left over"


@each_way
def test_killed_at_random_moments(
    server: ForkServer, tmp_path: Path, scheme: str, mode: str
) -> None:
    told = tmp_path / "told"
    told.touch()
    folder = f"{scheme}{tmp_path}/checkpoints"
    draw = random.Random(mode)
    newest = 0
    for _ in range(KILLS_AT_RANDOM):
        pid = server.start(save_for_ever, folder, mode, newest + 1, str(told))
        while _told(told) <= newest:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert server.wait(pid) == -signal.SIGKILL
        on_disk = _told(told)
        newest = load_newest(folder)
        # What was reported as saved is there; the one after it may be.
        assert newest in (on_disk, on_disk + 1)


def _told(path: Path) -> int:
    return int(path.read_bytes() or b"0")
