"""A step as a graph: what it asks of the device is recorded once, and done again by one call.

Between two operations of a step a device waits for the host, if the operations are short. A graph
has them all, and the host asks once. It does the same work on the same memory each time, so what
may differ from step to step is copied into that memory before: the batch, gradients that were put
elsewhere, learning rates. What cannot differ is looked at before each replay, and a step that has
become another one is recorded anew.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from crosstrain.backends import BackendError, StepResult, random_state
from crosstrain.backends.placement import map_tensors
from crosstrain.engine.digest import digest
from crosstrain.engine.random_states import random_states_kept
from crosstrain.engine.ranks.world import unshared
from crosstrain.engine.spread import parameters_of

from .kept import Kept
from .options import several
from .rates import Rates
from .step_hooks import StepHooks

if TYPE_CHECKING:
    from crosstrain.backends import Backend

_LOG = logging.getLogger(__name__)
# Torch's documentation warms up so often; libraries choose their kernels in the first ones.
_REHEARSALS = 3
# Graphs hold memory: who needs more of them has shapes that vary.
_MOST = 16
# How often in succession a graph may be given up without a second replay.
_PATIENCE = 4
_PLAIN = (str, bytes, int, float, bool, type(None))


class Captured:
    """Runs a function of a batch as a graph of the device; for a step of your own.

    `create_supervised_trainer(..., capture=True)` does it by itself. The function runs forward,
    backward and the optimizers' step on the backend, and ends with `backend.sync()`. It is called
    when the graph is recorded, and a few times before, which leaves no trace; after that, its
    Python code does not run. While an optimizer has no state yet, its first step, the function is
    called as it is.

    The bits are those of the same function called each time, with capturable optimizers and their
    learning rates as tensors; random numbers of the device go on from replay to replay. Nothing
    of a graph is in a checkpoint: after a resume it is recorded anew.

    Args:
        function: called with the inputs in memory that stays; returns a nest of tensors, plain
            values and `StepResult`s. It may not wait for the device: no `.item()`, no `if tensor`.
        backend: an opened backend with the capability `graphs`.
        model: the model that the function trains, or several: whatever it changes.
        optimizer: the optimizers that it steps, or one.

    Raises:
        BackendError: if the device has no graphs, or an optimizer cannot be part of one.
    """

    def __init__(
        self, function: Callable[..., Any], backend: Backend, model: Any, optimizer: Any
    ) -> None:
        self.function = function
        self.backend = backend
        self.models: list[torch.nn.Module] = [unshared(one) for one in several(model)]
        self.optimizers: list[torch.optim.Optimizer] = several(optimizer)
        self._graphs = _graphs_of(backend, self.optimizers)
        self._rates = Rates(self.optimizers, backend.device)
        self._hooks = StepHooks(self.optimizers)
        self._known: dict[Hashable, _Recorded] = {}
        # How often in succession a rehearsal made states of optimizers, how often the graphs of now
        # were replayed, and how often in succession they were given up after one replay at most.
        self._made_state = self._replays = self._short = 0
        # What the graphs hold, as it was looked at last: the parts of the models, and the rest.
        self._parts: tuple[list[int], ...] = ()
        self._held: dict[str, Any] = {}
        self.look_again()
        own = weakref.ref(self)

        def forget(_: Any) -> None:
            if (mine := own()) is not None:
                mine.forget("the states of an optimizer were loaded")

        for one in self.optimizers:
            one.register_load_state_dict_post_hook(forget)

    def look_again(self) -> None:
        """Looks for the parts of the models: after a module or a parameter was exchanged.

        The factory's trainer does it at the beginning of each epoch. What is only changed (frozen
        parameters, training modes, other memory) is noticed without it.
        """
        modules = [module for model in self.models for module in model.modules()]
        found: dict[int, Tensor] = {id(p): p for model in self.models for p in model.parameters()}
        for optimizer in self.optimizers:
            found |= {id(p): p for p in parameters_of(optimizer)}
        buffers = [buffer for model in self.models for buffer in model.buffers()]
        parts = (list(map(id, modules)), list(found), list(map(id, buffers)))
        if parts != self._parts:
            self.forget("the model has other parts")
        self._parts = parts
        self._modules, self._buffers = modules, buffers
        self._parameters: list[Tensor] = list(found.values())

    def forget(self, why: str) -> None:
        """Gives up what was recorded; the next call records it anew.

        Raises:
            BackendError: if that happens from step to step.
        """
        if not self._known:
            return
        self._known.clear()
        self._graphs.forget()
        _LOG.info("The graph of the step is recorded anew: %s.", why)
        self._short = 0 if self._replays > 1 else self._short + 1
        self._replays = 0
        if self._short >= _PATIENCE:
            raise BackendError(
                f"A graph of the step is of no use, since it changes each time: {why}. A graph "
                "holds everything but the batch, the gradients and learning rates. Keep that as it "
                "is (of a OneCycleLR or CyclicLR, with cycle_momentum=False), or leave capture out."
            )

    def __call__(self, *inputs: Any) -> Any:
        """Runs the step.

        Args:
            *inputs: nests of tensors on the device, and plain values. Each combination of shapes,
                types and plain values is recorded as a graph of its own.

        Returns:
            What the function returned, in memory of its own, detached.

        Raises:
            BackendError: if the step cannot be recorded, or has too many shapes.
            TypeError: if an input is something else.
        """
        self._look()
        tensors: list[Tensor] = []
        shape = (
            tuple(_shape_of(one, tensors, self.backend.device) for one in inputs),
            tuple([parameter.grad is not None for parameter in self._parameters]),
        )
        recorded = self._known.get(shape)
        if recorded is not None:
            self._replays += 1
            return recorded.run(tensors)
        found = self._record(shape, inputs, tensors)
        if found is None:
            with self.as_recorded():
                return _copied(self.function(*inputs))
        self._known[shape] = found
        return found.run(tensors)

    @contextmanager
    def as_recorded(self) -> Generator[None, None, None]:
        """Has optimizers step inside as they do in the graph: with rates that are tensors."""
        with self._rates.as_tensors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capt")
            yield

    # ---------------------------------------------------------------- is it the same step?

    def _look(self) -> None:
        """Gives up graphs of a step that is another one now."""
        now = {
            "which parameters want gradients": [p.requires_grad for p in self._parameters],
            "where parameters and buffers lie": [
                one.data_ptr() for group in (self._parameters, self._buffers) for one in group
            ],
            "which modules are in training mode": [module.training for module in self._modules],
            **self._rates.constants(),
        }
        before, self._held = self._held, now
        if now == before:
            return
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        self.forget(f"what has changed is {', '.join(changed)}")

    # ---------------------------------------------------------------- recording

    def _record(
        self, shape: Hashable, inputs: Sequence[Any], tensors: Sequence[Tensor]
    ) -> _Recorded | None:
        """Records a graph; returns None where the step makes states that no graph may make."""
        if len(self._known) >= _MOST:
            shapes = sorted({str(_sizes(one)) for one in (shape, *self._known)})
            raise BackendError(
                f"The step was recorded for {_MOST} combinations of shapes and values, and comes "
                f"with yet another; its sizes are {'; '.join(shapes[:_MOST])}. Pad batches to a "
                "few sizes, use drop_last=True, or leave capture out."
            )
        self._hooks.wait()
        statics: list[Tensor] = []
        held = map_tensors(inputs, lambda one: _held(one, statics))
        kept = Kept(self.models, self._parameters, self.optimizers, self.backend)
        try:
            with random_states_kept(self.backend):
                if self._rehearse(kept, held, statics, tensors):
                    return None
                return self._record_now(held, statics)
        except BaseException:
            kept.restore()
            raise

    def _rehearse(
        self, kept: Kept, held: Any, statics: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> bool:
        """Runs the step without a trace; tells whether it makes states of the optimizers."""
        for _ in range(_REHEARSALS):
            _fill(statics, tensors)
            drawn = digest(random_state.capture())
            with random_states_kept(self.backend):
                with self._graphs.rehearsing(), self.as_recorded(), self._hooks.silenced():
                    self.function(*held)
                if digest(random_state.capture()) != drawn:
                    raise BackendError(
                        "The step cannot be recorded as a graph: it draws random numbers on the "
                        "host, and a graph would do what followed from the first of them each "
                        "time. Draw on the device, or in the data, or leave capture out."
                    )
            made = kept.has_made_state()
            if not made:
                kept.check_host()
            kept.restore()
            if made:
                self._made_state += 1
                if self._made_state > _PATIENCE:
                    names = sorted({type(one).__name__ for one in self.optimizers})
                    raise BackendError(
                        f"The step cannot be recorded as a graph: {', '.join(names)} makes new "
                        "tensors of its state in each step. Use another, or leave capture out."
                    )
                return True
        self._made_state = 0
        return False

    def _record_now(self, held: Any, statics: Sequence[Tensor]) -> _Recorded:
        given = [(p, p.grad) for p in self._parameters if p.grad is not None]
        self._rates.fill()
        try:
            with (
                self._hooks.silenced() as stepped,
                self.as_recorded(),
                self._graphs.recording() as graph,
            ):
                told = self.function(*held)
        except Exception as error:
            raise BackendError(
                f"The step could not be recorded as a graph: {_first(error)}. What is recorded may "
                "not wait for the device (.item(), .cpu(), `if tensor`, nonzero, an index by a "
                "mask) nor copy from the host (torch.tensor(...)); printing, numbers for a log and "
                "copies belong into handlers. Or leave capture out."
            ) from error
        left = [(p, p.grad) for p in self._parameters]
        _LOG.info("The step was recorded as a graph of %s.", self.backend.device)
        return _Recorded(graph, statics, given, left, told, self._rates, StepHooks(stepped))


def _first(error: BaseException) -> BaseException:
    """Returns what an error came of: the device's module ends a recording by another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@dataclass
class _Recorded:
    """A graph, and the memory that it works on."""

    graph: Any
    #: The inputs.
    statics: Sequence[Tensor]
    #: Parameters with their gradients, as it begins with them and as it leaves them.
    given: Sequence[tuple[Tensor, Any]]
    left: Sequence[tuple[Tensor, Any]]
    #: What the step returns.
    told: Any
    rates: Rates
    hooks: StepHooks

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Does the step with other inputs, and returns what it tells in memory of its own."""
        self.hooks.before()
        with torch.no_grad():
            _fill(self.statics, tensors)
            for parameter, gradient in self.given:
                if parameter.grad is not gradient:
                    gradient.copy_(parameter.grad)
            self.rates.fill()
            self.graph.replay()
            for parameter, gradient in self.left:
                if parameter.grad is not gradient:
                    parameter.grad = gradient
        # What watches gradients, or saves them, sees by their versions that they are new.
        increment_version([gradient for _, gradient in self.left if gradient is not None])
        self.hooks.after()
        return _copied(self.told)


def _graphs_of(backend: Backend, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
    make: Any = getattr(backend, "graphs", None)
    if make is None:
        raise BackendError(
            f"The backend '{backend.name}:{backend.option}' cannot record a step as a graph: it "
            "has no method 'graphs'. Leave capture out; docs/training_step.md says which can."
        )
    return make(optimizers)


# ---------------------------------------------------------------- inputs and outputs


def _shape_of(value: Any, tensors: list[Tensor], device: torch.device) -> Hashable:
    """Returns what of an input a graph holds; its tensors are put into a list, in order."""
    if isinstance(value, Tensor):
        if value.device.type != device.type:
            raise BackendError(
                f"A tensor of shape {tuple(value.shape)} that is given to the graph of a step lies "
                f"on '{value.device}', and the step on '{device}'. Put it there: backend.put(...)."
            )
        tensors.append(value)
        return (value.shape, value.dtype, value.stride(), value.requires_grad)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        items: Any = value
        return (type(items), *(_shape_of(item, tensors, device) for item in items))
    if isinstance(value, Mapping):
        told = ((key, _shape_of(item, tensors, device)) for key, item in value.items())
        return (type(value), *told)
    if is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
        return (type(value), *(_shape_of(item, tensors, device) for item in items))
    raise TypeError(
        f"The graph of a step takes nests of tensors and plain values, and was given a "
        f"{type(value).__name__}. Make tensors of it in prepare_batch, or leave capture out."
    )


def _sizes(shape: Any) -> list[tuple[int, ...]]:
    """Returns the sizes of all tensors in what `_shape_of` returned."""
    if isinstance(shape, torch.Size):
        return [tuple(shape)]
    if not isinstance(shape, tuple):
        return []
    return [size for part in shape for size in _sizes(part)]


def _held(tensor: Tensor, statics: list[Tensor]) -> Tensor:
    """Returns memory for an input like this one, with the same strides."""
    held = tensor.new_empty_strided(tensor.shape, tensor.stride())
    statics.append(held)
    return held.requires_grad_(tensor.requires_grad)


def _fill(statics: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for static, tensor in zip(statics, tensors, strict=True):
            static.detach().copy_(tensor)


def _copied(value: Any) -> Any:
    """Returns what a step tells in memory that no replay changes, and without its graph."""
    if isinstance(value, StepResult):
        return value.copied()
    kind: Any = value.__class__
    if kind in (list, tuple):
        return kind(_copied(item) for item in value)
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    return map_tensors(value, lambda one: one.detach().clone())
