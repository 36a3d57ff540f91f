"""CUDA's devices: what there is, told without starting any of it, or why there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import Missing

# The compute capability from which on the hardware itself computes at an option's precision. An
# older device may accept it and emulate: that is slower than fp32, so it does not count.
_NEEDED: dict[str, tuple[int, int]] = {"tf32": (8, 0), "bf16": (8, 0), "fp16": (5, 3)}

_QUERY = ("--query-gpu=name,compute_cap", "--format=csv,noheader")
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class CudaDevice:
    """A device as the driver describes it.

    Args:
        name: such as `NVIDIA A100-SXM4-80GB`.
        capability: its compute capability, such as (8, 0).
    """

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name}, compute capability {major}.{minor}"


def needed_capability(option: str) -> tuple[int, int]:
    """Returns the lowest compute capability that really supports an option's precision."""
    return _NEEDED.get(option, (0, 0))


def installed_devices() -> list[CudaDevice]:
    """Asks the driver, by nvidia-smi, for the devices of the machine; none where it has no answer.

    The order is the driver's, and devices that CUDA_VISIBLE_DEVICES hides are among them.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        answer = subprocess.run(
            [command, *_QUERY], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        # A broken driver has no devices to tell of; why it is broken is said by `absence`.
        return []
    return parse_devices(answer.stdout)


def parse_devices(text: str) -> list[CudaDevice]:
    """Reads nvidia-smi's lines of `name, compute capability`; skips what it cannot read."""
    devices: list[CudaDevice] = []
    for line in text.splitlines():
        name, _, capability = line.rpartition(",")
        major, _, minor = capability.strip().partition(".")
        if name and major.isdecimal() and minor.isdecimal():
            devices.append(CudaDevice(name.strip(), (int(major), int(minor))))
    return devices


def absence() -> Missing | None:
    """Returns why torch cannot use CUDA here, and what to do; None if it can.

    It looks at torch's build, at the driver and at CUDA_VISIBLE_DEVICES, and makes no context.
    """
    version = torch.__version__
    if torch.version.hip is not None:
        # AMD's devices are `cuda` to torch.
        if torch.cuda.device_count() > 0:
            return None
        return Missing(
            f"torch {version} is built for ROCm {torch.version.hip}, so AMD GPUs are 'cuda' to it, "
            "but it finds none.",
            "Run on a machine with an AMD GPU and its driver; start a container with "
            "--device=/dev/kfd --device=/dev/dri, and look at HIP_VISIBLE_DEVICES.",
        )
    if torch.version.cuda is None:
        return Missing(
            f"torch {version} is built without CUDA.",
            "On a machine with an NVIDIA GPU, install a torch that is built with CUDA: "
            "https://pytorch.org/get-started/locally/",
        )
    # Counts by the driver's own library, so that processes forked later can still use CUDA.
    if torch.cuda.device_count() > 0:
        return None
    if not _DRIVER.is_file():
        return Missing(
            f"torch {version} is built with CUDA {torch.version.cuda}, but no NVIDIA driver is "
            "loaded.",
            "Run on a machine with an NVIDIA GPU and a driver; start a container with --gpus all.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return Missing(
            f"The NVIDIA driver is loaded, but CUDA_VISIBLE_DEVICES={visible!r} leaves no device.",
            "Unset CUDA_VISIBLE_DEVICES, or name a device that nvidia-smi lists.",
        )
    return Missing(
        f"An NVIDIA driver is loaded, but torch {version}, built with CUDA {torch.version.cuda}, "
        "finds no device.",
        "Run nvidia-smi: the driver may be too old for this CUDA, or the device not passed on.",
    )
