"""Which process of how many this is, for what has to know it without a backend."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends import World


def joined() -> World | None:
    """Returns this process's place in the process group; None where it has joined none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    rank = torch.distributed.get_rank()
    return World(rank, rank, torch.distributed.get_world_size())


def this_rank() -> int:
    """Returns the rank of this process: the process group's, or torchrun's before there is one."""
    return (joined() or World.from_environment()).rank


def world_size() -> int:
    """Returns the number of processes: the process group's, or torchrun's before there is one."""
    return (joined() or World.from_environment()).size


def unshared(value: Any) -> Any:
    """Returns the model whose gradients a `DistributedDataParallel` shares; others as they are."""
    if not isinstance(value, DistributedDataParallel):
        return value
    return value.module
