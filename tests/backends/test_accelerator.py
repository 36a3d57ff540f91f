"""Any accelerator of torch's, on one that is written in Python, and why there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import SUPPORT

from crosstrain import backends


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What runs on the emulated device came to: registering one changes its process for good."""
    folder = tmp_path_factory.mktemp("emulated")
    program = str(SUPPORT / "emulated_program.py")
    subprocess.run([sys.executable, program, str(folder)], check=True, timeout=240)
    found: dict[str, Any] = json.loads((folder / "told.json").read_text())
    return found


def test_a_run_goes_on_bit_for_bit_on_the_device(told: dict[str, Any]) -> None:
    """Dropout draws from the device's generator, whose state is saved and restored."""
    assert told["straight"]["device"] == told["resumed"]["device"] == "emu:0"
    assert told["straight"]["iteration"] == told["resumed"]["iteration"] == 120
    assert told["straight"]["weights"] == told["again"]["weights"] == told["resumed"]["weights"]
    assert told["cpu"]["weights"] != told["straight"]["weights"], "the CPU draws other numbers"
    assert told["generators"] == [1, 0]


def test_a_hundred_steady_steps_read_nothing_back(told: dict[str, Any]) -> None:
    """With clipping. Taking a state reads: the run that does so in between counts it."""
    assert told["straight"]["reads"] == 0
    assert told["again"]["reads"] > 0


def test_what_the_device_lacks_is_refused_with_its_reason(told: dict[str, Any]) -> None:
    assert told["bf16"] == "Autocast on 'emu' has no types, and not torch.bfloat16."
    assert "no process groups for 'emu'" in told["fsdp"]
    assert "is 'emu', not 'mps'" in told["mps"]


def test_rocm_is_cuda_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found = backends.probe("cuda")
    assert "AMD GPUs are 'cuda' to it" in found.reason
    assert "HIP_VISIBLE_DEVICES" in found.remedy
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = backends.probe("cuda")
    assert found.ok
    assert found.versions["ROCm"] == "7.0"
