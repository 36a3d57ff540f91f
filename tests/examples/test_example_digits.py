"""examples/digits.py, unchanged, on each backend that is here: killed, resumed, carried over."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import digits_program
import forked
import on_xla
import pytest
from digits_program import ITERATIONS, run_example
from fork_server import ForkServer

SPECS = [
    # cpu:fp16 goes on exactly from each iteration in tests/exact; a CPU takes its time over it.
    *("cpu", "cpu:bf16"),
    pytest.param("xla", marks=on_xla.needs_xla),
    pytest.param("xla:bf16", marks=on_xla.needs_xla),
    pytest.param("xla-spmd", marks=on_xla.needs_xla),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    names = ("digits_program", "torch._dynamo", "crosstrain.backends.cpu", *on_xla.PRELOAD)
    with ForkServer(*names) as server:
        yield server


class Example:
    """Runs the script again and again in one folder, on one backend after another."""

    def __init__(self, server: ForkServer, place: Path) -> None:
        self._server, self._place = server, place
        place.mkdir()

    def run(self, spec: str, workers: int = 0, **stop: str) -> int:
        """Runs it; `stop` is from `at_37` to the signal that it gets after iteration 37."""
        signals = {name.removeprefix("at_"): value for name, value in stop.items()}
        folder, report = str(self._place / "checkpoints"), str(self._place / "report")
        environment = {"CPU_NUM_DEVICES": "2"} if spec == "xla-spmd" else {}
        return self._server.run(run_example, folder, report, spec, workers, signals, environment)

    def rows(self) -> list[Any]:
        return [json.loads(line) for line in (self._place / "report").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(
    server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Any]]:
    """Gives what a run on a backend does that nobody stops; each is run once for all tests."""

    @functools.cache
    def rows(spec: str) -> list[Any]:
        straight = Example(server, tmp_path_factory.mktemp("straight") / "example")
        assert straight.run(spec) == 0
        return straight.rows()

    return rows


@pytest.fixture
def example(server: ForkServer, tmp_path: Path) -> Example:
    return Example(server, tmp_path / "example")


@pytest.mark.parametrize("spec", SPECS)
def test_killed_on_each_backend_it_ends_with_the_same_bits(
    undisturbed: Callable[[str], list[Any]], example: Example, spec: str
) -> None:
    straight = undisturbed(spec)
    assert example.run(spec, workers=1, at_17="SIGKILL") == -signal.SIGKILL
    assert example.run(spec, at_44="SIGKILL") == -signal.SIGKILL
    assert example.run(spec) == 0
    rows = example.rows()
    # Every tenth iteration is saved, in the background: some are done twice.
    assert len(rows) > ITERATIONS + 1
    assert {row[0]: row[1:] for row in rows} == {row[0]: row[1:] for row in straight}
    assert all(row in straight for row in rows)


@pytest.mark.parametrize(
    "stations",
    [
        ("cpu", "cpu:bf16", "cpu"),
        ("cpu", "cpu:fp16", "cpu"),
        pytest.param(("cpu", "xla", "cpu"), marks=on_xla.needs_xla),
        pytest.param(("xla", "xla:bf16", "cpu"), marks=on_xla.needs_xla),
    ],
    ids=" ".join,
)
def test_its_checkpoint_is_carried_to_another_backend(
    undisturbed: Callable[[str], list[Any]], example: Example, stations: tuple[str, str, str]
) -> None:
    for spec, stop in zip(stations, ({"at_13": "SIGTERM"}, {"at_41": "SIGTERM"}, {}), strict=True):
        assert example.run(spec, **stop) == 0
    rows, wanted = example.rows(), undisturbed(stations[0])
    iterations = [row for row in rows if row[0] != "end"]
    assert [row[0] for row in iterations] == list(range(1, ITERATIONS + 1))
    assert [row[1] for row in iterations] == [row[1] for row in wanted[:-1]]
    # Dropout draws other numbers elsewhere, so the losses are those of another run as good.
    assert rows[-1] != wanted[-1]
    assert loss(rows) == pytest.approx(loss(wanted), rel=0.1)


def loss(rows: list[Any]) -> float:
    """The mean loss of the last ten iterations."""
    return sum(float.fromhex(row[2]) for row in rows[-11:-1]) / 10


def test_the_command_line_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, str(digits_program.SCRIPT), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PJRT_DEVICE": "NEURON"}
    done = forked.run([*command, "--backend", "xla"], env=environment)
    assert done.returncode == 1
    assert "torch_xla is not installed" in done.stderr or "PJRT_DEVICE is 'NEURON'" in done.stderr
