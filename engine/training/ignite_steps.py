"""The step functions by which users of pytorch-ignite know training and evaluation steps.

Each makes the one `TrainingStep` or `EvaluationStep`, on the backend that its name stands for.
The names and arguments are those of `ignite.engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from crosstrain.backends.legacy import for_step
from crosstrain.backends.placement import map_tensors

from .arguments import Device, LossFunction, prepare, step_options
from .evaluation import EvaluationStep, prediction
from .step import TrainingStep

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

_TRAINING = """Makes a training step {where}, to give to an `Engine` of your own.

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
_EVALUATION = """Makes an evaluation step {where}, to give to an `Engine` of your own.

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


class _MakesTrainingStep(Protocol):
    def __call__(
        self,
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
    ) -> TrainingStep: ...


class _MakesEvaluationStep(Protocol):
    def __call__(
        self,
        model: Any,
        device: Device = None,
        non_blocking: bool = False,
        prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
        model_transform: Callable[[Any], Any] | None = None,
        output_transform: Callable[[Any, Any, Any], Any] = prediction,
        model_fn: Callable[[Any, Any], Any] | None = None,
    ) -> EvaluationStep: ...


def _training_step(
    name: str,
    device: Device,
    scaler: GradScaler | None,
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction,
    **given: Any,
) -> TrainingStep:
    options = step_options(**given)
    backend = for_step(name, device, scaler).open()
    model, optimizer = prepare(backend, model, optimizer)
    return TrainingStep(model, optimizer, loss_fn, backend, options)


def _step_maker(name: str, where: str) -> _MakesTrainingStep:
    def step(
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
        return _training_step(
            name,
            device,
            None,
            model,
            optimizer,
            loss_fn,
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            model_transform=model_transform,
            output_transform=output_transform,
            accumulation_steps=gradient_accumulation_steps,
            model_fn=model_fn,
        )

    step.__name__ = step.__qualname__ = name
    step.__doc__ = _TRAINING.format(where=where)
    return step


supervised_training_step = _step_maker("supervised_training_step", "in full precision")
"""Makes a training step in full precision, to give to an `Engine` of your own.

Its arguments are those of `supervised_training_step_amp`, but for `scaler`.
"""
supervised_training_step_apex = _step_maker(
    "supervised_training_step_apex", "with NVIDIA's legacy mixed precision"
)
"""Makes a training step with NVIDIA's legacy mixed precision, to give to an `Engine` of your own.

Its arguments are those of `supervised_training_step_amp`, but for `scaler`.
"""
supervised_training_step_tpu = _step_maker(
    "supervised_training_step_tpu", "on the device that its name says"
)
"""Makes a training step on a TPU, by XLA, to give to an `Engine` of your own.

Its arguments are those of `supervised_training_step_amp`, but for `scaler`.
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

    Its events, `StepEvents`, are registered with the engine at the first iteration; call
    `step.attach(engine)` to attach handlers to them before.

    Args:
        model: the model, or a list of several; moved to the device in place.
        optimizer: its optimizer, or a list of several; all are stepped together.
        loss_fn: called as `loss_fn(y_pred, y)`, returns a loss of one element.
        device: the device; None: the one on which pytorch-ignite autocasts.
        non_blocking: passed to `prepare_batch`.
        prepare_batch: as of `create_supervised_trainer`.
        model_transform: called with the model's output, returns what the loss takes.
        output_transform: called as `output_transform(x, y, y_pred, loss)`, returns the output.
        scaler: scales the loss; None: nothing does, and small fp16 gradients are lost.
        gradient_accumulation_steps: over how many iterations gradients are accumulated.
        model_fn: called as `model_fn(model, x)`, returns the model's output.

    Raises:
        ValueError: if an argument is illegal, or the optimizer does not fit the model.
        BackendUnavailable: if the backend cannot run here, with the reason and the remedy.
    """
    # Not made like the others, because pytorch-ignite has `scaler` in the middle.
    return _training_step(
        "supervised_training_step_amp",
        device,
        scaler,
        model,
        optimizer,
        loss_fn,
        non_blocking=non_blocking,
        prepare_batch=prepare_batch,
        model_transform=model_transform,
        output_transform=output_transform,
        accumulation_steps=gradient_accumulation_steps,
        model_fn=model_fn,
    )


def _evaluation_maker(name: str, where: str) -> _MakesEvaluationStep:
    def step(
        model: Any,
        device: Device = None,
        non_blocking: bool = False,
        prepare_batch: Callable[..., tuple[Any, Any]] | None = None,
        model_transform: Callable[[Any], Any] | None = None,
        output_transform: Callable[[Any, Any, Any], Any] = prediction,
        model_fn: Callable[[Any, Any], Any] | None = None,
    ) -> EvaluationStep:
        options = step_options(
            non_blocking=non_blocking,
            prepare_batch=prepare_batch,
            model_transform=model_transform,
            model_fn=model_fn,
        )
        backend = for_step(name, device, None).open()
        model, _ = prepare(backend, model, [])
        return EvaluationStep(model, backend, options, output_transform)

    step.__name__ = step.__qualname__ = name
    step.__doc__ = _EVALUATION.format(where=where)
    return step


supervised_evaluation_step = _evaluation_maker("supervised_evaluation_step", "in full precision")
"""Makes an evaluation step in full precision, to give to an `Engine` of your own.

Its arguments are those of `create_supervised_evaluator`, but for `metrics`; it returns the step
alone.
"""
supervised_evaluation_step_amp = _evaluation_maker(
    "supervised_evaluation_step_amp", "with autocast to fp16"
)
"""Makes an evaluation step with autocast to fp16, to give to an `Engine` of your own.

Its arguments are those of `create_supervised_evaluator`, but for `metrics`; it returns the step
alone.
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
