"""CUDA at fp32 or TF32: NVIDIA's GPUs, and the flags that decide the bits of their arithmetic."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch

from .accelerator import AcceleratorBackend
from .cuda_devices import absence, installed_devices, needed_capability
from .errors import BackendUnavailable, Missing
from .fsdp import arithmetic_of
from .protocol import Availability

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

# With these, cuBLAS has one workspace a stream and repeats its results.
_REPEATABLE = (":4096:8", ":16:8")


class CudaBackend(AcceleratorBackend):
    """Trains on one NVIDIA GPU. `fp32` rounds nothing; `tf32` lets products round to TF32.

    What is CUDA's alone stands here: TF32, cuBLAS, cuDNN, compute capabilities. The rest is that of
    every accelerator. `fsdp` and `fsdp-...` shard models over the processes.

    Args:
        option: one of `options`.
        scaler: a loss scaler, for a subclass with fp16.
        index: the GPU to use instead; it counts among those that CUDA_VISIBLE_DEVICES leaves.
        sharding: see `TorchBackend`.
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

    @contextmanager
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


@contextmanager
def tensor_float_32(allowed: bool) -> Generator[None, None, None]:
    """Allows or forbids fp32 products to be rounded to TF32 (10 bits of mantissa), inside.

    torch's default is mixed: convolutions round, matrix products do not.
    """
    # The flags are set by their old names and restored by their new ones: torch raises where it
    # reads an old name, as its compiler does, after the new one was set to something else.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    parts = (matmul, cudnn.conv, cudnn.rnn)
    before: list[str] = [part.fp32_precision for part in parts]
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before[0] == "tf32"
        cudnn.allow_tf32 = before[1] == "tf32"
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextmanager
def deterministic_kernels() -> Generator[None, None, None]:
    """Has cuDNN and cuBLAS use kernels that repeat their results bit for bit, inside.

    cuBLAS reads its variable when its first product is computed: enter this before.
    """
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    workspace = os.environ.get(_WORKSPACE)
    if workspace not in _REPEATABLE:
        os.environ[_WORKSPACE] = _REPEATABLE[0]
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        else:
            os.environ[_WORKSPACE] = workspace
