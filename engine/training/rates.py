"""Learning rates as tensors of the device, for a graph of a step, which cannot hold numbers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# What schedulers keep in a group; no optimizer computes with it.
_NOT_COMPUTED_WITH = frozenset({"params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr"})


class Rates:
    """The learning rates of optimizers as tensors on the device, which a graph reads.

    In the groups they stay the numbers that they are: schedulers and checkpoints see these.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers, self._device = optimizers, device
        self._tensors: dict[tuple[int, int], tuple[Tensor, float]] = {}

    def _groups(self) -> Generator[tuple[tuple[int, int], dict[str, Any]], None, None]:
        for which, optimizer in enumerate(self._optimizers):
            for place, group in enumerate(optimizer.param_groups):
                if "lr" in group and not self._is_there(group["lr"]):
                    yield (which, place), group

    def _is_there(self, rate: Any) -> bool:
        """Tells whether a rate is a tensor of the device: who put it there changes it there."""
        return isinstance(rate, Tensor) and rate.device.type == self._device.type

    def fill(self) -> None:
        """Copies rates that have changed to the device, without waiting for it."""
        for key, group in self._groups():
            rate = float(group["lr"])
            tensor, there = self._tensors.get(key, (None, None))
            if tensor is None:
                # fp32, as torch makes a rate of a Python number.
                tensor = torch.full((), rate, dtype=torch.float32, device=self._device)
            elif there != rate:
                tensor.fill_(rate)
            self._tensors[key] = (tensor, rate)

    @contextmanager
    def as_tensors(self) -> Generator[None, None, None]:
        """Has the groups hold the tensors inside."""
        self.fill()
        numbers = [(key, group, group["lr"]) for key, group in self._groups()]
        for key, group, _ in numbers:
            group["lr"] = self._tensors[key][0]
        try:
            yield
        finally:
            for _, group, rate in numbers:
                group["lr"] = rate

    def constants(self) -> dict[str, Any]:
        """Returns the other numbers of the groups, which a graph holds as they are."""
        found: dict[str, Any] = {}
        for which, optimizer in enumerate(self._optimizers):
            for place, group in enumerate(optimizer.param_groups):
                for name, value in group.items():
                    if name not in _NOT_COMPUTED_WITH:
                        found[f"{name} of optimizer {which}, group {place}"] = value
                if self._is_there(group.get("lr")):
                    found[f"the tensor lr of optimizer {which}"] = group["lr"].data_ptr()
        return found
