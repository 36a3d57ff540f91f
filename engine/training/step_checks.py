"""Checks of what a training step is given: models, optimizers, loss function and loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .gradients import parameters_of

__all__ = ["check_trainable", "refuse_loss"]


def check_trainable(
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    loss_fn: Any,
) -> None:
    """Checks that a training step can train these models with these optimizers.

    Raises:
        TypeError: if the loss function cannot be called.
        ValueError: if there is no model or no optimizer, an optimizer holds no parameter of the
            models, shares one with another, or cannot be stepped without a closure.
    """
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
        if not any(id(parameter) in known for parameter in parameters):
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


def refuse_loss(loss: Any) -> None:
    """Says what is wrong with a loss that is no tensor of one element that requires grad.

    Raises:
        ValueError: always.
    """
    if not isinstance(loss, torch.Tensor):
        what = f"is {type(loss).__name__}, not a tensor"
    elif loss.numel() != 1:
        what = f"has shape {tuple(loss.shape)}: reduce it, with mean() or sum()"
    else:
        what = (
            "does not depend on a parameter that requires grad: was it detached, made under "
            "torch.no_grad(), or is the whole model frozen?"
        )
    raise ValueError(f"loss_fn must return a tensor of one element to train on; its result {what}.")
