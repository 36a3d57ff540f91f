"""Preparation: puts models on a device, so that optimizers and tied weights come along."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .errors import BackendError


def sort_objects(
    objects: Iterable[Any],
) -> tuple[list[torch.nn.Module], list[torch.optim.Optimizer]]:
    """Returns the models and the optimizers among the objects, which are one or the other."""
    models: list[torch.nn.Module] = []
    optimizers: list[torch.optim.Optimizer] = []
    for thing in objects:
        if isinstance(thing, torch.nn.Module):
            models.append(thing)
        elif isinstance(thing, torch.optim.Optimizer):
            optimizers.append(thing)
        else:
            raise TypeError(
                "prepare() takes torch.nn.Module and torch.optim.Optimizer objects, got "
                f"{type(thing).__name__}"
            )
    return models, optimizers


def place(
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> None:
    """Moves models to a device in place, and has the optimizers follow.

    On some devices `Module.to` makes new parameters: weights that were shared come apart, and an
    optimizer keeps the old ones. Here shared weights stay shared, and each optimizer gets the new
    parameters, with its state.
    """
    moved: dict[int, torch.nn.Parameter] = {}
    for model in models:
        _move(model, device, moved)
    for optimizer in optimizers:
        follow(optimizer, moved)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.device.type != device.type:
                    raise BackendError(
                        f"{type(optimizer).__name__} holds a parameter of shape "
                        f"{tuple(parameter.shape)} on '{parameter.device}', but its model is on "
                        f"'{device}'. Give model and optimizer to prepare() in one call, or make "
                        "the optimizer from the model after it."
                    )


def _move(
    model: torch.nn.Module, device: torch.device, moved: dict[int, torch.nn.Parameter]
) -> None:
    before = list(model.named_parameters(remove_duplicate=False))
    model.to(device)
    for name, old in before:
        if id(old) in moved:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, moved[id(old)])
        else:
            moved[id(old)] = model.get_parameter(name)


def follow(optimizer: torch.optim.Optimizer, moved: dict[int, torch.nn.Parameter]) -> None:
    """Gives an optimizer the parameters that have taken the place of its own, with their states."""
    changed = False
    for group in optimizer.param_groups:
        parameters: list[Any] = [moved.get(id(old), old) for old in group["params"]]
        changed |= any(new is not old for new, old in zip(parameters, group["params"], strict=True))
        for new, old in zip(parameters, group["params"], strict=True):
            if new is not old and old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)
        group["params"] = parameters
    if any(_is_elsewhere(parameter, values) for parameter, values in optimizer.state.items()):
        # Loading puts each tensor where the optimizer wants it: not all belong on the device.
        optimizer.load_state_dict(optimizer.state_dict())


def _is_elsewhere(parameter: Any, values: dict[str, Any]) -> bool:
    return any(
        isinstance(value, torch.Tensor)
        and value.shape == parameter.shape
        and value.device != parameter.device
        for value in values.values()
    )
