"""StepOptions: what a step can be told besides model, optimizer and loss, and how it uses that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

import torch

from crosstrain.engine.state import Unread

if TYPE_CHECKING:
    from crosstrain.backends import Backend

_NO_PAIRS = (torch.Tensor, Mapping, str)


def is_many(value: Any) -> bool:
    """Tells whether several models or optimizers were given: a list, a tuple, no single model."""
    return isinstance(value, Sequence) and not isinstance(value, torch.nn.Module)


def several(value: Any) -> list[Any]:
    """Returns one or several models or optimizers as a list."""
    return list(cast("Sequence[Any]", value)) if is_many(value) else [value]


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
        model_fn: called as `model_fn(model, x)`, returns the model's output; with several models,
            it gets the list of them.
        model_transform: called with the model's output, returns what the loss takes.
        output_transform: called as `output_transform(x, y, y_pred, loss)`, returns the iteration's
            output. By default the loss, which is copied to the host only when somebody reads it.
        accumulation_steps: over how many iterations gradients are accumulated, at least 1.
        max_norm: each optimizer's gradients are clipped to this total norm; None: not.

    Raises:
        ValueError: if `accumulation_steps` is no integer of at least 1, or `max_norm` is not
            above 0.
        TypeError: if what should be a function is none.
    """

    prepare_batch: Callable[..., tuple[Any, Any]] | None = None
    non_blocking: bool = False
    model_fn: Callable[[Any, Any], Any] = _apply
    model_transform: Callable[[Any], Any] = _identity
    output_transform: Callable[[Any, Any, Any, Any], Any] = _unread_loss
    accumulation_steps: int = 1
    max_norm: float | None = None

    def __post_init__(self) -> None:
        steps: Any = self.accumulation_steps
        if not isinstance(steps, Integral) or int(steps) < 1:
            raise ValueError(
                "Gradient_accumulation_steps must be strictly positive, an integer. No gradient "
                f"accumulation if the value set to one (default); got {steps!r}."
            )
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(
                f"max_norm is the largest total norm of the gradients, above 0; got "
                f"{self.max_norm}. Leave it out, or pass None, to clip nothing."
            )
        for name in ("prepare_batch", "model_fn", "model_transform", "output_transform"):
            function = getattr(self, name)
            if not (callable(function) or (name == "prepare_batch" and function is None)):
                raise TypeError(f"{name} should be a function, got {function!r}.")

    @property
    def keeps_loss(self) -> bool:
        """Whether the iteration's output is the loss, and no function makes another of it."""
        return self.output_transform is _unread_loss

    @property
    def applies_model(self) -> bool:
        """Whether the model itself is called, and no function of the user's is given it."""
        return self.model_fn is _apply

    def splitter(self) -> Callable[[Any, Backend], tuple[Any, Any]]:
        """Returns the function from (batch, backend) to `(x, y)` on the backend's device."""
        return _split_pair if self.prepare_batch is None else self._split_by_user

    def _split_by_user(self, batch: Any, backend: Backend) -> tuple[Any, Any]:
        assert self.prepare_batch is not None
        pair = self.prepare_batch(batch, device=backend.device, non_blocking=self.non_blocking)
        try:
            x, y = pair
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"prepare_batch should return a pair (x, y), got {type(pair).__name__} ({error})."
            ) from error
        return x, y

    def forward(self, model: Any) -> Callable[[Any], Any]:
        """Returns the function from x to what the loss takes, without what does nothing."""
        model_fn, transform = self.model_fn, self.model_transform
        if model_fn is _apply and is_many(model):
            raise ValueError(
                f"Several models were given ({len(model)}), and nothing says how x passes through "
                "them. Pass model_fn=function, which is called as model_fn(models, x)."
            )
        if transform is _identity:
            return model if model_fn is _apply else lambda x: model_fn(model, x)
        return lambda x: transform(model_fn(model, x))


def _split_pair(batch: Any, backend: Backend) -> tuple[Any, Any]:
    # Both would unpack into a pair by accident: a dict of two into its keys, a tensor of two
    # samples into these.
    # The first two comparisons only spare the usual batch the third.
    kind: Any = batch.__class__
    if kind is not list and kind is not tuple and isinstance(batch, _NO_PAIRS):
        raise _no_pair(batch, "it has no x and y")
    try:
        x, y = batch
    except (TypeError, ValueError) as error:
        raise _no_pair(batch, error) from error
    put = backend.put
    return put(x), put(y)


def _no_pair(batch: Any, why: object) -> ValueError:
    return ValueError(
        f"A batch should be a pair (x, y), got {type(batch).__name__}: {why}. Pass "
        "prepare_batch=function, which makes (x, y) of your batches."
    )
