"""The CPU at fp32, bf16 or fp16: every path of a step, where there is no other hardware."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .protocol import Availability
from .torch_backend import TorchBackend


class CpuBackend(TorchBackend):
    """Trains on the CPU. `bf16` and `fp16` autocast; `fp16` scales the loss and skips overflows.

    `fsdp` and `fsdp-...` shard models over the processes, see `Sharding`.

    The number of threads changes the bits of fp32 results: it is the caller's to keep.
    """

    options = ("fp32", "bf16", "fp16", "fsdp", "fsdp-bf16", "fsdp-fp16")
    name = "cpu"
    device = torch.device("cpu")
    adds_up = True

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells the version of torch and the processor; the CPU is always there."""
        processor = platform.processor() or platform.machine()
        return Availability(
            True,
            versions={"torch": str(torch.__version__)},
            devices=[f"{processor}, {torch.get_num_threads()} threads"],
        )

    def put(self, batch: Any) -> Any:
        """Returns the batch with every tensor in it on the CPU, its structure unchanged."""
        # Most tensors are there already: asking first saves the microsecond that a step would see.
        if type(batch) is torch.Tensor and batch.is_cpu:
            return batch
        return super().put(batch)
