"""The matrix of signals in short: each moment, each receiver and each signal once."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from signal_matrix import Cell, play

pytestmark = pytest.mark.usefixtures("forked_programs")

CELLS = [
    Cell("loader", "group", signal.SIGTERM),
    Cell("last", "trainer", signal.SIGHUP),
    Cell("write", "group", signal.SIGINT),
    pytest.param(Cell("save", "rank", signal.SIGTERM), marks=pytest.mark.slow),
    pytest.param(Cell("evaluation", "torchrun", signal.SIGHUP), marks=pytest.mark.slow),
    # It reaches the ranks twice: by itself, and by way of torchrun.
    pytest.param(Cell("first", "all", signal.SIGINT), marks=pytest.mark.slow),
    pytest.param(Cell("between", "group", signal.SIGTERM), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_signal_ends_a_training_saved(cell: Cell, tmp_path: Path) -> None:
    _, wrong = play(cell, tmp_path, random.Random(str(cell)))
    assert not wrong, wrong
