"""The process group: joining and leaving torch's, and models that share their gradients in it."""

from __future__ import annotations

import atexit
import os
import time
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from typing import Any, Final

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from .errors import BackendError
from .protocol import World

_PAUSE: Final = 0.05  # seconds
_TESTED: Final = "2.9 and 2.13"
# torchrun sets these beside RANK, LOCAL_RANK and WORLD_SIZE.
_ADDRESS: Final = ("MASTER_ADDR", "MASTER_PORT")


def join(
    world: World, transport: str, stack: ExitStack, device: torch.device | None = None
) -> None:
    """Joins the process group of a world of several processes; waits for all of them.

    A group that the script has joined already is used, and left to the script to leave.

    Args:
        world: which process of how many this is.
        transport: torch's name of the group's backend, such as `gloo`.
        stack: what is pushed to it leaves the group.
        device: the device that the transport works on, where it works on one only.
    """
    if world.size == 1:
        return
    if distributed.is_initialized():
        _check_joined(world, transport)
        return
    missing = [name for name in _ADDRESS if name not in os.environ]
    if missing:
        raise BackendError(
            f"{', '.join(missing)} is not set, but WORLD_SIZE={world.size}. torchrun sets it; "
            "start with torchrun, or unset WORLD_SIZE to run in one process."
        )
    if not distributed.is_backend_available(transport):
        raise BackendError(
            f"This build of torch {torch.__version__} has no process groups over '{transport}', "
            f"and WORLD_SIZE={world.size}. Install one that has, or run one process."
        )
    limit = timedelta(seconds=timeout())
    try:
        with ExitStack() as half_joined:
            store = _store(world, limit)
            distributed.init_process_group(
                transport,
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=limit,
                device_id=device,
            )
            half_joined.callback(distributed.destroy_process_group)
            _meet(world, store)
            half_joined.pop_all()
    except (distributed.DistError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"Rank {world.rank} of {world.size} could not join the process group at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {error}. All processes "
            "have to start within the timeout and reach that address; start them with torchrun."
        ) from error
    _leave_later(stack)


def _store(world: World, limit: timedelta) -> Any:
    """Returns the store that torchrun's address leads to, for this group only.

    torchrun keeps one store over restarts. There a process may find the address that a killed one
    has left, or one of a group that was left since, try to connect to it, and wait until the
    timeout: so each start has keys of its own, and in it each group, counted by every process.
    Where there is no torchrun the store lives in the first process, and there as long as that:
    another one may be joining the next group before the first has left this one.
    """
    module: Any = distributed
    store, _, _ = next(module.rendezvous("env://", world.rank, world.size, timeout=limit))
    if world.rank == 0:
        atexit.register(_keep, store)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    started = module.PrefixStore(f"start_{start}", store)
    return module.PrefixStore(f"group_{started.add(f'groups_of_{world.rank}', 1)}", started)


def _keep(store: Any) -> None:
    """Called when the interpreter ends; until then a store that it was registered with lives."""


def _meet(world: World, store: Any) -> None:
    """Waits until all processes have joined; the first one, until they all know of it.

    torch returns from joining as soon as this process is connected to the others, which may not
    have taken note of it: one that leaves at once would break their joining (gloo: `Connection
    closed by peer`). Where there is no torchrun the store lives in the first process, which
    therefore goes last.
    """
    everyone = range(world.size)
    store.set(f"joined/{world.rank}", "")
    store.wait([f"joined/{rank}" for rank in everyone])
    store.set(f"met/{world.rank}", "")
    if world.rank == 0:
        store.wait([f"met/{rank}" for rank in everyone])


def group_store() -> Any:
    """Returns the store that the process group came together by, whoever has joined it."""
    group: Any = distributed.group.WORLD
    if group is None:
        raise ValueError(
            "This process has joined no process group. Open a backend under torchrun first, or "
            "call init_process_group()."
        )
    # The group keeps it, so this works for one that the script has joined, too.
    return group.get_group_store()


def join_alone(transport: str, stack: ExitStack) -> None:
    """Makes a process group of this process, for what needs one; uses one that is there."""
    if not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(transport, store=store, rank=0, world_size=1)
        _leave_later(stack)


def _leave_later(stack: ExitStack) -> None:
    # A factory's backend is often left open: then the group is left where the interpreter ends.
    atexit.register(_leave)
    stack.callback(atexit.unregister, _leave)
    stack.callback(_leave)


def timeout() -> float:
    """Returns the seconds after which a collective that a rank is missing from fails."""
    text = os.environ.get("CROSSTRAIN_TIMEOUT", "1800")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise BackendError(
            f"CROSSTRAIN_TIMEOUT={text!r} is no number of seconds above 0, after which a "
            "collective operation that a process is missing from fails; leave it unset for 1800."
        )
    return seconds


def _check_joined(world: World, transport: str) -> None:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if (rank, size) != (world.rank, world.size):
        raise BackendError(
            f"The process group that the script has joined has this process as rank {rank} of "
            f"{size}, but RANK and WORLD_SIZE say {world.rank} of {world.size}. Let the backend "
            "join it, or call init_process_group() without rank and size."
        )
    joined = str(distributed.get_backend())
    # A group of several transports, such as 'cpu:gloo,cuda:nccl', serves each of its devices.
    if transport not in joined and joined != "undefined":
        raise BackendError(
            f"The process group that the script has joined works over '{joined}', and this "
            f"backend needs '{transport}'. Let the backend join it."
        )


def _leave() -> None:
    # The script may have left it already.
    if distributed.is_initialized():
        distributed.destroy_process_group()
    # The group's threads drop what a backward pass gave them under the interpreter's lock. One that
    # still waits for it when the interpreter ends takes the process down with SIGABRT, which
    # happened to one of some dozens of processes: here it gets the lock.
    time.sleep(_PAUSE)


class _Layout(torch.nn.Module):
    """Stands in for a model while its gradients are laid out: uses each parameter, in order."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes = 0

    def forward(self, start: float) -> torch.Tensor:
        """Returns zero, made from all parameters."""
        self.passes += 1
        parts = [p.sum().real.float() * 0.0 for p in self.model.parameters() if p.requires_grad]
        return torch.stack(parts).sum() + start


def replicate(
    model: torch.nn.Module, device: torch.device, **settings: Any
) -> DistributedDataParallel:
    """Returns a model whose copies in all processes get the mean of their gradients.

    DistributedDataParallel groups gradients into buckets, and groups them anew after its first
    backward pass, by the order in which they came. What a sum of floats comes to depends on where
    in a bucket it is, so a run that is resumed would differ from one that never stopped in that
    pass. Here the buckets are laid out before the training, from the last parameter to the first,
    by two passes that change nothing; they are then the same in every process's life.
    """
    fixed = settings.get("find_unused_parameters", False) or _has_sparse_gradients(model)
    whole: Any = model if fixed else _Layout(model)
    try:
        wrapped = DistributedDataParallel(
            whole, device_ids=None if device.type == "cpu" else [device], **settings
        )
    except RuntimeError as error:
        raise BackendError(
            f"The processes cannot share the gradients of their {type(model).__name__}: {error}. "
            "Build the same model in every process."
        ) from error
    if not fixed:
        _lay_out(wrapped, model)
    return wrapped


def _lay_out(wrapped: DistributedDataParallel, model: torch.nn.Module) -> None:
    """Has the buckets laid out, and the model take the place of what stood in for it."""
    # Another in its place for the second pass: so it is seen that it is the one that is called.
    other = _Layout(model)
    rebuild: Any = getattr(getattr(wrapped, "reducer", None), "_rebuild_buckets", None)
    wrapped(0.0).backward()
    wrapped.module = other
    # This pass lays them out anew, and is the last that does: there is nothing left to rebuild.
    wrapped(0.0).backward()
    if other.passes != 1 or rebuild is None or rebuild():
        raise BackendError(
            "DistributedDataParallel of torch "
            f"{torch.__version__} does not lay out its buckets, or call its `module`, as that of "
            f"the versions that this was tested with does ({_TESTED}): a resumed run would differ "
            "from one that never stopped. Install one of these, or wrap the model yourself."
        )
    for parameter in model.parameters():
        parameter.grad = None
    wrapped.module = model


def lay_out_made(wrapped: DistributedDataParallel) -> bool:
    """Does for a model that the script has wrapped itself what `replicate` does for others.

    It does nothing where it need not: once it has had a backward pass, and for two processes, whose
    sums have the same bits in any order. All processes call it together.

    Returns:
        False where it cannot be done: what the two passes would call does more than add up.
    """
    model: Any = wrapped.module
    its: Any = wrapped
    fixed = its.find_unused_parameters and not its.static_graph
    if its._has_rebuilt_buckets or its.process_group.size() < 3 or fixed:
        return True
    if _has_sparse_gradients(model):
        return True
    shared = {id(parameter) for parameter in its._module_parameters}
    parameters = list(model.parameters())
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    if its.static_graph or its.mixed_precision or its._comm_hooks or hooked:
        return False
    before = [(p, p.grad, p.requires_grad) for p in parameters]
    shares_buffers = its.require_forward_param_sync
    try:
        for parameter in parameters:
            parameter.grad = None
            # Some may be frozen by now.
            parameter.requires_grad_(id(parameter) in shared)
        for _ in range(2):
            # The buffers stay each process's own.
            its.require_forward_param_sync = False
            its.module = _Layout(model)
            its.forward(0.0).backward()
    finally:
        its.module, its.require_forward_param_sync = model, shares_buffers
        for parameter, gradient, wanted in before:
            parameter.requires_grad_(wanted).grad = gradient
    return True


def _has_sparse_gradients(model: torch.nn.Module) -> bool:
    return any(getattr(module, "sparse", False) for module in model.modules())


def without_reduction(model: Any) -> AbstractContextManager[Any]:
    """Returns the context of a backward pass whose gradients stay in their process."""
    models: list[Any] = [model] if isinstance(model, torch.nn.Module) else list(model)
    stack = ExitStack()
    for one in models:
        if isinstance(one, DistributedDataParallel):
            stack.enter_context(one.no_sync())
    return stack
