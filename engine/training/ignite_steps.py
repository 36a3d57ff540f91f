"""The step functions by which users of pytorch-ignite know training and evaluation steps.

Each makes the one `TrainingStep` or `EvaluationStep`, on the backend that its name stands for.
The names and arguments are those of `ignite.engine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from crosstrain.backends.legacy import for_step
from crosstrain.backends.placement import map_tensors

from .arguments import Device, LossFunction, prepare, step_options
from .evaluation import EvaluationStep, prediction
from .step import TrainingStep

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

F = TypeVar("F", bound=Callable[..., Any])


def _training_step(
    name: str,
    *,
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction,
    device: Device,
    gradient_accumulation_steps: int,
    scaler: GradScaler | None = None,
    **given: Any,
) -> TrainingStep:
    options = step_options(accumulation_steps=gradient_accumulation_steps, **given)
    backend = for_step(name, device, scaler).open()
    model, optimizer = prepare(backend, model, optimizer)
    return TrainingStep(model, optimizer, loss_fn, backend, options)


def _evaluation_step(
    name: str, *, model: Any, device: Device, output_transform: Any, **given: Any
) -> EvaluationStep:
    backend = for_step(name, device, None).open()
    model, _ = prepare(backend, model, [])
    return EvaluationStep(model, backend, step_options(**given), output_transform)


def _on_another(like: F, make: Callable[..., Any], name: str, where: str) -> F:
    """Returns a function like another, on the backend that a name stands for.

    `make` gets the name and the arguments by theirs; `where` is said for `in full precision`.
    """
    signature = inspect.signature(like)

    @wraps(like)
    def step(*args: Any, **given: Any) -> Any:
        try:
            bound = signature.bind(*args, **given)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        bound.apply_defaults()
        return make(name, **bound.arguments)

    step.__name__ = step.__qualname__ = name
    step.__doc__ = (like.__doc__ or "").replace("in full precision", where, 1)
    return cast("F", step)


def supervised_training_step(
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any, Any], Any] | None = None,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[Any, Any], Any] | None = None,
) -> TrainingStep:
    """Makes a training step in full precision, to give to an `Engine` of your own.

    Its events, `StepEvents`, are registered with the engine at the first iteration; call
    `step.attach(engine)` to attach handlers to them before.

    Args:
        model: the model, or a list of several; moved to the device in place.
        optimizer: its optimizer, or a list of several; all are stepped together.
        loss_fn: called as `loss_fn(y_pred, y)`, returns a loss of one element.
        device: the device; None: the one that the name of this function stands for.
        non_blocking: passed to `prepare_batch`.
        prepare_batch: as of `create_supervised_trainer`.
        model_transform: called with the model's output, returns what the loss takes.
        output_transform: called as `output_transform(x, y, y_pred, loss)`, returns the output.
        gradient_accumulation_steps: over how many iterations gradients are accumulated.
        model_fn: called as `model_fn(model, x)`, returns the model's output.

    Raises:
        ValueError: if an argument is illegal, or the optimizer does not fit the model.
        BackendUnavailable: if the backend cannot run here, with the reason and the remedy.
    """
    return _training_step("supervised_training_step", **locals())


supervised_training_step_apex = _on_another(
    supervised_training_step,
    _training_step,
    "supervised_training_step_apex",
    "with NVIDIA's legacy mixed precision",
)
"""Makes a training step with NVIDIA's legacy mixed precision, to give to an `Engine` of your own.

Its arguments are those of `supervised_training_step`.
"""
supervised_training_step_tpu = _on_another(
    supervised_training_step,
    _training_step,
    "supervised_training_step_tpu",
    "on the device that its name says",
)
"""Makes a training step on a TPU, by XLA, to give to an `Engine` of your own.

Its arguments are those of `supervised_training_step`.
"""


def supervised_training_step_amp(
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any, Any], Any] | None = None,
    scaler: GradScaler | None = None,
    gradient_accumulation_steps: int = 1,
    model_fn: Callable[[Any, Any], Any] | None = None,
) -> TrainingStep:
    """Makes a training step with autocast to fp16, to give to an `Engine` of your own.

    Args:
        model: as of `supervised_training_step`.
        optimizer: as of `supervised_training_step`.
        loss_fn: as of `supervised_training_step`.
        device: the device; None: the one on which pytorch-ignite autocasts.
        non_blocking: as of `supervised_training_step`.
        prepare_batch: as of `supervised_training_step`.
        model_transform: as of `supervised_training_step`.
        output_transform: as of `supervised_training_step`.
        scaler: scales the loss; None: nothing does, and small fp16 gradients are lost.
        gradient_accumulation_steps: as of `supervised_training_step`.
        model_fn: as of `supervised_training_step`.

    Raises:
        ValueError: as of `supervised_training_step`.
        BackendUnavailable: as of `supervised_training_step`.
    """
    return _training_step("supervised_training_step_amp", **locals())


def supervised_evaluation_step(
    model: Any,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
    model_transform: Callable[[Any], Any] | None = None,
    output_transform: Callable[[Any, Any, Any], Any] = prediction,
    model_fn: Callable[[Any, Any], Any] | None = None,
) -> EvaluationStep:
    """Makes an evaluation step in full precision, to give to an `Engine` of your own.

    Args:
        model: the model, or a list of several; moved to the device in place.
        device: the device; None: the one that the name of this function stands for.
        non_blocking: passed to `prepare_batch`.
        prepare_batch: as of `create_supervised_trainer`.
        model_transform: called with the model's output, returns the prediction.
        output_transform: called as `output_transform(x, y, y_pred)`, returns the output.
        model_fn: called as `model_fn(model, x)`, returns the model's output.

    Raises:
        ValueError: if an argument is illegal.
        BackendUnavailable: if the backend cannot run here, with the reason and the remedy.
    """
    return _evaluation_step("supervised_evaluation_step", **locals())


supervised_evaluation_step_amp = _on_another(
    supervised_evaluation_step,
    _evaluation_step,
    "supervised_evaluation_step_amp",
    "with autocast to fp16",
)
"""Makes an evaluation step with autocast to fp16, to give to an `Engine` of your own.

Its arguments are those of `supervised_evaluation_step`.
"""


def convert_tensor(x: Any, device: Device | None = None, non_blocking: bool = False) -> Any:
    """Returns a batch with its tensors on a device; for a `prepare_batch` written for ignite.

    Args:
        x: a tensor, or tensors in tuples, lists, mappings and dataclasses; the rest stays as it is.
        device: the device; None leaves the tensors where they are.
        non_blocking: whether a copy from pinned memory may go on while the program does.
    """
    if device is None:
        return x
    return map_tensors(x, lambda tensor: tensor.to(device=device, non_blocking=non_blocking))
