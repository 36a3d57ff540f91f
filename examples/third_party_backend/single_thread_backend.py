"""A backend of another package: the CPU on one thread, whatever the number of its cores.

The number of threads decides in which order sums are taken, and so the last bits of fp32 results.
With one, a run gives the same bits on machines with different numbers of cores.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch

from crosstrain.backends import Availability
from crosstrain.backends.torch_backend import TorchBackend

__all__ = ["SingleThreadBackend"]


class SingleThreadBackend(TorchBackend):
    """Trains on one thread of the CPU, at fp32 or bf16."""

    options = ("fp32", "bf16")
    name = "single-thread"
    device = torch.device("cpu")

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells the version of torch: a CPU is always there."""
        return Availability(True, versions={"torch": str(torch.__version__)}, devices=["1 thread"])

    def _start(self, stack: ExitStack) -> None:
        # Undone by close(), in reverse order.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
