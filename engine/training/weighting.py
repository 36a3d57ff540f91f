"""Weighting: losses of unequal parts of a global batch, so that gradients are those of the whole.

Processes average their gradients, each with the same weight. Where a batch was dealt out unevenly,
each process's mean loss is multiplied by how many samples it has over how many it would have on
average.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends.placement import map_tensors

from .gradients import parameters_of

if TYPE_CHECKING:
    from crosstrain.engine.data.shares import BatchShare

__all__ = ["average", "combined", "weighted"]


@contextmanager
def weighted(
    loss: Tensor, share: BatchShare | None, models: Iterable[torch.nn.Module], y_pred: Any
) -> Generator[Tensor, None, None]:
    """Gives the loss to run the backward pass of, in the block.

    Args:
        loss: the mean loss of this process's samples.
        share: what this process has of the batch; None where nothing was dealt out.
        models: the models that are trained.
        y_pred: what they gave.
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

    Args:
        models: the models; only those in a `DistributedDataParallel` keep gradients to themselves.
        optimizers: their optimizers.
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
    group: Any = torch.distributed
    size = group.get_world_size()
    used: Any = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    used = used.to(parameters[0].device)
    # A parameter that took no part in one process may have done so in another.
    group.all_reduce(used)
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        group.all_reduce(parameter.grad)
        parameter.grad /= size


def combined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a training step's state for any number of processes, from those of all of a world.

    Within a window each process has gradients of its own, which are averaged when it is stepped.
    The mean of them stands for each, so that the step is the same with another number of processes.

    Args:
        states: what `TrainingStep.state_dict` returned in each process, by rank.

    Raises:
        ValueError: if there is none, or the processes were not at the same place of a window.
    """
    if not states:
        raise ValueError("combined() takes the states of at least one process, got none.")
    places = [{k: v for k, v in state.items() if k != "gradients"} for state in states]
    for rank, place in enumerate(places):
        if place != places[0]:
            raise ValueError(
                f"The states of a training step are not of one iteration: rank 0 has {places[0]}, "
                f"rank {rank} has {place}. Save them at the same event in all processes."
            )
    names = sorted({name for state in states for name in state["gradients"]})
    return {**places[0], "gradients": {name: _mean(name, states) for name in names}}


def _mean(name: str, states: Sequence[Mapping[str, Any]]) -> Tensor:
    found: list[Tensor] = [
        state["gradients"][name] for state in states if name in state["gradients"]
    ]
    total = found[0].clone()
    for gradient in found[1:]:
        total += gradient
    # One that is missing counts as zero, as it does where they are shared.
    return total if len(states) == 1 else total / len(states)
