"""The training step: forward, loss, backward and optimizer step, written once for every backend."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .events import EventEnum, Events, Unread
from .progress import is_done

if TYPE_CHECKING:
    from crosstrain.backends import Backend, StepResult

    from .engine import Engine
    from .handlers import Slot

__all__ = ["StepEvents", "StepOptions", "TrainingStep", "several"]


class StepEvents(EventEnum):
    """The events of a training step, which a factory's trainer fires beside the engine's own.

    BACKWARD_* fire each iteration. OPTIM_STEP_* fire where the optimizers are stepped: each
    iteration, or at the end of each accumulation window. OPTIM_STEP_APPLIED and OPTIM_STEP_SKIPPED
    follow OPTIM_STEP_COMPLETED: the first if every optimizer changed its weights, the second if
    the loss scaler skipped one. Step a scheduler or an EMA at OPTIM_STEP_APPLIED; its count, for
    filters such as `every`, is `state.applied_steps`.
    """

    BACKWARD_STARTED = "backward_started"
    BACKWARD_COMPLETED = "backward_completed"
    OPTIM_STEP_STARTED = "optim_step_started"
    OPTIM_STEP_COMPLETED = "optim_step_completed"
    OPTIM_STEP_APPLIED = "optim_step_applied"
    OPTIM_STEP_SKIPPED = "optim_step_skipped"


_COUNTERS: dict[Any, str] = {
    StepEvents.BACKWARD_STARTED: "iteration",
    StepEvents.BACKWARD_COMPLETED: "iteration",
    StepEvents.OPTIM_STEP_APPLIED: "applied_steps",
}


def _identity(output: Any) -> Any:
    return output


def _apply(model: Any, x: Any) -> Any:
    return model(x)


def _unread_loss(x: Any, y: Any, y_pred: Any, loss: torch.Tensor) -> Any:
    return Unread(loss.detach())


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What a training step can be told besides model, optimizer and loss.

    Args:
        prepare_batch: called as `prepare_batch(batch, device=..., non_blocking=...)`, returns
            `(x, y)`; None: the batch is a pair, which the backend puts on its device.
        non_blocking: passed to `prepare_batch`.
        model_fn: called as `model_fn(model, x)`, returns the model's output.
        model_transform: called with the model's output, returns what the loss takes.
        output_transform: called as `output_transform(x, y, y_pred, loss)`, returns the iteration's
            output. By default the loss, which is copied to the host only when somebody reads it.
        accumulation_steps: over how many iterations gradients are accumulated, at least 1.
        max_norm: each optimizer's gradients are clipped to this total norm; None: not.

    Raises:
        ValueError: if `accumulation_steps` is below 1, or `max_norm` is not above 0.
    """

    prepare_batch: Callable[..., tuple[Any, Any]] | None = None
    non_blocking: bool = False
    model_fn: Callable[[Any, Any], Any] = _apply
    model_transform: Callable[[Any], Any] = _identity
    output_transform: Callable[[Any, Any, Any, Any], Any] = _unread_loss
    accumulation_steps: int = 1
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.accumulation_steps < 1:
            raise ValueError(
                "Gradient_accumulation_steps must be strictly positive. No gradient accumulation "
                f"if the value set to one (default); got {self.accumulation_steps}."
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(
                f"max_norm is the largest total norm of the gradients, above 0; got "
                f"{self.max_norm}. Leave it out, or pass None, to clip nothing."
            )

    def split(self, batch: Any, backend: Backend) -> tuple[Any, Any]:
        """Returns a batch as `(x, y)` on the device.

        Raises:
            ValueError: if the batch is not a pair and there is no `prepare_batch`.
        """
        if self.prepare_batch is not None:
            return self.prepare_batch(batch, device=backend.device, non_blocking=self.non_blocking)
        try:
            x, y = batch
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A batch should be a pair (x, y), got {type(batch).__name__} ({error}). Pass "
                "prepare_batch=function, which makes (x, y) of your batches."
            ) from error
        return backend.put(x), backend.put(y)


class TrainingStep:
    """Runs one iteration of supervised training on a backend; give it to an `Engine`.

    Gradients are accumulated over windows of `accumulation_steps` iterations, which may cross
    epochs. Each loss is divided by the number of iterations in its window; a run's last window,
    which may be shorter, is stepped with its own number.

    Args:
        model: a model, or several.
        optimizer: an optimizer, or several; all are stepped at the end of a window.
        loss_fn: called as `loss_fn(y_pred, y)`, returns a loss of one element.
        backend: an opened backend that has prepared model and optimizer.
        options: the rest.

    Raises:
        ValueError: if an optimizer holds none of the models' parameters.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        backend: Backend,
        options: StepOptions | None = None,
    ) -> None:
        self.model = model
        self.models: list[torch.nn.Module] = several(model)
        self.optimizer = optimizer
        self.optimizers: list[torch.optim.Optimizer] = several(optimizer)
        self.loss_fn = loss_fn
        self.backend = backend
        self.options = options or StepOptions()
        # The window: how many iterations are in it so far, and how many shall be.
        self._filled = 0
        self._planned = 0
        self._applied_steps = 0
        self._engine: Callable[[], Any] = lambda: None
        self._slots: dict[StepEvents, Slot] = {}
        _check_parameters(self.models, self.optimizers)

    def attach(self, engine: Engine) -> None:
        """Registers the step's events with an engine and has it step a window left at the end."""
        if self._engine() is engine:
            return
        self._engine = weakref.ref(engine)
        engine.register_events(*StepEvents, event_to_attr=_COUNTERS)
        engine.state.applied_steps = self._applied_steps  # type: ignore[attr-defined]
        self._slots = {event: engine.slot(event) for event in StepEvents}
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_of_epoch)
        engine.add_event_handler(Events.TERMINATE | Events.COMPLETED, self._end_of_run)

    def __call__(self, engine: Engine, batch: Any) -> Any:
        """Runs an iteration: put, forward, loss, backward, and the step at a window's end.

        Raises:
            ValueError: if the loss is not a tensor of one element that depends on the model.
            BackendError: if an optimizer has no gradient at its first step.
        """
        if self._engine() is not engine:
            self.attach(engine)
        options, backend = self.options, self.backend
        for model in self.models:
            if not model.training:
                model.train()
        if self._filled == 0:
            self._planned = self._plan(engine)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        x, y = options.split(batch, backend)
        with backend.autocast():
            y_pred = options.model_transform(options.model_fn(self.model, x))
            loss = self.loss_fn(y_pred, y)
        _check_loss(loss)
        self._backward(engine, loss)
        self._filled += 1
        if self._filled == self._planned:
            self._step(engine)
        return options.output_transform(x, y, y_pred, loss)

    def _plan(self, engine: Engine) -> int:
        """Returns the size of the window that begins: what is left of the run, if that is less."""
        wanted = self.options.accumulation_steps
        state = engine.state
        if wanted == 1:
            return 1
        if state.max_iters is not None:
            total = state.max_iters
        elif state.max_epochs is not None and state.epoch_length is not None:
            total = state.max_epochs * state.epoch_length
        else:
            return wanted
        return max(1, min(wanted, total - state.iteration + 1))

    def _backward(self, engine: Engine, loss: torch.Tensor) -> None:
        self._fire(engine, StepEvents.BACKWARD_STARTED)
        share = loss if self._planned == 1 else loss / self._planned
        if self._filled + 1 < self._planned:
            with self.backend.accumulating(self.model):
                self.backend.backward(share, self.optimizer)
        else:
            self.backend.backward(share, self.optimizer)
        self._fire(engine, StepEvents.BACKWARD_COMPLETED)

    def _step(self, engine: Engine) -> None:
        self._fire(engine, StepEvents.OPTIM_STEP_STARTED)
        max_norm = self.options.max_norm
        results: list[StepResult] = [self.backend.step(o, max_norm) for o in self.optimizers]
        self._filled = 0
        engine.state.step_results = results  # type: ignore[attr-defined]
        applied = all(result.applied for result in results)
        self._applied_steps += applied
        engine.state.applied_steps = self._applied_steps  # type: ignore[attr-defined]
        self._fire(engine, StepEvents.OPTIM_STEP_COMPLETED)
        self._fire(
            engine, StepEvents.OPTIM_STEP_APPLIED if applied else StepEvents.OPTIM_STEP_SKIPPED
        )

    def _fire(self, engine: Engine, event: StepEvents) -> None:
        if self._slots[event].handlers:
            engine.fire_event(event)

    def _end_of_epoch(self, engine: Engine) -> None:
        # Before the other handlers of the last epoch's end: they evaluate and save the weights.
        if is_done(engine.state):
            self._end_of_run(engine)

    def _end_of_run(self, engine: Engine) -> None:
        if self._filled == 0:
            return
        # The window is shorter than was planned: each loss was divided by too much.
        ratio = self._planned / self._filled
        for optimizer in self.optimizers:
            for parameter in _parameters(optimizer):
                if parameter.grad is not None:
                    parameter.grad.mul_(ratio)
        self._step(engine)
        self.backend.sync()

    def state_dict(self) -> dict[str, Any]:
        """Returns the window: its sizes, and the gradients so far, as tensors on the CPU."""
        gradients: list[dict[str, torch.Tensor]] = []
        if self._filled:
            gradients = [
                {
                    name: parameter.grad.detach().cpu().clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
                for model in self.models
            ]
        return {
            "filled": self._filled,
            "planned": self._planned,
            "applied_steps": self._applied_steps,
            "gradients": gradients,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: if a gradient belongs to no parameter of the models.
        """
        self._filled, self._planned = state["filled"], state["planned"]
        self._applied_steps = state["applied_steps"]
        engine = self._engine()
        if engine is not None:
            engine.state.applied_steps = self._applied_steps
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for index, gradients in enumerate(state["gradients"]):
            parameters = dict(self.models[index].named_parameters())
            for name, gradient in gradients.items():
                if name not in parameters:
                    raise ValueError(
                        f"The state holds a gradient of '{name}', which model {index} "
                        f"({type(self.models[index]).__name__}) does not have. Load the state "
                        "with the model that wrote it."
                    )
                parameter = parameters[name]
                parameter.grad = gradient.to(parameter.device, copy=True)


def several(value: Any) -> list[Any]:
    """Returns one or several objects as a list."""
    is_many = isinstance(value, Sequence) and not isinstance(value, torch.nn.Module)
    return list(value) if is_many else [value]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _check_parameters(
    models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    known = {id(parameter) for model in models for parameter in model.parameters()}
    for index, optimizer in enumerate(optimizers):
        if not any(id(parameter) in known for parameter in _parameters(optimizer)):
            raise ValueError(
                f"Optimizer {index} ({type(optimizer).__name__}) holds no parameter of the model: "
                "it would never get a gradient. Make it with model.parameters() of the model that "
                "is trained, not of a copy."
            )


def _check_loss(loss: Any) -> None:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad:
        return
    if not isinstance(loss, torch.Tensor):
        what = f"is {type(loss).__name__}, not a tensor"
    elif loss.numel() != 1:
        what = f"has shape {tuple(loss.shape)}: reduce it, with mean() or sum()"
    else:
        what = "does not depend on a parameter that requires grad: was it detached?"
    raise ValueError(f"loss_fn must return a tensor of one element to train on; its result {what}.")
