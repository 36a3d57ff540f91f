"""Several processes on TPUs: joins torch_xla's process group, and refuses what would do nothing."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

from torch import distributed

from .errors import BackendError
from .protocol import World

__all__ = ["join_on_tpu", "refuse_processes"]


def refuse_processes(world: World) -> None:
    """Refuses a world of several processes on XLA's CPU device.

    There torch_xla gives each process a world of its own, of size 1, and its collective operations
    do nothing, silently.

    Raises:
        BackendError: if there are several.
    """
    if world.size > 1:
        raise BackendError(
            f"WORLD_SIZE={world.size}: XLA on the CPU does not train in several processes. "
            "torch_xla's collective operations do nothing between them, silently: each would train "
            "alone. Run one process; with the backend 'xla-spmd' it drives several devices. Or use "
            "the backend 'cpu', whose processes share their gradients."
        )


def join_on_tpu(world: World, stack: ExitStack) -> None:
    """Joins the process group of torchrun's processes, one TPU device each. No TPU has run this.

    It comes before the device is started, because it tells the TPU's runtime which process of the
    host this is.

    Args:
        world: what torchrun says; of one process: nothing is done.
        stack: what is pushed to it leaves the group.

    Raises:
        BackendError: if torch_xla has come to another world than torchrun, or the script has joined
            a group of another kind.
    """
    if world.size == 1:
        return
    # Registers torch's transport `xla` and the address `xla://`.
    importlib.import_module("torch_xla.distributed.xla_backend")
    runtime: Any = importlib.import_module("torch_xla.runtime")
    if not distributed.is_initialized():
        distributed.init_process_group("xla", init_method="xla://")
        stack.callback(_leave)
    elif distributed.get_backend() != "xla":
        raise BackendError(
            f"The process group that the script has joined works over '{distributed.get_backend()}'"
            ", and this backend needs 'xla'. Let the backend join it."
        )
    found = (int(runtime.global_ordinal()), int(runtime.world_size()))
    if found != (world.rank, world.size):
        raise BackendError(
            f"torch_xla says that this is process {found[0]} of {found[1]}, and torchrun says "
            f"{world.rank} of {world.size}. Start one process for each TPU device with torchrun's "
            "--nproc-per-node, or one process in all, with the backend 'xla-spmd'."
        )


def _leave() -> None:
    # The script may have left it already.
    if distributed.is_initialized():
        distributed.destroy_process_group()
