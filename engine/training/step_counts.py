"""StepCounts: how often a run's optimizers were stepped, and how often the loss scaler skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from crosstrain.backends import StepResult
    from crosstrain.engine.state import State

__all__ = ["StepCounts"]


class StepCounts:
    """Counts steps without waiting for a device that has not said yet whether it skipped one.

    A fused optimizer with a loss scale skips on the device itself. What became of its steps is
    added up there, and read when somebody asks.

    Args:
        optim_steps: how often the optimizers were stepped.
        applied_steps: how often that was applied.
    """

    def __init__(self, optim_steps: int = 0, applied_steps: int = 0) -> None:
        #: How often the optimizers were stepped.
        self.optim_steps = optim_steps
        #: How many of these were skipped, as far as the host knows.
        self.skipped = optim_steps - applied_steps
        #: How many were skipped besides, int64 of shape (), on the device; None: none is unread.
        self.unread: torch.Tensor | None = None

    @property
    def skipped_steps(self) -> int:
        """How often one of the optimizers was skipped; may wait for the device."""
        if self.unread is not None:
            self.skipped += int(self.unread)
            self.unread = None
        return self.skipped

    @property
    def applied_steps(self) -> int:
        """How often every optimizer changed its weights; may wait for the device."""
        return self.optim_steps - self.skipped_steps

    def add(self, results: list[StepResult]) -> None:
        """Counts a step: as skipped, if one of the optimizers was.

        Args:
            results: what became of each optimizer.
        """
        self.optim_steps += 1
        waiting: list[torch.Tensor] = []
        for result in results:
            outcome = result.outcome
            if outcome is False:
                self.skipped += 1
                return
            if outcome is not True:
                waiting.append(outcome)
        if waiting:
            self._add_unread(waiting)

    def _add_unread(self, applied: list[torch.Tensor]) -> None:
        device = applied[0].device
        total = torch.zeros((), dtype=torch.bool, device=device)
        for one in applied:
            total |= one.reshape(()).logical_not().to(device, non_blocking=True)
        before = 0 if self.unread is None else self.unread.to(device, non_blocking=True)
        self.unread = before + total.to(torch.int64)

    def tell(self, state: State) -> None:
        """Sets a state's `optim_steps`, `applied_steps` and `skipped_steps`, and reads nothing."""
        told: Any = state
        told.optim_steps = self.optim_steps
        if self.unread is None:
            told.applied_steps = self.optim_steps - self.skipped
            told.skipped_steps = self.skipped
        else:
            state.defer("applied_steps", lambda: self.applied_steps)
            state.defer("skipped_steps", lambda: self.skipped_steps)
