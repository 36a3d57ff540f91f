"""Copies of a state on the host, taken while training waits for as little as possible.

The idea, to copy first and to write while training goes on, is that of CheckFreq (Mohan et al.,
FAST 2021); with `overlap`, its second half too: the copy runs under the next forward and backward
pass, and only the optimizer's next step waits for it.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from crosstrain.backends.graphs import repeatable
from crosstrain.engine.storage.errors import CheckpointError

from .plain import to_plain

# Device, address, length and type of a storage: two that begin at one address may end elsewhere,
# and torch.save refuses one that is looked at as of two types.
Storage = tuple[str, int, int, torch.dtype]

_ARENA = 64 << 20
_ALIGN = 64


class HostState(NamedTuple):
    """A state of plain types and tensors on the CPU, and their bytes, each storage counted once."""

    state: Any
    nbytes: int


def on_host(state: Any) -> HostState:
    """Returns a state with plain types and tensors on the CPU; tensors there are not copied.

    Tensors that share memory as of two types are copied, and share it no more.
    """
    # The second entry keeps the address its own until the state is whole.
    seen: dict[int, tuple[torch.dtype, torch.UntypedStorage]] = {}
    nbytes = 0

    def place(tensor: torch.Tensor, _: bool) -> torch.Tensor:
        nonlocal nbytes
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        elif _is_slice(tensor):
            # torch.save writes a whole storage: a slice must not drag along what it is cut of.
            tensor = _compact(tensor)
        storage = tensor.untyped_storage()
        dtype, known = seen.get(storage.data_ptr(), (tensor.dtype, None))
        if dtype != tensor.dtype:
            tensor = _compact(tensor)
            storage, known = tensor.untyped_storage(), None
        if known is None or known.nbytes() != storage.nbytes():
            nbytes += storage.nbytes()
            seen[storage.data_ptr()] = (tensor.dtype, storage)
        return tensor

    plain = to_plain(state, place)
    return HostState(plain, nbytes)


def _is_slice(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > 2 * tensor.numel() * tensor.element_size() + 1024


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    return torch.clone(tensor, memory_format=torch.contiguous_format)


class HostBuffers:
    """Memory for copies, kept from one checkpoint to the next.

    Fresh memory costs a page fault for each 4 KiB, several times the copy itself; so it is taken in
    large pieces, in huge pages where the system gives them, and used again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self._free: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self._used: dict[tuple[int, bool], list[torch.UntypedStorage]] = {}
        self._arena: tuple[mmap.mmap, int] | None = None

    def begin(self) -> None:
        """Begins a copy: what the last one used is free again, what it did not is given back."""
        self._kept, self._used = self._used or self._kept, {}
        self._free = {key: list(storages) for key, storages in self._kept.items()}

    def take(self, nbytes: int, pinned: bool) -> torch.UntypedStorage:
        """Returns memory for a storage; pinned, where an accelerator copies into it by itself."""
        key = (nbytes, pinned)
        free = self._free.get(key)
        storage = free.pop() if free else self._allocate(nbytes, pinned)
        self._used.setdefault(key, []).append(storage)
        return storage

    def _allocate(self, nbytes: int, pinned: bool) -> torch.UntypedStorage:
        if pinned or nbytes == 0:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).untyped_storage()
        if self._arena is None or len(self._arena[0]) - self._arena[1] < nbytes:
            memory = mmap.mmap(-1, max(_ARENA, nbytes))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._arena = (memory, 0)
        memory, at = self._arena
        self._arena = (memory, at + -(-nbytes // _ALIGN) * _ALIGN)
        view = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=at)
        return view.untyped_storage()


class Snapshot:
    """A copy of a state that nothing changes any more, or that is on its way to be one.

    Args:
        state: what `to_plain` takes.
        buffers: where the copies go.
        stepped: optimizers whose parameters and states are to be copied later, by `finish` in
            another thread; their next step waits for it. Empty: all is copied, or, on an
            accelerator, ordered before whatever it computes next, when this returns.
    """

    def __init__(
        self, state: Any, buffers: HostBuffers, stepped: Iterable[torch.optim.Optimizer] = ()
    ) -> None:
        optimizers = list(stepped)
        self._buffers = buffers
        self._late = _storages_of(optimizers)
        # A copy is found by its storage's address, which stays that storage's own as long as the
        # second entry lives: what state_dict() makes anew is freed at once otherwise, and the next
        # tensor gets the same address.
        self._copies: dict[Storage, tuple[torch.UntypedStorage, torch.Tensor]] = {}
        self._todo: list[_Copy] = []
        self._remote: list[_Copy] = []
        self._held_back: list[_SideCopies] = []
        self._copied = threading.Event()
        self._stepping = False
        self._changed: _Copy | None = None
        buffers.begin()
        #: The bytes of all tensors of the state, each storage counted once.
        self.nbytes = 0
        self.state = to_plain(state, self._stage)
        self._copies.clear()
        self._start_remote()
        wait = repeatable(lambda *_: self._wait())
        self._hooks = [optimizer.register_step_pre_hook(wait) for optimizer in optimizers]
        if not self._todo:
            self._copied.set()

    def finish(self) -> None:
        """Copies what is left; afterwards the state is complete. Called once, by the writer.

        Raises:
            CheckpointError: if a tensor was changed meanwhile by something else than an optimizer.
        """
        try:
            for copy in self._todo:
                copy.target.copy_(copy.source)
            changed = _first_changed(self._todo)
            if changed is not None:
                raise _changed(changed)
        finally:
            self._todo.clear()
            self._copied.set()
        for side in self._held_back:
            side.wait()
        changed = _first_changed(self._remote)
        # Once a step has begun, on the host, a new version is what it should be.
        if changed is not None and not self._stepping:
            raise _changed(changed)
        if self._changed is not None:
            raise _changed(self._changed)
        self._remote.clear()

    def close(self) -> None:
        """Takes the hooks off the optimizers; to be called in the thread that trains."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _wait(self) -> None:
        """Runs before an optimizer's step: it may change what is being copied only afterwards."""
        self._copied.wait()
        if self._stepping:
            # The step before waited already; a graph cannot record a wait for what is not in it.
            return
        self._changed = _first_changed(self._remote)
        self._stepping = True
        for side in self._held_back:
            side.hold_back()

    def _start_remote(self) -> None:
        """Starts the copies from accelerators: what may change soon first, held back at once."""
        for late in (False, True):
            for device in {copy.source.device for copy in self._remote}:
                copies = [c for c in self._remote if c.late is late and c.source.device == device]
                if not copies:
                    continue
                side = _SideCopies(device, copies)
                self._held_back.append(side)
                if not late:
                    side.hold_back()

    def _stage(self, tensor: torch.Tensor, own: bool) -> torch.Tensor:
        """Returns the tensor's copy, whose contents may come later."""
        device = tensor.device
        on_accelerator = _is_accelerator(device)
        if device.type != "cpu" and not on_accelerator:
            tensor, own = tensor.cpu(), True
        if _is_slice(tensor):
            tensor, own = _compact(tensor), not on_accelerator
        if own:
            self.nbytes += tensor.untyped_storage().nbytes()
            return tensor
        key = _storage_of(tensor)
        known = self._copies.get(key)
        if known is None:
            known = self._copies[key] = (self._copy(tensor, key, on_accelerator), tensor)
        return view_like(tensor, known[0])

    def _copy(
        self, tensor: torch.Tensor, key: Storage, on_accelerator: bool
    ) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        copy = self._buffers.take(storage.nbytes(), on_accelerator)
        self.nbytes += storage.nbytes()
        late = key in self._late
        if on_accelerator or late:
            # `tensor` shares the version counter of what the optimizer changes.
            todo = self._remote if on_accelerator else self._todo
            todo.append(_Copy(view_like(tensor, copy), tensor, tensor._version, late))
        else:
            target = torch.empty(0, dtype=torch.uint8).set_(copy)
            target.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        return copy


class _Copy(NamedTuple):
    """A copy that is to be made: where to, from what, its version, and whether it may come late."""

    target: torch.Tensor
    source: torch.Tensor
    version: int
    late: bool


def _first_changed(copies: list[_Copy]) -> _Copy | None:
    return next((c for c in list(copies) if c.late and c.source._version != c.version), None)


def _changed(copy: _Copy) -> CheckpointError:
    return CheckpointError(
        f"A tensor of shape {tuple(copy.source.shape)} was changed outside of optimizer.step() "
        "while it was being copied for a checkpoint, which was not saved. Use "
        "DiskSaver(background=True) without overlap=True"
    )


def view_like(tensor: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Views a copy of a tensor's storage as the tensor."""
    view = torch.empty(0, dtype=tensor.dtype)
    view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        view = view.conj()
    return view._neg_view() if tensor.is_neg() else view


def _is_accelerator(device: torch.device) -> bool:
    current = torch.accelerator.current_accelerator()
    return current is not None and current.type == device.type


def _storage_of(tensor: torch.Tensor) -> Storage:
    """Returns what tells a tensor's storage from all others that live."""
    storage = tensor.untyped_storage()
    return str(tensor.device), storage.data_ptr(), storage.nbytes(), tensor.dtype


def _storages_of(optimizers: Iterable[torch.optim.Optimizer]) -> frozenset[Storage]:
    """Returns the storages that only these optimizers' steps change.

    A tensor that shares its storage with others is left out: it is copied at once.
    """
    found: set[Storage] = set()
    for optimizer in optimizers:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        for values in optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
        for tensor in tensors:
            if tensor.device.type != "cpu" and not _is_accelerator(tensor.device):
                continue  # It may have no storage to point to, and is copied at once.
            storage = tensor.untyped_storage()
            if storage.nbytes() == tensor.numel() * tensor.element_size():
                found.add(_storage_of(tensor))
    return frozenset(found)


class _SideCopies:
    """Copies from an accelerator to pinned memory, beside what it computes."""

    def __init__(self, device: torch.device, copies: list[_Copy]) -> None:
        self._device = device
        stream = torch.Stream(device=device)
        # What was computed so far must be there before it is copied.
        stream.wait_stream(torch.accelerator.current_stream(device))
        with stream:
            for copy in copies:
                copy.target.copy_(copy.source, non_blocking=True)
        self._done = stream.record_event()

    def hold_back(self) -> None:
        """Lets what the accelerator computes from now on begin after the copies."""
        torch.accelerator.current_stream(self._device).wait_event(self._done)

    def wait(self) -> None:
        """Waits, on the host, until the copies are there."""
        self._done.synchronize()
