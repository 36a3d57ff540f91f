"""The training step: forward, loss, backward and optimizer step, written once for every backend."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from crosstrain.engine.data.own_data import check_own
from crosstrain.engine.data.shares import deals_out, share_of
from crosstrain.engine.dispatch import Phase
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.events import EventEnum, Events
from crosstrain.engine.progress import is_done
from crosstrain.engine.ranks.world import unshared
from crosstrain.engine.spread import parameters_of

from . import gradients
from .options import StepOptions, several

if TYPE_CHECKING:
    from crosstrain.backends import Backend, StepResult
    from crosstrain.engine.dispatch import Slot
    from crosstrain.engine.state import State


class StepEvents(EventEnum):
    """The events of a training step, which a factory's trainer fires beside the engine's own.

    BACKWARD_* fire each iteration. OPTIM_STEP_* fire where the optimizers are stepped: each
    iteration, or at the end of each accumulation window. GRADIENTS_READY follows OPTIM_STEP_STARTED
    and is the place to read or change gradients: on every backend they are those of the global
    batch there, without loss scale, not clipped to `max_norm` yet, and not applied.
    OPTIM_STEP_APPLIED and OPTIM_STEP_SKIPPED follow OPTIM_STEP_COMPLETED: the first if every
    optimizer changed its weights, the second if the loss scaler skipped one. Step a scheduler or an
    EMA at OPTIM_STEP_APPLIED.

    Filters such as `every` compare with `state.iteration` for BACKWARD_*, and for the others with
    how often a run's optimizers were stepped (`state.optim_steps`, for STARTED and COMPLETED), how
    often that was applied (`state.applied_steps`), and skipped (`state.skipped_steps`).
    """

    BACKWARD_STARTED = "backward_started"
    BACKWARD_COMPLETED = "backward_completed"
    OPTIM_STEP_STARTED = "optim_step_started"
    GRADIENTS_READY = "gradients_ready"
    OPTIM_STEP_COMPLETED = "optim_step_completed"
    OPTIM_STEP_APPLIED = "optim_step_applied"
    OPTIM_STEP_SKIPPED = "optim_step_skipped"


_COUNTERS: dict[Any, str] = {
    StepEvents.BACKWARD_STARTED: "iteration",
    StepEvents.BACKWARD_COMPLETED: "iteration",
    StepEvents.OPTIM_STEP_STARTED: "optim_steps",
    StepEvents.GRADIENTS_READY: "optim_steps",
    StepEvents.OPTIM_STEP_COMPLETED: "optim_steps",
    StepEvents.OPTIM_STEP_APPLIED: "applied_steps",
    StepEvents.OPTIM_STEP_SKIPPED: "skipped_steps",
}


class _Listeners(NamedTuple):
    """An engine's slots for the step's events, in their order: looked up once."""

    backward_started: Slot
    backward_completed: Slot
    optim_step_started: Slot
    gradients_ready: Slot
    optim_step_completed: Slot
    optim_step_applied: Slot
    optim_step_skipped: Slot


# Stands for modules that are not known yet: it is in no training mode, so they are looked for.
_UNKNOWN = (SimpleNamespace(training=False),)
_STATE_KEYS = frozenset({"filled", "planned", "optim_steps", "applied_steps", "gradients"})


def _no_engine() -> Engine | None:
    return None


class StepCounts:
    """Counts steps without waiting for a device that has not said yet whether it skipped one.

    A fused optimizer with a loss scale skips on the device itself. What became of its steps is
    added up there, and read when somebody asks.
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
        """Counts a step: as skipped, if one of the optimizers was."""
        self.optim_steps += 1
        outcomes: list[Any] = [result.outcome for result in results]
        if any(outcome is False for outcome in outcomes):
            self.skipped += 1
        elif waiting := [outcome for outcome in outcomes if outcome is not True]:
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


def _trained_of(model: Any) -> list[str]:
    """Names what is trained of the models whose gradients are shared by DistributedDataParallel."""
    return [
        f"model_{index}.{name}" if len(several(model)) > 1 else name
        for index, one in enumerate(several(model))
        if (inner := unshared(one)) is not one
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad
    ]


class TrainingStep:
    """Runs one iteration of supervised training on a backend; give it to an `Engine`.

    Gradients are accumulated over windows of `accumulation_steps` iterations, which may cross
    epochs. Each loss is divided by the number of iterations in its window; a run's last window,
    which may be shorter, is stepped with its own number. A window belongs to one run of one engine:
    a new run begins with a new one.

    Where an iteration fails after its backward pass has begun, the gradients of its window are not
    those of whole iterations: they are dropped, and the next iteration begins a window.

    In several processes each loss is the mean over this process's part of the global batch. Where a
    `DeterministicEngine` has dealt a batch out unevenly, its gradients are weighted by the counts.

    Args:
        model: a model, or several.
        optimizer: an optimizer, or several; all are stepped at the end of a window.
        loss_fn: called as `loss_fn(y_pred, y)`, returns a loss of one element.
        backend: an opened backend that has prepared model and optimizer.
        options: the rest.

    Raises:
        ValueError: if an optimizer holds none of the models' parameters, shares one with another,
            or needs a closure; or if several models come without `model_fn`.
    """

    #: Whether the step is replayed as a graph: its bits may be others.
    captured = False

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        backend: Backend,
        options: StepOptions | None = None,
    ) -> None:
        self.model = model
        self.models: list[torch.nn.Module] = [unshared(one) for one in several(model)]
        self.optimizer = optimizer
        self.optimizers: list[torch.optim.Optimizer] = several(optimizer)
        self.loss_fn = loss_fn
        self.backend = backend
        self.options = options or StepOptions()
        masters = "master_weights" in backend.capabilities
        _check_trainable(self.models, self.optimizers, loss_fn, masters)
        self._split, self._forward = self.options.splitter(), self.options.forward(model)
        self._output = self.options.output_transform
        # The window: how many iterations are in it, and how many shall be (0 once it was stepped).
        self._filled = 0
        self._planned = 0
        self._counts = StepCounts()
        # The window and the counts were loaded, and no run has gone on from them yet.
        self._loaded = False
        # The modules that train() puts into training mode.
        self._training: Iterable[Any] = _UNKNOWN
        # Several processes share the gradients; the data that was seen not to be the same in all.
        self._many = backend.world.size > 1
        self._own_data: Any = None
        self._shared = _trained_of(model)
        self._engine: Callable[[], Engine | None] = _no_engine
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._listeners: _Listeners

    # ---------------------------------------------------------------- the engine

    def attach(self, engine: Engine) -> None:
        """Registers the step's events with an engine and has it step a window left at the end.

        The factories do so; for an engine of your own, do it before you attach handlers to
        `StepEvents`. Otherwise it is done at the first iteration.

        Raises:
            TypeError: if it is no `Engine` of this library.
        """
        if not isinstance(engine, Engine):
            raise TypeError(
                "A training step runs in an Engine of crosstrain.engine, whose events it fires; "
                f"got {type(engine).__module__}.{type(engine).__qualname__}."
            )
        if self._engine() is engine:
            return
        if self._engine is not _no_engine and not self._loaded:
            self._begin_anew()
        self._engine = weakref.ref(engine)
        if engine not in self._engines:
            self._engines.add(engine)
            engine.register_events(*StepEvents, event_to_attr=_COUNTERS)
            # The other handlers evaluate and save the weights.
            engine.add_in_phase(Events.STARTED, self._on_started, Phase.FIRST)
            engine.add_in_phase(Events.EPOCH_COMPLETED, self._on_epoch_completed, Phase.FIRST)
            if self._shared:
                # The user's handlers unfreeze there.
                engine.add_in_phase(Events.EPOCH_STARTED, self._check_shared, Phase.LAST)
            engine.add_in_phase(Events.TERMINATE, self._on_end, Phase.FIRST)
            engine.add_in_phase(Events.COMPLETED, self._on_end, Phase.FIRST)
        self._listeners = _Listeners(*(engine.slot(event) for event in StepEvents))
        self._counts.tell(engine.state)

    def _begin_anew(self) -> None:
        self._filled, self._counts = 0, StepCounts()

    def _on_started(self, engine: Engine) -> None:
        self._training = _UNKNOWN
        if self._engine() is not engine:
            return
        if self._many:
            self._check_data(engine)
        if engine.state.iteration == 0 and not self._loaded:
            # The window that a failed run left behind is no part of this one.
            self._begin_anew()
            self._counts.tell(engine.state)
        self._loaded = False

    def _check_shared(self) -> None:
        """Raises if something is trained whose gradients the processes do not share."""
        left = [name for name in _trained_of(self.model) if name not in self._shared]
        if left:
            raise ValueError(
                f"{', '.join(map(repr, left[:4]))}{' ...' * (len(left) > 4)} was frozen when the "
                "model was prepared for several processes, and is trained now: "
                "DistributedDataParallel would not share its gradient, and the copies of the model "
                "would part. Leave it unfrozen and give its parameter group a learning rate of 0 "
                "until then; or train with shards=, or a backend's option fsdp, where it may be "
                "unfrozen."
            )

    def _on_epoch_completed(self, engine: Engine) -> None:
        if is_done(engine.state):
            self._on_end(engine)

    def _on_end(self, engine: Engine) -> None:
        if self._filled == 0 or self._engine() is not engine:
            return
        # The window is shorter than was planned: each loss was divided by too much.
        gradients.rescale(self.optimizers, self._planned / self._filled)
        if self._many:
            gradients.average(several(self.model), self.optimizers)
        self._filled = 0
        self._step(engine)
        self.backend.sync()

    # ---------------------------------------------------------------- an iteration

    def __call__(self, engine: Engine, batch: Any) -> Any:
        """Runs an iteration: put, forward, loss, backward, and the step at a window's end.

        Raises:
            ValueError: if the batch is no pair, or the loss is not a tensor of one element that
                depends on the model; or if all processes would train on the same data.
            BackendError: if an optimizer has no gradient.
        """
        if self._engine() is not engine:
            self.attach(engine)
        if self._many and self._own_data is not engine.state.dataloader:
            self._check_data(engine)
        self._into_training_mode()
        earlier = self._filled
        if not earlier:
            self._open_window(engine)
        try:
            output = self._iteration(engine, batch, earlier + 1)
        except BaseException as error:
            if earlier and self._planned and not self._filled:
                error.add_note(
                    f"The gradients of the {earlier} earlier iterations of this accumulation "
                    "window are dropped: they cannot be told apart from this one's."
                )
            raise
        if engine.backend is None:
            self.backend.sync()
        return output

    def _iteration(self, engine: Engine, batch: Any, filled: int) -> Any:
        x, y = self._split(batch, self.backend)
        if filled == self._planned:
            return self._pass(engine, x, y, filled)
        # The forward pass too: DistributedDataParallel decides there what is shared after it.
        with self.backend.accumulating(self.model):
            return self._pass(engine, x, y, filled)

    def _pass(self, engine: Engine, x: Any, y: Any, filled: int) -> Any:
        """Runs the forward and the backward pass, and the step where the window is full."""
        y_pred, loss = self._loss_of(x, y)
        # Nothing is in the window until the iteration is whole: what raises from here on drops it.
        self._filled = 0
        if self._many:
            with gradients.weighted(loss, share_of(engine), self.models, y_pred) as part:
                self._backward(engine, part)
        else:
            self._backward(engine, loss)
        if filled == self._planned:
            self._step(engine)
            filled = 0
        output = self._output(x, y, y_pred, loss)
        self._filled = filled
        return output

    def _loss_of(self, x: Any, y: Any) -> tuple[Any, Tensor]:
        """Runs the forward pass; returns the prediction and a loss that can be trained on."""
        with self.backend.autocast():
            y_pred = self._forward(x)
            loss: Any = self.loss_fn(y_pred, y)
        if not (isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1):
            raise _no_loss(loss)
        return y_pred, loss

    def _into_training_mode(self) -> None:
        for module in self._training:
            if not module.training:
                self._train()
                break

    def _train(self) -> None:
        for model in self.models:
            model.train()
        # A model whose train() leaves a part in evaluation mode, such as a frozen batch norm, means
        # it so.
        self._training = [m for model in self.models for m in model.modules() if m.training]

    def _check_data(self, engine: Engine) -> None:
        data = engine.state.dataloader
        if not deals_out(engine):
            check_own(data, self.backend.world)
        self._own_data = data

    def _open_window(self, engine: Engine) -> None:
        self._loaded = False
        wanted = self.options.accumulation_steps
        self._planned = 1 if wanted == 1 else min(wanted, _iterations_left(engine, wanted))
        for optimizer in self.optimizers:
            gradients.clear(optimizer)

    def _backward(self, engine: Engine, loss: Tensor) -> None:
        listeners, backend, planned = self._listeners, self.backend, self._planned
        if listeners.backward_started.handlers:
            engine.fire_event(StepEvents.BACKWARD_STARTED)
        backend.backward(loss if planned == 1 else loss / planned, self.optimizer)
        if listeners.backward_completed.handlers:
            engine.fire_event(StepEvents.BACKWARD_COMPLETED)

    def _step(self, engine: Engine) -> None:
        listeners, step, max_norm = self._listeners, self.backend.step, self.options.max_norm
        told: Any = engine.state
        told.optim_steps = self._counts.optim_steps + 1
        if listeners.optim_step_started.handlers:
            engine.fire_event(StepEvents.OPTIM_STEP_STARTED)
        if listeners.gradients_ready.handlers:
            for optimizer in self.optimizers:
                self.backend.unscale(optimizer)
            engine.fire_event(StepEvents.GRADIENTS_READY)
        self._count(engine, [step(optimizer, max_norm) for optimizer in self.optimizers])

    def _count(self, engine: Engine, results: list[StepResult]) -> None:
        """Counts a step of all optimizers, and tells those who listen what became of it."""
        listeners, counts, state = self._listeners, self._counts, engine.state
        told: Any = state
        told.step_results = results
        self._planned = 0
        plain = counts.unread is None
        for result in results:
            if result.outcome is not True:
                plain = False
                break
        if plain:
            # Of each step that is applied and known to be: each call here would show.
            counts.optim_steps += 1
            told.optim_steps = counts.optim_steps
            told.applied_steps = counts.optim_steps - counts.skipped
        else:
            counts.add(results)
            counts.tell(state)
        if listeners.optim_step_completed.handlers:
            engine.fire_event(StepEvents.OPTIM_STEP_COMPLETED)
        if listeners.optim_step_applied.handlers or listeners.optim_step_skipped.handlers:
            # Who listens to what became of the step has to wait for the device; nobody else does.
            applied = plain or all(result.applied for result in results)
            slot = listeners.optim_step_applied if applied else listeners.optim_step_skipped
            if slot.handlers:
                engine.fire_event(slot.event)

    # ---------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """Returns the window and the counts: its gradients so far as tensors on the CPU."""
        return {
            "filled": self._filled,
            "planned": self._planned,
            "optim_steps": self._counts.optim_steps,
            "applied_steps": self._counts.applied_steps,
            "gradients": gradients.capture(self.models, self.optimizers) if self._filled else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: if a key is missing, or a gradient belongs to no parameter of the models and
                optimizers.
        """
        if missing := sorted(_STATE_KEYS - set(state)):
            raise ValueError(
                f"The state of a training step lacks {missing}; it has {sorted(state)}. States "
                "come from TrainingStep.state_dict()."
            )
        if (then := bool(state.get("captured"))) != self.captured:
            words = {True: "was replayed as a graph", False: "was not"}
            warn_user(
                f"The training step of the run that wrote this state {words[then]}, and here it "
                f"{words[self.captured]}: its numbers may differ in their last bits. Give the "
                f"factory capture={then}.",
                ResumeWarning,
            )
        gradients.restore(
            state["gradients"], gradients.named_by_place(self.models, self.optimizers)
        )
        self._filled, self._planned = state["filled"], state["planned"]
        gradients.put_in_windows(several(self.model), [self._filled > 0] * len(self.models))
        self._counts = StepCounts(state["optim_steps"], state["applied_steps"])
        self._loaded = True
        engine = self._engine()
        if engine is not None:
            self._counts.tell(engine.state)


def _iterations_left(engine: Engine, wanted: int) -> int:
    """Returns how many iterations the run has from this one on; `wanted` where nobody knows."""
    state = engine.state
    if state.max_iters is not None:
        total = state.max_iters
    elif state.max_epochs is not None and state.epoch_length is not None:
        total = state.max_epochs * state.epoch_length
    else:
        return wanted
    return max(1, total - state.iteration + 1)


# ---------------------------------------------------------------- what is refused


def _check_trainable(
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    loss_fn: Any,
    masters: bool,
) -> None:
    """Checks that a training step can train these models with these optimizers."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn should be a function of (y_pred, y), got {loss_fn!r}.")
    for things, name in ((models, "model"), (optimizers, "optimizer")):
        if not things:
            raise ValueError(f"{name} is an empty list. Pass one {name}, or a list of several.")
    known = {id(parameter) for model in models for parameter in model.parameters()}
    holders: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        _check_takes_no_closure(index, optimizer)
        parameters = parameters_of(optimizer)
        if not masters and not any(id(parameter) in known for parameter in parameters):
            raise ValueError(
                f"Optimizer {index} ({type(optimizer).__name__}) holds no parameter of the model: "
                "it would never get a gradient. Make it with model.parameters() of the model that "
                "is trained, not of a copy."
            )
        for parameter in parameters:
            other = holders.setdefault(id(parameter), index)
            if other != index:
                raise ValueError(
                    f"Optimizers {other} and {index} hold the same parameter, of shape "
                    f"{tuple(parameter.shape)}: both would clip, unscale and apply its gradient. "
                    "Give each parameter to one optimizer."
                )


def _check_takes_no_closure(index: int, optimizer: torch.optim.Optimizer) -> None:
    # The class's method: a scheduler puts a wrapper on the object, with another signature.
    _, *others = inspect.signature(type(optimizer).step).parameters.values()
    for parameter in others:
        named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if named and parameter.default is parameter.empty:
            raise ValueError(
                f"Optimizer {index} ({type(optimizer).__name__}) computes the loss several times "
                f"a step: its step() requires '{parameter.name}'. A training step computes it "
                "once a batch. Use an optimizer such as SGD or AdamW, or give an Engine a process "
                "function of your own."
            )


def _no_loss(loss: Any) -> ValueError:
    """Says what is wrong with a loss that is no tensor of one element that requires grad."""
    if not isinstance(loss, torch.Tensor):
        what = f"is {type(loss).__name__}, not a tensor"
    elif loss.numel() != 1:
        what = f"has shape {tuple(loss.shape)}: reduce it, with mean() or sum()"
    else:
        what = (
            "does not depend on a parameter that requires grad: was it detached, made under "
            "torch.no_grad(), or is the whole model frozen?"
        )
    return ValueError(
        f"loss_fn must return a tensor of one element to train on; its result {what}."
    )
