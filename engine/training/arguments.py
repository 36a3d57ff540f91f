"""What a factory makes of its arguments: options, an opened backend, prepared models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.backends import Backend, get
from crosstrain.backends.legacy import from_arguments

from .options import StepOptions, is_many, several

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

Device = str | torch.device | None
LossFunction = Callable[[Any, Any], torch.Tensor]


def step_options(**given: Any) -> StepOptions:
    """Returns step options; arguments that are None take the default."""
    return StepOptions(**{name: value for name, value in given.items() if value is not None})


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
            f"backend={backend!r} was given together with device={device!r}, "
            f"amp_mode={amp_mode!r}, scaler={scaler!r}. A backend says all of these: leave them "
            "out, or leave the backend out. A loss scaler of yours goes into the backend: "
            "backends.get(spec, scaler=scaler)."
        )
    return (get(backend) if isinstance(backend, str) else backend).open()


def prepare(
    backend: Backend, model: Any, optimizer: Any, replicated: bool = True
) -> tuple[Any, Any]:
    """Has the backend prepare models and optimizers; one stays one, several stay several."""
    models, optimizers = several(model), several(optimizer)
    for one in models:
        _check_placed(one, backend)
    if replicated:
        prepared = backend.prepare(*models, *optimizers)
    else:
        able: Any = backend
        prepared = able.prepare(*models, *optimizers, replicated=False)
    ready, steppers = list(prepared[: len(models)]), list(prepared[len(models) :])
    return (ready if is_many(model) else ready[0], steppers if is_many(optimizer) else steppers[0])


def _check_placed(model: Any, backend: Backend) -> None:
    # Moved there by the user, who would otherwise see it train elsewhere, slowly and silently.
    if not isinstance(model, torch.nn.Module):
        return
    for name, parameter in model.named_parameters():
        if parameter.device.type not in ("cpu", backend.device.type):
            raise ValueError(
                f"The model's '{name}' is on '{parameter.device}', and the backend "
                f"'{backend.name}' trains on '{backend.device}'. Name the backend of that device "
                "(backend=SPEC), or leave the model on the CPU: the backend places it."
            )
