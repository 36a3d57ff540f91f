"""The training step of a factory's trainer, replayed as a graph."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosstrain.backends import BackendError
from crosstrain.engine.dispatch import Phase
from crosstrain.engine.events import Events

from .captured import Captured
from .step import TrainingStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from crosstrain.backends import Backend, StepResult
    from crosstrain.engine.engine import Engine

    from .options import StepOptions


_INSIDE = ("BACKWARD_STARTED", "BACKWARD_COMPLETED", "OPTIM_STEP_STARTED", "GRADIENTS_READY")


class CapturedStep(TrainingStep):
    """A training step whose forward and backward pass and optimizer step are one graph.

    What differs from a `TrainingStep`: nothing can be called in the middle of a graph, so handlers
    of BACKWARD_*, OPTIM_STEP_STARTED and GRADIENTS_READY are refused. `prepare_batch` and
    `output_transform` run outside of it. The backend needs the capability `graphs`, and all
    optimizers are to be capturable.
    """

    captured = True

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss_fn: Callable[[Any, Any], Tensor],
        backend: Backend,
        options: StepOptions | None = None,
    ) -> None:
        super().__init__(model, optimizer, loss_fn, backend, options)
        trained = [*self.models, *([loss_fn] if isinstance(loss_fn, torch.nn.Module) else [])]
        # It holds this step weakly: the graphs' memory is free as soon as the trainer is dropped.
        own = weakref.ref(self)

        def work(*given: Any) -> Any:
            step = own()
            assert step is not None, "it is called by the step alone"
            return step._work(*given)

        self._graph = Captured(work, backend, trained, self.optimizers)
        self._returns_prediction = not self.options.keeps_loss

    def state_dict(self) -> dict[str, Any]:
        """Returns what `TrainingStep.state_dict` does, and that the step is captured."""
        return {**super().state_dict(), "captured": True}

    def attach(self, engine: Engine) -> None:
        """Does what `TrainingStep.attach` does."""
        if engine not in self._engines:
            engine.add_in_phase(Events.EPOCH_STARTED, self._on_epoch_started, Phase.LAST)
        super().attach(engine)

    def _on_epoch_started(self, engine: Engine) -> None:
        del engine
        self._graph.look_again()

    def _pass(self, engine: Engine, x: Any, y: Any, filled: int) -> Any:
        self._refuse_listeners()
        self._filled = 0
        is_last = filled == self._planned
        loss, y_pred, results = self._graph(x, y, self._planned, is_last)
        if is_last:
            self._count(engine, results)
            filled = 0
        output = self._output(x, y, y_pred, loss)
        self._filled = filled
        return output

    def _work(self, x: Any, y: Any, planned: int, is_last: bool) -> Any:
        """Is what is recorded: one iteration of a window, with the step if it is the last one."""
        backend = self.backend
        y_pred, loss = self._loss_of(x, y)
        backend.backward(loss if planned == 1 else loss / planned, self.optimizer)
        results: list[StepResult] = []
        if is_last:
            results = [backend.step(one, self.options.max_norm) for one in self.optimizers]
            # The loss scale is adapted on the device, too.
            backend.sync()
        return loss, y_pred if self._returns_prediction else None, results

    def _step(self, engine: Engine) -> None:
        # Only of a window that the run's end has cut short: its passes are done.
        with self._graph.as_recorded():
            super()._step(engine)

    def _refuse_listeners(self) -> None:
        # The events before the step has been done, in their order.
        told = [name for name, slot in zip(_INSIDE, self._listeners, strict=False) if slot.handlers]
        if told:
            raise BackendError(
                f"The step is one graph, and handlers of {', '.join(told)} are called in its "
                "middle. Use OPTIM_STEP_COMPLETED or ITERATION_COMPLETED, where gradients are "
                "still to be read, clip by max_norm, or leave capture out."
            )
