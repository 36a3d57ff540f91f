"""Assembly: puts options, backend, models and optimizers together for the factories of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.backends import Backend, get
from crosstrain.backends.legacy import from_arguments

from .training_step import StepOptions, several

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

__all__ = ["Device", "LossFunction", "is_many", "open_backend", "prepare", "step_options"]

Device = str | torch.device | None
LossFunction = Callable[[Any, Any], torch.Tensor]


def step_options(
    accumulation_steps: int = 1, max_norm: float | None = None, **given: Any
) -> StepOptions:
    """Returns step options; arguments that are None take the default."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return StepOptions(accumulation_steps=accumulation_steps, max_norm=max_norm, **chosen)


def open_backend(
    backend: str | Backend | None,
    device: Device,
    amp_mode: str | None,
    scaler: bool | GradScaler = False,
) -> Backend:
    """Returns the opened backend that the arguments of a factory ask for."""
    if backend is None:
        return from_arguments(device, amp_mode, scaler).open()
    if device is not None or amp_mode is not None or scaler:
        raise ValueError(
            f"backend={backend!r} was given together with device={device!r}, amp_mode={amp_mode!r}, "
            f"scaler={scaler!r}. A backend says all of these: leave the others out."
        )
    return (get(backend) if isinstance(backend, str) else backend).open()


def prepare(backend: Backend, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Has the backend prepare models and optimizers; one stays one, several stay several."""
    models, optimizers = several(model), several(optimizer)
    prepared = backend.prepare(*models, *optimizers)
    ready, steppers = list(prepared[: len(models)]), list(prepared[len(models) :])
    return (
        ready if is_many(model) else ready[0],
        steppers if is_many(optimizer) else (steppers[0] if steppers else []),
    )


def is_many(value: Any) -> bool:
    """Tells whether several models or optimizers were given, as a list or a tuple."""
    return isinstance(value, (list, tuple))
