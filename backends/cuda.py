"""CUDA at fp32 or TF32: NVIDIA's GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch.amp.grad_scaler import GradScaler

from .cuda_devices import absence, installed_devices, needed_capability
from .cuda_flags import deterministic_kernels, tensor_float_32
from .errors import BackendError, BackendUnavailable, Missing
from .fsdp import Sharding, arithmetic_of
from .placement import map_tensors
from .process_group import join
from .protocol import Availability
from .torch_backend import TorchBackend

__all__ = ["CudaBackend"]


class CudaBackend(TorchBackend):
    """Trains on one NVIDIA GPU. `fp32` rounds nothing; `tf32` lets products round to TF32.

    The GPU is the one of torchrun's LOCAL_RANK, or the first. A batch is copied from pinned memory
    on a stream of its own, beside the computation of the step before; nothing is read ahead of
    what the training asks for, so a checkpoint's position is exact. `fsdp` and `fsdp-...` shard
    models over the processes.

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
    name = "cuda"
    device = torch.device("cuda")
    transport = "nccl"
    adds_up = True

    def __init__(
        self,
        option: str | None = None,
        scaler: GradScaler | None = None,
        index: int | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        found = self.probe(option)
        if not found.ok and option in (None, *self.options):
            spec = f"{self.name}:{option or self.options[0]}"
            raise BackendUnavailable(spec, found.reason, found.remedy)
        super().__init__(option, scaler, sharding)
        self._index = index
        self._stream: torch.cuda.Stream | None = None

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
        versions["CUDA"] = str(torch.version.cuda)
        devices = installed_devices()
        names = [str(device) for device in devices]
        needed = needed_capability(arithmetic_of(option or "", cls.options))
        if devices and all(device.capability < needed for device in devices):
            return Availability(False, *_too_old(str(option), "; ".join(names)), versions, names)
        return Availability(True, "", "", versions, names or [f"{torch.cuda.device_count()} GPUs"])

    def _start(self, stack: ExitStack) -> None:
        count = torch.cuda.device_count()
        index = self.world.local_rank if self._index is None else self._index
        if not 0 <= index < count:
            source = "LOCAL_RANK" if self._index is None else "index"
            raise BackendError(
                f"{source}={index}, but this process sees {count} GPUs, 0 to {count - 1}. Start "
                "one process a GPU, and look at CUDA_VISIBLE_DEVICES."
            )
        capability = torch.cuda.get_device_capability(index)
        if capability < needed_capability(self.arithmetic):
            name = torch.cuda.get_device_name(index)
            found = f"{name}, compute capability {capability[0]}.{capability[1]}"
            raise BackendUnavailable(f"{self.name}:{self.option}", *_too_old(self.option, found))
        self.device = torch.device("cuda", index)
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(tensor_float_32(self.arithmetic == "tf32"))
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _join(self, stack: ExitStack) -> None:
        join(self.world, self.transport, stack, self.device)

    def put(self, batch: Any) -> Any:
        """Returns the batch with every tensor in it on the GPU, copied on a stream of its own."""
        if self._stream is None:
            return super().put(batch)
        stream, present = self._stream, torch.cuda.current_stream(self.device)

        def copy(value: Any) -> Any:
            plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
            if not plain or value.device.type != "cpu":
                # An object that moves itself, or comes from a GPU, does so on the step's stream.
                return value.to(self.device)
            # Only from pinned memory does a copy run beside the computation.
            source = value if value.is_pinned() else value.pin_memory()
            with torch.cuda.stream(stream):
                copied = source.to(self.device, non_blocking=True)
            # Keeps the memory until the step's own stream is done with it.
            copied.record_stream(present)
            return copied

        moved = map_tensors(batch, copy)
        present.wait_stream(stream)
        return moved

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Iterates over the data, each batch on the GPU, copied while the last step still runs."""
        return map(self.put, data)

    @contextlib.contextmanager
    def deterministic(self, warn_only: bool = False) -> Generator[None, None, None]:
        """Makes arithmetic repeat bit for bit inside, and restores every flag after.

        Enter it before the first step: cuBLAS fixes its workspace with its first product.

        Args:
            warn_only: an operation that has no deterministic kernel warns instead of raising.
        """
        with deterministic_kernels(), super().deterministic(warn_only):
            yield

    def seed(self, seed: int) -> None:
        """Seeds the GPU's generator."""
        with torch.cuda.device(self.device):
            torch.cuda.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        """Returns the state of the GPU's generator, a tensor of bytes on the CPU."""
        return {"cuda": torch.cuda.get_rng_state(self.device)}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned.

        Raises:
            BackendError: if it is the state of another kind of device.
        """
        if "cuda" not in state:
            raise BackendError(
                f"The random state is that of {sorted(state) or 'a device without one'}, not of a "
                "GPU: random numbers on the device cannot go on as they were. Call seed() instead."
            )
        torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)


def _too_old(option: str, found: str) -> Missing:
    major, minor = needed_capability(option)
    return Missing(
        f"Only GPUs of compute capability {major}.{minor} and above compute in {option}; here is: "
        f"{found}.",
        "Use another option, or a newer GPU.",
    )
