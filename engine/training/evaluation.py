"""The evaluation step: forward pass without gradients, written once for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.engine.ranks.world import unshared

from .options import StepOptions, several

if TYPE_CHECKING:
    from crosstrain.backends import Backend
    from crosstrain.engine.engine import Engine


def prediction(x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Returns `(y_pred, y)`, an evaluation's default output, which metrics take."""
    return y_pred, y


class EvaluationStep:
    """Runs one iteration of evaluation on a backend; give it to an `Engine`.

    Args:
        model: a model, or several.
        backend: an opened backend that has prepared the model.
        options: `prepare_batch`, `non_blocking`, `model_fn` and `model_transform` of a training
            step; the rest is not used.
        output_transform: called as `output_transform(x, y, y_pred)`, returns the iteration's
            output; `(y_pred, y)` by default, which metrics take.

    Raises:
        TypeError: if `output_transform` is no function.
        ValueError: if several models come without `model_fn`.
    """

    def __init__(
        self,
        model: Any,
        backend: Backend,
        options: StepOptions | None = None,
        output_transform: Callable[[Any, Any, Any], Any] = prediction,
    ) -> None:
        if not callable(output_transform):
            raise TypeError(
                "output_transform should be a function of (x, y, y_pred), got "
                f"{output_transform!r}."
            )
        self.model = model
        self.models: list[torch.nn.Module] = several(model)
        self.backend = backend
        self.options = options or StepOptions()
        self.output_transform = output_transform
        # Not what shares its gradients: that waits for all processes in each forward pass, and an
        # evaluation may run in one of them. A `model_fn` gets what it was written for.
        inner = unshared(model) if self.options.applies_model else model
        self._split, self._forward = self.options.splitter(), self.options.forward(inner)

    def __call__(self, engine: Engine, batch: Any) -> Any:
        """Runs an iteration: put and forward, in evaluation mode and without gradients.

        Raises:
            ValueError: if the batch is no pair.
        """
        for model in self.models:
            # A part may be in another mode than the whole: one model can be wrapped in another.
            if any(module.training for module in model.modules()):
                model.eval()
        backend = self.backend
        with torch.no_grad():
            x, y = self._split(batch, backend)
            with backend.autocast():
                y_pred = self._forward(x)
            output = self.output_transform(x, y, y_pred)
        if engine.backend is None:
            backend.sync()
        return output
