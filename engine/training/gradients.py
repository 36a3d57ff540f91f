"""Gradients: names, saves, restores and rescales those of a training step's open window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from crosstrain.engine.spread import is_spread, spread_like

__all__ = ["capture", "clear", "parameters_of", "rescale", "restore"]


_ZERO_GRAD = torch.optim.Optimizer.zero_grad


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the parameters that an optimizer steps, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clear(optimizer: torch.optim.Optimizer) -> None:
    """Does what `optimizer.zero_grad()` does, at a tenth of its cost: takes the gradients away.

    An optimizer that has a `zero_grad` of its own is asked to do it.
    """
    if type(optimizer).zero_grad is not _ZERO_GRAD or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    # torch's own spends most of its time on a label for the profiler.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _named(
    models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Names each parameter once: by its model, or, in none, by its place in an optimizer."""
    named: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for label, model in _labelled("model", models):
        for name, parameter in model.named_parameters():
            # A compiled model and the bare one name the same parameter alike.
            named[f"{label}.{name.replace('_orig_mod.', '')}"] = parameter
            seen.add(id(parameter))
    for label, optimizer in _labelled("optimizer", optimizers):
        for position, parameter in enumerate(parameters_of(optimizer)):
            if id(parameter) not in seen:
                named[f"{label}.{position}"] = parameter
    return named


def _labelled(kind: str, things: Sequence[Any]) -> Iterable[tuple[str, Any]]:
    if len(things) == 1:
        return [(kind, things[0])]
    return [(f"{kind}_{index}", thing) for index, thing in enumerate(things)]


def capture(
    models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Returns copies of all gradients that there are, by name, on the CPU.

    Gradients whose parts lie in several processes are gathered: all of these call it together.

    Raises:
        ValueError: if there is none, but the parameters are sharded: then torch keeps them whole,
            where nobody else can reach them.
    """
    named = _named(models, optimizers)
    found = {
        name: _whole(parameter.grad.detach()).to("cpu", copy=True)
        for name, parameter in named.items()
        if parameter.grad is not None
    }
    if not found and any(is_spread(p) and p.requires_grad for p in named.values()):
        raise ValueError(
            "The gradients of this accumulation window cannot be saved: with "
            "Sharding(no_sync=True) FSDP keeps them to itself until the window ends. Save at the "
            "end of a window, or leave no_sync out."
        )
    return found


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor() if is_spread(gradient) else gradient


def restore(
    gradients: Mapping[str, torch.Tensor],
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Sets the gradients to what `capture` returned; a parameter that is not in it gets none.

    Raises:
        ValueError: if a gradient belongs to no parameter, or to one of another shape; then nothing
            is changed.
    """
    named = _named(models, optimizers)
    for name, gradient in gradients.items():
        if name not in named or named[name].shape != gradient.shape:
            found = f"has shape {tuple(named[name].shape)}" if name in named else "does not exist"
            raise ValueError(
                f"The state holds a gradient of '{name}' of shape {tuple(gradient.shape)}, and "
                f"that parameter {found} here. Load the state with models and optimizers like "
                "those that wrote it."
            )
    for name, parameter in named.items():
        saved = gradients.get(name)
        if saved is None:
            parameter.grad = None
        else:
            whole = saved.to(parameter.device, copy=True)
            parameter.grad = spread_like(whole, parameter)


def rescale(optimizers: Sequence[torch.optim.Optimizer], ratio: float) -> None:
    """Multiplies each gradient that the optimizers would step with by a ratio."""
    with torch.no_grad():
        for optimizer in optimizers:
            for parameter in parameters_of(optimizer):
                if parameter.grad is not None:
                    parameter.grad.mul_(ratio)
