"""XLA on several devices by SPMD: batches are divided, numbers stay right, bits repeat.

Runs where torch_xla is installed and PJRT_DEVICE=CPU: `tox -e xla`. Exact resume on several devices
is in test_exact_resume.py, moving to another number of them in test_port.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import on_xla
import pytest
import spmd_program
from fork_server import ForkServer

from crosstrain import backends
from crosstrain.backends import BackendUnavailable

pytestmark = on_xla.needs_xla

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("spmd_program", "torch._dynamo", *on_xla.PRELOAD) as server:
        yield server


@pytest.fixture
def run(server: ForkServer, tmp_path: Path) -> Run:
    def run(function: Callable[..., None], *arguments: Any) -> Any:
        report = tmp_path / "report.json"
        assert server.run(function, str(report), *arguments) == 0
        return json.loads(report.read_text())

    return run


DIVIDED = "devices=["
WHOLE = "replicated"


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_compute_what_one_does(run: Run, devices: int) -> None:
    """The last batches are ones that the devices cannot divide."""
    sizes = [16] * 8 + [15] * 4
    one = run(spmd_program.train, "xla", 1, sizes)
    several, again = (run(spmd_program.train, "xla-spmd", devices, sizes) for _ in range(2))
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-4)
    # Dropout draws the same: GSPMD divides the program of one device.
    assert several["random"] == one["random"]
    for mine, theirs in zip(several["weights"], one["weights"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3)
    assert all(DIVIDED in found for found in several["divided"][:8])
    assert not any(DIVIDED in found for found in several["divided"][8:])
    for where in ("parameters", "state"):
        assert all(WHOLE in found for found in several[where]), several[where]
    # Bit for bit, run to run; and it is not one device's bits, so it was divided.
    assert {**several, "counts": 0} == {**again, "counts": 0}
    assert several["weights"] != one["weights"]


def test_a_steady_step_compiles_nothing_and_waits_for_nothing(run: Run) -> None:
    counts = run(spmd_program.train, "xla-spmd", 2, [16] * 12)["counts"]
    warm, end = counts[4], counts[-1]
    for name in ("compilations", "reads", "fallbacks"):
        assert end[name] == warm[name], name
    assert end["executions"] - warm["executions"] == len(counts) - 5


@pytest.mark.parametrize("devices", [2, 4])
def test_every_shape_comes_back_as_it_was(run: Run, devices: int) -> None:
    for shape, same, divided in run(spmd_program.move, devices):
        assert same, shape
        can = bool(shape) and shape[0] > 0 and shape[0] % devices == 0
        assert (DIVIDED in divided) == can, (shape, divided)


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("xla", "xla-spmd", "has used an XLA device already.*Open the backend 'xla-spmd' first"),
        ("xla-spmd", "xla", "is in torch_xla's SPMD mode.*Use the backend 'xla-spmd'"),
        ("xla-spmd", "xla-spmd:bf16", "^$"),
    ],
)
def test_the_two_ways_do_not_mix_in_a_process(
    run: Run, first: str, then: str, message: str
) -> None:
    import re

    found = run(spmd_program.refuse, first, then)
    assert re.search(message, found), found


@pytest.mark.parametrize("count", [None, "1", "many"])
def test_one_device_is_not_several(monkeypatch: pytest.MonkeyPatch, count: str | None) -> None:
    monkeypatch.delenv("CPU_NUM_DEVICES", raising=False)
    if count is not None:
        monkeypatch.setenv("CPU_NUM_DEVICES", count)
    with pytest.raises(BackendUnavailable, match=r"one device.*Set CPU_NUM_DEVICES=2"):
        backends.get("xla-spmd")


@pytest.mark.slow
def test_conforms() -> None:
    command = [sys.executable, "-m", "crosstrain.ci.conformance", "xla-spmd", "xla-spmd:bf16"]
    environment = {**os.environ, "CPU_NUM_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Several processes


def test_several_processes_are_refused_on_the_cpu() -> None:
    """Each would train alone: torch_xla's collective operations do nothing between them."""
    program = (
        "from crosstrain import backends\n"
        "for spec in ('xla', 'xla-spmd'):\n"
        "    try: backends.get(spec).open()\n"
        "    except backends.BackendError as error: print(f'refused {spec}: {error}', flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--no-python", sys.executable, "-c", program]
    environment = {**os.environ, "CPU_NUM_DEVICES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for spec in ("xla", "xla-spmd"):
        assert done.stdout.count(f"refused {spec}: WORLD_SIZE=2") == 2, done.stdout
    assert "do nothing between them" in done.stdout
