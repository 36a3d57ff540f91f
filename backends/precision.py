"""Precision: autocast, loss scaling and clipping, shared by the backends that use torch's own."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.autocast_mode import is_autocast_available
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError
from .protocol import StepResult

__all__ = ["DTYPES", "Precision"]

# What the options of a spec mean to autocast; None: no autocast.
DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Precision:
    """Runs the numeric half of a training step: casts, scales, clips, steps.

    Args:
        device_type: the type of device to autocast on, as torch names it.
        dtype: what to autocast to; None: nothing is cast.
        scaler: the loss scaler. None: one with torch's defaults where `dtype` is fp16, whose
            gradients underflow without it, and none otherwise.

    Raises:
        BackendError: if torch cannot autocast on this type of device.
    """

    def __init__(
        self, device_type: str, dtype: torch.dtype | None, scaler: GradScaler | None = None
    ) -> None:
        if dtype is not None and not is_autocast_available(device_type):
            raise BackendError(
                f"torch {torch.__version__} has no autocast on '{device_type}', so {dtype} cannot "
                "be used there. Use the option fp32."
            )
        self.device_type = device_type
        self.dtype = dtype
        if scaler is None and dtype is torch.float16:
            scaler = GradScaler(device_type)
        self.scaler = scaler
        self._update_due = False
        # Of each optimizer: whether its step was called, and the flag that told it to skip.
        self._attempts: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass and the loss run."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Runs the backward pass of a loss of one element, multiplied by the loss scale if any."""
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        self.settle()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> StepResult:
        """Unscales, clips and steps; skips the step where a scaled gradient is not finite.

        The scale is adapted later, at the next backward pass or step boundary: until then, other
        optimizers whose gradients carry the same scale can be stepped.

        Args:
            optimizer: the optimizer to step.
            max_norm: the largest total norm of this optimizer's gradients; None: not clipped.

        Raises:
            BackendError: if no parameter of the optimizer has a gradient.
        """
        scaler = self.scaler
        if scaler is None or not scaler.is_enabled():
            norm = None if max_norm is None else _clip(optimizer, max_norm)
            optimizer.step()
            return StepResult(True, norm)
        scale = scaler.get_scale()
        attempt = self._watch(optimizer)
        norm = None
        try:
            if max_norm is not None:
                scaler.unscale_(optimizer)
                norm = _clip(optimizer, max_norm)
            scaler.step(optimizer)
        except AssertionError as error:
            raise BackendError(
                "An optimizer was stepped without a gradient: no parameter of "
                f"{type(optimizer).__name__} took part in the loss since its last step ({error}). "
                "Check that it holds the parameters of the model that made the loss."
            ) from error
        self._update_due = True
        called, skip = attempt
        attempt[:] = [False, None]
        applied = called if skip is None else skip == 0
        return StepResult(applied, norm, scale)

    def settle(self) -> None:
        """Adapts the loss scale to the steps since the last time, if there were any."""
        if self._update_due and self.scaler is not None:
            self.scaler.update()
            self._update_due = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the loss scale and its growth tracker; empty without loss scaling."""
        if self.scaler is None:
            return {}
        self.settle()
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            BackendError: if one side scales the loss and the other does not, or a key is missing.
        """
        scales = self.scaler is not None and self.scaler.is_enabled()
        if bool(state) != scales:
            here, there = ("scales", "has none") if scales else ("does not scale", "has one")
            raise BackendError(
                f"This backend {here} the loss, and the state {there}: a loss scale can only be "
                "carried between backends that scale. Load the state on the backend that wrote it."
            )
        if self.scaler is None or not scales:
            return
        missing = set(self.scaler.state_dict()) - set(state)
        if missing:
            raise BackendError(f"The state of the loss scale lacks {sorted(missing)}.")
        self.scaler.load_state_dict(dict(state))
        self._update_due = False

    def _watch(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Returns the record of an optimizer's last attempted step.

        GradScaler does not tell whether it stepped. It calls the optimizer's step only if it does,
        but a fused optimizer is always called and skips on the device: that one has the flag in its
        attribute `found_inf` during the call.
        """
        attempt = self._attempts.get(optimizer)
        if attempt is None:
            attempt = self._attempts[optimizer] = [False, None]
            record = attempt

            def note(called: torch.optim.Optimizer, *_: Any) -> None:
                record[:] = [True, getattr(called, "found_inf", None)]

            optimizer.register_step_pre_hook(note)
        return attempt


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
