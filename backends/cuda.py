"""CUDA at fp32 or TF32: NVIDIA's GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch

from .accelerator import AcceleratorBackend
from .cuda_devices import absence, installed_devices, needed_capability
from .cuda_flags import deterministic_kernels, tensor_float_32
from .errors import BackendUnavailable, Missing
from .fsdp import arithmetic_of
from .protocol import Availability


class CudaBackend(AcceleratorBackend):
    """Trains on one NVIDIA GPU. `fp32` rounds nothing; `tf32` lets products round to TF32.

    What is CUDA's alone stands here: TF32, cuBLAS, cuDNN, compute capabilities. The rest is that of
    every accelerator. `fsdp` and `fsdp-...` shard models over the processes.

    Args:
        option: one of `options`.
        scaler: a loss scaler, for a subclass with fp16.
        index: the GPU to use instead; it counts among those that CUDA_VISIBLE_DEVICES leaves.
        sharding: see `TorchBackend`.

    Raises:
        UnknownBackend: if there is no such option.
        BackendUnavailable: if there is no GPU, or none that can do this.
    """

    options: ClassVar[tuple[str, ...]] = ("fp32", "tf32", "fsdp", "fsdp-tf32")
    name = kind = "cuda"
    device = torch.device("cuda")
    adds_up = True
    # The thread that writes a checkpoint may ask for something while a step is recorded.
    graph_options: ClassVar[Mapping[str, Any]] = {"capture_error_mode": "thread_local"}

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells GPUs and driver, without starting a GPU.

        An option that none of the machine's GPUs supports in hardware is not available; of several
        kinds of GPUs, `open` looks at the one that is used.
        """
        versions = {"torch": str(torch.__version__)}
        missing = absence()
        if missing is not None:
            return Availability(False, *missing, versions)
        if torch.version.hip is not None:
            # AMD's GPUs are `cuda` to torch.
            versions["ROCm"] = str(torch.version.hip)
        else:
            versions["CUDA"] = str(torch.version.cuda)
        devices = installed_devices()
        names = [str(device) for device in devices]
        needed = needed_capability(arithmetic_of(option or "", cls.options))
        if devices and all(device.capability < needed for device in devices):
            return Availability(False, *_too_old(str(option), "; ".join(names)), versions, names)
        return Availability(True, "", "", versions, names or [f"{torch.cuda.device_count()} GPUs"])

    @classmethod
    def _absence(cls) -> Missing | None:
        return absence()

    def _hidden(self) -> str:
        return ", and look at CUDA_VISIBLE_DEVICES"

    def _check_device(self, index: int) -> None:
        capability = torch.cuda.get_device_capability(index)
        if capability < needed_capability(self.arithmetic):
            name = torch.cuda.get_device_name(index)
            found = f"{name}, compute capability {capability[0]}.{capability[1]}"
            raise BackendUnavailable(f"{self.name}:{self.option}", *_too_old(self.option, found))

    def _start(self, stack: ExitStack) -> None:
        super()._start(stack)
        stack.enter_context(tensor_float_32(self.arithmetic == "tf32"))

    @contextlib.contextmanager
    def deterministic(self, warn_only: bool = False) -> Generator[None, None, None]:
        """Makes arithmetic repeat bit for bit inside, and restores every flag after.

        Enter it before the first step: cuBLAS fixes its workspace with its first product.

        Args:
            warn_only: an operation that has no deterministic kernel warns instead of raising.
        """
        with deterministic_kernels(), super().deterministic(warn_only):
            yield


def _too_old(option: str, found: str) -> Missing:
    major, minor = needed_capability(option)
    return Missing(
        f"Only GPUs of compute capability {major}.{minor} and above compute in {option}; here is: "
        f"{found}.",
        "Use another option, or a newer GPU.",
    )
