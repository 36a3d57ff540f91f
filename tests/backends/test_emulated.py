"""The emulated device: what it finds that the CPU does not, and what the shared code does on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from processes import SUPPORT, told_by

from crosstrain import backends
from crosstrain.ci.matrix.selection import available_specs

pytestmark = pytest.mark.usefixtures("forked_programs")

if Version(torch.__version__).release < (2, 13):
    pytest.skip("a device in Python needs torch 2.13 or newer", allow_module_level=True)

Tell = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def tell(tmp_path_factory: pytest.TempPathFactory) -> Tell:
    """Runs one of the programs in a process of its own, which has the device for good."""

    def run(name: str) -> dict[str, Any]:
        return told_by("emulated_program.py", name, tmp_path_factory.mktemp(name))

    return run


@pytest.mark.slow
def test_it_keeps_every_promise_of_the_protocol() -> None:
    """The suite's own test of a backend, by the plugin's option."""
    file = Path(__file__).parents[1] / "conformance" / "test_conformance.py"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    specs = "emulated,emulated:bf16,emulated:fp16"
    # What the file has of other backends, its own run has shown.
    options += ["-k", "each_backend", "--backends", specs, "--require-backends", specs]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 60


def test_it_is_used_as_any_device_is(tell: Tell) -> None:
    told = tell("surfaces")
    places = {name: told.pop(name) for name in list(told) if isinstance(told[name], str)}
    assert set(places.values()) == {"emulated:0"}
    assert told == {
        "values": [[1, 2], [1.5], True],
        "data": [2.0, 2.0, 2.0],
        "pinned": [True, False, False],
        "too early": True,
        "in time": 9.0,
    }


def test_processes_share_a_training(tmp_path: Path) -> None:
    """By gloo: as on the CPU, and, in logical shards, as in one process."""
    program = [str(SUPPORT / "emulated_program.py"), "ranks", str(tmp_path)]
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    once = {**os.environ, "OMP_NUM_THREADS": "1"}
    for start in ([*started, "--standalone"], [sys.executable]):
        subprocess.run([*start, *program], check=True, timeout=280, env=once)
    names = ("told0.json", "told1.json", "told.json")
    first, second, alone = (json.loads((tmp_path / name).read_text()) for name in names)
    assert first == second
    assert first["DDP"] == first["DDP on the CPU"]
    assert first["FSDP"] == first["FSDP on the CPU"]
    assert first["DDP"] != alone["DDP"]
    assert first["shards"] == alone["shards"]


def test_a_run_goes_on_bit_for_bit_from_each_iteration(tell: Tell) -> None:
    """In accumulation windows, over a skipped step, from files that a thread has written."""
    told = tell("resumes")
    assert {found["device"] for found in told.values()} == {"emulated"}
    assert {found["iteration"] for found in told.values()} == {10}
    assert [found["wrong"] for found in told.values()] == [[], [], []]
    assert 0 < told["emulated:fp16"]["skipped"] < 4, "of four steps"
    assert told["emulated"]["weights"] != told["emulated:fp16"]["weights"]


def test_a_run_moves_from_the_cpu_and_back_and_keeps_its_bits(tell: Tell) -> None:
    """The device computes as the CPU does, and this run draws nothing on it."""
    told = tell("ports")
    assert [told[name]["device"] for name in told] == ["cpu", "emulated", "cpu"]
    assert told["straight"]["weights"] == told["there"]["weights"] == told["back"]["weights"]


def test_what_the_host_reads_in_thirty_steady_steps_is_counted(tell: Tell) -> None:
    """With clipping, accumulation over 2, a bar; docs/emulated.md names what reads, in 100."""
    assert tell("steady") == {
        "bar": [0, 0, 0],
        # A scheduler is stepped on the host, which has to know whether fp16 has applied a step.
        "scheduler": [0, 0, 15],
        "not fused": [0, 0, 15],
        "loss shown": [30, 30, 30],
        "loss shown at times": [1, 1, 1],
    }


def test_faults_that_the_cpu_cannot_show_are_found(tell: Tell) -> None:
    told = tell("faults")
    assert told["cpu"] == {"on the host": "", "in a checkpoint": [], "not waited for": []}
    found = told["emulated"]
    assert "cpu and emulated:0" in found["on the host"]
    assert "tensors on ['emulated:0']" in found["in a checkpoint"][0]
    assert found["not waited for"]


def test_what_the_device_lacks_is_refused_with_its_reason(tell: Tell) -> None:
    told = tell("refusals")
    assert told["accelerator"] == "emulated:0"
    assert told["bf16"] == "Autocast on 'emulated' has no types, and not torch.bfloat16."
    assert "is 'emulated', not 'mps'" in told["mps"]
    assert "emulated:1" in told["second"]
    assert "sees 2 devices" in told["third"]
    # Its device is that of its LOCAL_RANK; what is missing is torchrun's address.
    assert told["rank 1"].startswith("emulated:1: MASTER_ADDR")
    assert "LOCAL_RANK=5, but this process sees 2 devices" in told["rank 5"]
    assert "'emulated:0' cannot hold a tensor" in told["double"]
    assert "cannot read the random state of 'emulated:0'" in told["state"]
    assert "out of memory" in told["memory"]
    assert "emulated:0 and emulated:1" in told["mixed"]


def test_the_example_of_its_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "emulated.md").read_text()
    example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_it_is_trained_on_only_where_it_is_asked_for() -> None:
    """Neither a probe nor the columns of a matrix register it."""
    import torch

    assert backends.probe("emulated").ok
    assert "emulated" not in available_specs()
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
