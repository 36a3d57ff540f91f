"""Why there is no accelerator. What runs where there is one: `test_emulated`."""

from __future__ import annotations

import pytest
import torch

from crosstrain import backends


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
