"""FSDP2: models whose parameters, gradients and optimizer states are spread over the processes.

torch's `fully_shard` does the work, as of "PyTorch FSDP: Experiences on Scaling Fully Sharded Data
Parallel" (Zhao et al., VLDB 2023) and its second version, where a parameter is a DTensor. Here it
is decided what is sharded together, and optimizers follow their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import distributed

from .errors import BackendError
from .preparation import follow
from .process_group import join_alone
from .protocol import World

_OPTION: Final = "fsdp"
_NORMS: Final = (torch.nn.modules.batchnorm._BatchNorm,)  # pyright: ignore[reportPrivateUsage]
# What holds blocks, and has no computation of its own around them.
_CONTAINERS: Final = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


@dataclass(frozen=True)
class Sharding:
    """How the options `fsdp` and `fsdp-...` of a backend shard.

    Args:
        blocks: called with a model; returns the modules that are sharded each for itself: their
            parameters are gathered just before their `forward` runs. None: the items of the model's
            outermost `Sequential`, `ModuleList` and `ModuleDict` containers. What is in no block is
            gathered with the whole model. A model in which the script has called `fully_shard`
            keeps those as its blocks.
        reshard_after_forward: frees a block's gathered parameters after its forward pass and
            gathers them again for the backward pass: less memory, more communication.
        no_sync: keeps the whole gradients of an accumulation window in each process until its last
            iteration, as `no_sync` of DistributedDataParallel does: less communication, memory for
            all gradients, and no checkpoint inside a window. False: they are reduced, and kept in
            parts, at each iteration.
    """

    blocks: Callable[[torch.nn.Module], Iterable[torch.nn.Module]] | None = None
    reshard_after_forward: bool = True
    no_sync: bool = False


def is_sharded(option: str) -> bool:
    """Tells whether an option shards: `fsdp`, or one that begins with `fsdp-`."""
    return option.split("-", 1)[0] == _OPTION


def arithmetic_of(option: str, options: Sequence[str]) -> str:
    """Returns the option with the same arithmetic that does not shard."""
    if not is_sharded(option):
        return option
    return option.partition("-")[2] or options[0]


def open_mesh(world: World, device: torch.device, transport: str, stack: ExitStack) -> Any:
    """Returns the mesh of all processes; of this one alone where there are no others.

    What is pushed to the stack leaves a group that had to be made for one process.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if world.size == 1:
        join_alone(transport, stack)
    return init_device_mesh(device.type, (world.size,))


def shard(
    models: Sequence[torch.nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    mesh: Any,
    dtype: torch.dtype | None,
    sharding: Sharding,
) -> None:
    """Shards models in place; all processes take rank 0's parameters and buffers.

    Optimizers get the new parameters with what state they have. Where there is a dtype, parameters
    are cast to it for forward and backward passes; gradients are reduced in fp32 and the model's
    outputs are fp32.
    """
    from torch.distributed.fsdp import FSDPModule

    moved: dict[int, torch.nn.Parameter] = {}
    for model in models:
        if isinstance(model, FSDPModule):
            continue
        _check_alike(model)
        before = dict(model.named_parameters(remove_duplicate=False))
        _shard_one(model, mesh, dtype, sharding)
        for name, old in before.items():
            moved[id(old)] = model.get_parameter(name)
    for optimizer in optimizers:
        follow(optimizer, moved)
        _spread_states(optimizer)


def _shard_one(
    model: torch.nn.Module, mesh: Any, dtype: torch.dtype | None, sharding: Sharding
) -> None:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    own = any(isinstance(module, FSDPModule) for module in model.modules())
    if not own:
        # What the script has sharded itself it has made alike itself.
        _copy_from_first(model)
    full = None if dtype is None else torch.float32

    def apply(module: torch.nn.Module, dtype: torch.dtype | None, out: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=full, output_dtype=out)
        reshard = None if module is model else sharding.reshard_after_forward
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)

    if not own:
        blocks = list(_separate(model, (sharding.blocks or _blocks_of)(model)))
        norms = [module for module in model.modules() if isinstance(module, _NORMS)]
        # Their statistics stay fp32, and many kernels want the weights to be alike.
        apart = list(_separate(model, norms)) if full is not None else []
        for norm in apart:
            apply(norm, full, dtype)
        for block in blocks:
            if block not in apart:
                apply(block, dtype, None)
    apply(model, dtype, full)


def _blocks_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yields the items of the outermost containers, from the inputs to the outputs."""
    for child in model.children():
        if isinstance(model, _CONTAINERS) and not isinstance(child, _CONTAINERS):
            yield child
        else:
            yield from _blocks_of(child)


def _separate(
    model: torch.nn.Module, blocks: Iterable[torch.nn.Module]
) -> Iterator[torch.nn.Module]:
    """Yields the blocks that have parameters and share none with the rest of the model."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    for block in list(blocks):
        inside = {id(module) for module in block.modules()}
        parameters = list(block.parameters())
        if block is not model and parameters and all(owners[id(p)] <= inside for p in parameters):
            yield block


def check_filled(models: Iterable[torch.nn.Module]) -> None:
    """Refuses models that have no data: a parameter or buffer on the device `meta`."""
    for model in models:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise BackendError(
                    f"'{name}' of the {type(model).__name__} is on the device 'meta' and has no "
                    "data. Build the model with data in each process (without "
                    "torch.device('meta')), or shard and fill it yourself before prepare(): "
                    "fully_shard(), to_empty(), and its initialisation."
                )


def _check_alike(model: torch.nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    mine = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    theirs: list[Any] = [None] * distributed.get_world_size()
    gather: Any = distributed.all_gather_object
    gather(theirs, mine)
    differing = [rank for rank, one in enumerate(theirs) if one != theirs[0]]
    if differing:
        raise BackendError(
            f"The {type(model).__name__} of rank {differing[0]} has other parameters or buffers "
            "than that of rank 0: names, shapes or dtypes differ. Build the same model in every "
            "process."
        )


def _copy_from_first(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            whole = tensor.detach().contiguous()
            distributed.broadcast(whole, 0)
            tensor.copy_(whole)


def _spread_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives each parameter of a state that was there before the part of it that it now is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for parameter, values in optimizer.state.items():
        if not isinstance(parameter, DTensor):
            continue
        for key, value in values.items():
            whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
            if whole and value.shape == parameter.shape:
                values[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements)


@contextmanager
def unreduced(model: Any) -> Generator[None]:
    """Keeps gradients whole, in each process, in the backward passes inside."""
    from torch.distributed.fsdp import FSDPModule

    models: list[Any] = [model] if isinstance(model, torch.nn.Module) else list(model)
    sharded = [one for one in models if isinstance(one, FSDPModule)]
    for one in sharded:
        one.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for one in sharded:
            one.set_requires_gradient_sync(True)
