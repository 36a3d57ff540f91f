"""Which process of how many this is, for what has to know it without a backend."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends import World

__all__ = ["RankFailed", "this_rank", "unshared", "world_size"]


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


class RankFailed(RuntimeError):
    """Another rank has ended the run, is missing, or does not do what this one does.

    Args:
        message: what happened, where, and what to do.
        rank: the rank that it happened on, or that is missing; None if it is not one alone.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
