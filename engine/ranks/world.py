"""Which process of how many this is, for what has to know it without a backend."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends import World


def this_rank() -> int:
    """Returns the rank of this process: the process group's, or torchrun's before there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return World.from_environment().rank


def world_size() -> int:
    """Returns the number of processes: the process group's, or torchrun's before there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return World.from_environment().size


def unshared(value: Any) -> Any:
    """Returns the model whose gradients a `DistributedDataParallel` shares; others as they are."""
    if not isinstance(value, DistributedDataParallel):
        return value
    wrapper: Any = value
    return wrapper.module
