"""What torch_xla does wrong without a word: worlds of one process, draws nobody can repeat."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed

from .errors import BackendError
from .protocol import World

_WHY = (
    "torch.randperm on an XLA device draws from a state of the process that can be neither read "
    "nor set, so it cannot be repeated"
)


def refuse_processes(world: World) -> None:
    """Refuses a world of several processes on XLA's CPU device.

    There torch_xla gives each process a world of its own, of size 1, and its collective operations
    do nothing, silently.
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


@contextmanager
def refuse_randperm(warn_only: bool) -> Generator[None, None, None]:
    """Makes `torch.randperm` on an XLA device an error, inside."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # torch warns that the operation has a kernel already: that is the point.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl("randperm", _warn if warn_only else _refuse, "XLA")
    try:
        yield
    finally:
        # Brings back the kernel that was there before.
        library._destroy()


def _refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise BackendError(
        f"{_WHY}. In deterministic mode draw it on the CPU: torch.randperm(n).to(device)."
    )


def _warn(size: int, *, device: torch.device, **options: Any) -> torch.Tensor:
    warnings.warn(f"{_WHY}: it is drawn on the CPU.", stacklevel=2)
    options.pop("pin_memory", None)
    return torch.randperm(size, **options).to(device)
