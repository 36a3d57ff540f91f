"""Sums over a run's logical shards in one fixed order, the same bits on any number of processes.

Floating-point addition depends on its order. Here S shards are the leaves of a binary tree, and
each addition of the tree is made once, whoever makes it. A process that has the S/W leaves of a
subtree adds them up while it computes them (`PartialSums`). Processes then send each other slices
of these sums, each adds its slice of all of them in the order of the tree, and the slices are
gathered (`Exchange`): the traffic of a ring all-reduce (Patarasuk and Yuan, 2009), with an order
that does not depend on W. The idea of virtual workers is that of EasyScale (Li et al., SC 2023).

What a shard has no value of is left out of its leaf: nothing is added. Between processes such a
hole travels as -0.0, to which adding any number gives that number, to the bit; +0.0 would turn
-0.0 into +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

__all__ = ["Exchange", "Leaf", "PartialSums", "foreach", "gather_into"]

#: The values of one shard, or the sum of several: one for each slot, None where there is none.
Leaf = list[Tensor | None]

# torch's operations on lists of tensors, which its own optimizers use: one kernel for many.
foreach: Any = torch

# How many bytes are sent at once: while one bucket is added up, the next is on its way.
_BUCKET: Final = 25 * 2**20
# Slots begin at multiples of this many elements, so that kernels find them aligned, like tensors.
_ALIGNMENT: Final = 64


class PartialSums:
    """Adds up leaves in the order of a binary tree, as they come.

    A binary counter: of n leaves it holds at most 1 + log2(n) partial sums at a time.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, Leaf]] = []

    def add(self, leaf: Leaf, level: int = 0) -> None:
        """Takes the next leaf; its tensors are this object's from now on.

        Args:
            leaf: the values.
            level: 0 for one shard; 1 for the sum of two that belong together, and so on.
        """
        held = self._held
        while held and held[-1][0] == level:
            leaf = _added(held.pop()[1], leaf)
            level += 1
        held.append((level, leaf))

    def total(self) -> Leaf:
        """Returns the sum of all leaves.

        Raises:
            RuntimeError: if their number is no power of two.
        """
        if len(self._held) != 1:
            raise RuntimeError(
                f"The leaves of {len(self._held)} subtrees are not added up: their number has to "
                "be a power of two."
            )
        return self._held.pop()[1]


def _added(left: Leaf, right: Leaf) -> Leaf:
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        foreach._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


class _Bucket:
    """Slots of one type that travel together, one after the other in a buffer of W slices."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.slots: list[tuple[int, int, Tensor]] = []
        self.size = 0
        self.flat: Tensor
        self.views: dict[int, Tensor] = {}

    def take(self, slot: int, like: Tensor) -> None:
        self.slots.append((slot, self.size, like))
        self.size += -(-max(1, like.numel()) // _ALIGNMENT) * _ALIGNMENT

    def allocate(self, processes: int) -> None:
        whole = processes * _ALIGNMENT
        self.size = -(-self.size // whole) * whole
        self.flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for slot, first, like in self.slots:
            part = self.flat[first : first + like.numel()]
            self.views[slot] = _shaped(part, like)


class Exchange:
    """Adds up what W processes have, in the order of the tree; every process gets the sum.

    Args:
        like: for each slot, a tensor of its type and shape, the same in all processes. Results
            have its strides, where it has no holes, so that whatever is computed from them is the
            same as where nothing was exchanged.
        processes: how many there are, a power of two.
    """

    def __init__(self, like: Sequence[Tensor], processes: int) -> None:
        self._processes = processes
        self._buckets = _buckets(like, processes)
        self._complex = [one.is_complex() for one in like]
        sizes = [bucket.size for bucket in self._buckets]
        # Two, so that one can be filled while the other is added up.
        self._received = [_Received(), _Received()] if sizes else []
        self._slots = len(like)

    def sum(self, leaf: Leaf) -> list[Tensor]:
        """Returns the sum of all processes' values, in tensors that the next call overwrites.

        A collective operation. A slot that no process has a value of comes out as -0.0.
        """
        group: Any = torch.distributed
        for bucket in self._buckets:
            _fill(bucket, leaf)
        asked: list[tuple[_Bucket, Tensor, Any]] = []
        gathering: list[Any] = []
        for number, bucket in enumerate(self._buckets):
            received = self._received[number % 2].like(bucket.flat)
            # As bytes: what is not added up on the way can be of any type.
            work = group.all_to_all_single(_bytes(received), _bytes(bucket.flat), async_op=True)
            asked.append((bucket, received, work))
            if len(asked) == 2:
                gathering.append(self._add_up(*asked.pop(0)))
        gathering += [self._add_up(*one) for one in asked]
        for work in gathering:
            work.wait()
        views = {slot: view for bucket in self._buckets for slot, view in bucket.views.items()}
        return [
            torch.view_as_complex(views[slot]) if self._complex[slot] else views[slot]
            for slot in range(self._slots)
        ]

    def _add_up(self, bucket: _Bucket, received: Tensor, work: Any) -> Any:
        """Adds up this process's slice of a bucket, and starts to gather those of all."""
        work.wait()
        parts = received.view(self._processes, -1)
        step = 1
        while step < self._processes:
            parts[:: 2 * step] += parts[step :: 2 * step]
            step *= 2
        # A copy: the buffer is filled again while this is still on its way.
        own = parts[0].clone()
        return gather_into(_bytes(bucket.flat), _bytes(own), async_op=True)


class _Received:
    """A buffer for what comes from the others, as large as the largest bucket so far."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, flat: Tensor) -> Tensor:
        kind = flat.dtype, flat.device
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.numel() < flat.numel():
            buffer = self._buffers[kind] = torch.empty_like(flat)
        return buffer[: flat.numel()]


def _buckets(like: Sequence[Tensor], processes: int) -> list[_Bucket]:
    done: list[_Bucket] = []
    open_ones: dict[tuple[torch.dtype, torch.device], _Bucket] = {}
    for slot, tensor in enumerate(like):
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        kind = real.dtype, real.device
        bucket = open_ones.get(kind)
        if bucket is None or bucket.size * real.element_size() >= _BUCKET:
            bucket = open_ones[kind] = _Bucket(*kind)
            done.append(bucket)
        bucket.take(slot, real)
    for bucket in done:
        bucket.allocate(processes)
    return done


def _fill(bucket: _Bucket, leaf: Leaf) -> None:
    views: list[Tensor] = []
    values: list[Tensor] = []
    for slot, _, _ in bucket.slots:
        value = leaf[slot]
        if value is None:
            bucket.views[slot].fill_(-0.0)
            continue
        views.append(bucket.views[slot])
        values.append(torch.view_as_real(value) if value.is_complex() else value)
    if views:
        foreach._foreach_copy_(views, values)


def gather_into(whole: Tensor, own: Tensor, async_op: bool = False) -> Any:
    """Fills a tensor with those of all processes, by the name that torch has for it."""
    group: Any = torch.distributed
    gather = getattr(group, "all_gather_single", None) or group.all_gather_into_tensor
    return gather(whole, own, async_op=async_op)


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """Returns a flat tensor in the shape of another, and with its strides if that has no holes."""
    if _is_dense(like):
        return part.as_strided(like.shape, like.stride())
    return part.view(like.shape)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size if size != 1 else 1
    return True
