"""Gradients of a training step: kept over an accumulation window, and averaged over processes.

A window's gradients are named, saved, restored and rescaled. Processes average theirs, each with
the same weight: where a batch was dealt out unevenly, each process's mean loss is multiplied by how
many samples it has over how many it would have on average.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends.placement import map_tensors
from crosstrain.engine.spread import is_spread, parameters_of, spread_like

if TYPE_CHECKING:
    from crosstrain.engine.data.shares import BatchShare

_ZERO_GRAD = torch.optim.Optimizer.zero_grad


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


def named(
    models: Iterable[tuple[str, torch.nn.Module]],
    optimizers: Iterable[tuple[str, torch.optim.Optimizer]],
) -> dict[str, torch.Tensor]:
    """Names each parameter once: by its model, or, in none, by its place in an optimizer."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for label, model in models:
        for name, parameter in model.named_parameters():
            # A compiled model and the bare one name the same parameter alike.
            found[f"{label}.{name.replace('_orig_mod.', '')}"] = parameter
            seen.add(id(parameter))
    for label, optimizer in optimizers:
        for position, other in enumerate(parameters_of(optimizer)):
            if id(other) not in seen:
                found[f"{label}.{position}"] = other
    return found


def named_by_place(
    models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Names each parameter once, by the place of its model, or of its optimizer."""
    return named(_labelled("model", models), _labelled("optimizer", optimizers))


def _labelled(kind: str, things: Sequence[Any]) -> Iterable[tuple[str, Any]]:
    if len(things) == 1:
        return [(kind, things[0])]
    return [(f"{kind}_{index}", thing) for index, thing in enumerate(things)]


def capture(
    models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Returns copies of all gradients that there are, by name, on the CPU.

    A sparse gradient, of an embedding with `sparse=True`, is a mapping of plain values and
    tensors: the same entries in the same order, so that later sums have the same bits. Gradients
    whose parts lie in several processes are gathered: all of these call it together.
    """
    parameters = named_by_place(models, optimizers)
    found = capture_named(parameters)
    if not found and any(is_spread(p) and p.requires_grad for p in parameters.values()):
        raise ValueError(
            "The gradients of this accumulation window cannot be saved: with "
            "Sharding(no_sync=True) FSDP keeps them to itself until the window ends. Save at the "
            "end of a window, or leave no_sync out."
        )
    return found


def capture_named(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Does what `capture` does, for parameters that are named."""
    return {
        name: _plain(_whole(parameter.grad.detach()))
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }


def _whole(gradient: Any) -> Any:
    return gradient.full_tensor() if is_spread(gradient) else gradient


def _plain(gradient: Any) -> Any:
    if gradient.layout != torch.sparse_coo:
        return gradient.to("cpu", copy=True)
    return {
        "indices": gradient._indices().to("cpu", copy=True),
        "values": gradient._values().to("cpu", copy=True),
        "size": list(gradient.shape),
        "coalesced": gradient.is_coalesced(),
    }


def as_tensor(gradient: Any) -> Tensor:
    """Returns the tensor that a gradient of `capture` stands for, on the CPU."""
    if not isinstance(gradient, Mapping):
        tensor: Tensor = gradient
        return tensor
    return torch.sparse_coo_tensor(
        gradient["indices"],
        gradient["values"],
        gradient["size"],
        is_coalesced=gradient["coalesced"],
        check_invariants=True,
    )


def scaled(gradient: Any, ratio: float) -> Any:
    """Returns a gradient of `capture`, multiplied by a number; None if it is not finite then."""
    if isinstance(gradient, Mapping):
        values = scaled(gradient["values"], ratio)
        return None if values is None else {**gradient, "values": values}
    product = gradient * ratio
    return product if bool(product.isfinite().all()) else None


def restore(gradients: Mapping[str, Any], parameters: Mapping[str, torch.Tensor]) -> None:
    """Sets the gradients to what `capture` returned; a parameter that is not in it gets none."""
    saved = {name: as_tensor(gradient) for name, gradient in gradients.items()}
    for name, gradient in saved.items():
        if name not in parameters or parameters[name].shape != gradient.shape:
            there = "does not exist"
            if name in parameters:
                there = f"has shape {tuple(parameters[name].shape)}"
            raise ValueError(
                f"The state holds a gradient of '{name}' of shape {tuple(gradient.shape)}, and "
                f"that parameter {there} here. Load the state with models and optimizers like "
                "those that wrote it."
            )
    for name, parameter in parameters.items():
        parameter.grad = None
        if name in saved:
            parameter.grad = spread_like(saved[name].to(parameter.device, copy=True), parameter)


def rescale(optimizers: Sequence[torch.optim.Optimizer], ratio: float) -> None:
    """Multiplies each gradient that the optimizers would step with by a ratio."""
    with torch.no_grad():
        for optimizer in optimizers:
            for parameter in parameters_of(optimizer):
                if parameter.grad is not None:
                    parameter.grad.mul_(ratio)


# ---------------------------------------------------------------- several processes


@contextmanager
def weighted(
    loss: Tensor, share: BatchShare | None, models: Iterable[torch.nn.Module], y_pred: Any
) -> Generator[Tensor, None, None]:
    """Gives the loss to run the backward pass of, in the block: weighted by this process's share.

    Without a sample of its own, a process runs it for the others, and adds nothing.
    """
    weight = 1.0 if share is None else share.weight
    if weight == 1.0:
        yield loss
        return
    if weight:
        yield loss * weight
        return
    # A placeholder. 0 times what is not finite would not be 0, so each gradient is replaced before
    # it is shared; and that of the output, for parameters which a model puts others in place of.
    trained: list[Any] = [p for model in models for p in model.parameters() if p.requires_grad]
    handles: list[Any] = [parameter.register_hook(torch.zeros_like) for parameter in trained]

    def silence(tensor: Any) -> Any:
        if getattr(tensor, "requires_grad", False):
            handles.append(tensor.register_hook(torch.zeros_like))
        return tensor

    map_tensors(y_pred, silence)
    try:
        yield loss * 0.0
    finally:
        for handle in handles:
            handle.remove()


def average(models: Iterable[Any], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Averages over all processes the gradients that were kept from being shared so far.

    A window that a run's end has cut short has had no backward pass that shares them.
    """
    shared = {
        id(parameter)
        for model in models
        if isinstance(model, DistributedDataParallel)
        for parameter in model.parameters()
    }
    parameters: list[Any] = [p for o in optimizers for p in parameters_of(o) if id(p) in shared]
    if not parameters:
        return
    size = torch.distributed.get_world_size()
    used: Any = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    used = used.to(parameters[0].device)
    # A parameter that took no part in one process may have done so in another.
    torch.distributed.all_reduce(used)
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= size


def in_windows(models: Iterable[Any]) -> list[bool]:
    """Tells of each model that shares its buffers whether its next forward pass leaves them be.

    DistributedDataParallel sends rank 0's buffers to all, but for passes after one without sharing.
    """
    return [not one.require_forward_param_sync for one in _sharing_buffers(models)]


def put_in_windows(models: Iterable[Any], windows: Sequence[bool]) -> None:
    """Does to models what `in_windows` has told of others."""
    for one, within in zip(_sharing_buffers(models), windows, strict=False):
        one.require_forward_param_sync = not within


def _sharing_buffers(models: Iterable[Any]) -> list[Any]:
    return [
        one
        for one in models
        if isinstance(one, DistributedDataParallel)
        and one.broadcast_buffers
        and any(True for _ in one.module.buffers())
    ]


def combined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a training step's state for any number of processes, from those of all of a world.

    Within a window each process has gradients of its own, which are averaged when it is stepped.
    The mean of them stands for each, so that the step is the same with another number of processes.
    """
    places = [{k: v for k, v in state.items() if k != "gradients"} for state in states]
    for rank, place in enumerate(places):
        if place != places[0]:
            raise ValueError(
                f"The states of a training step are not of one iteration: rank 0 has {places[0]}, "
                f"rank {rank} has {place}. Save them at the same event in all processes."
            )
    names = sorted({name for state in states for name in state["gradients"]})
    return {**places[0], "gradients": {name: _mean(name, states) for name in names}}


def _mean(name: str, states: Sequence[Mapping[str, Any]]) -> Any:
    found = [as_tensor(state["gradients"][name]) for state in states if name in state["gradients"]]
    total = found[0].clone()
    for gradient in found[1:]:
        total += gradient
    # One that is missing counts as zero, as it does where they are shared.
    return _plain(total if len(states) == 1 else total / len(states))
