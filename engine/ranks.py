"""Which process of how many this is, for what has to know it without a backend."""

from __future__ import annotations

import torch.distributed

from crosstrain.backends import World

__all__ = ["this_rank", "world_size"]


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
