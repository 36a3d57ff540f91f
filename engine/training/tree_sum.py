"""Sums over a run's logical shards in one fixed order, the same bits on any number of processes.

Floating-point addition depends on its order. Here S shards are the leaves of a binary tree, and
each addition of the tree is made once, whoever makes it. A process that has the S/W leaves of a
subtree adds them up while it computes them (`PartialSums`). Processes then send each other slices
of these sums, each adds its slice of all of them in the order of the tree, and the slices are
gathered (`Exchange`): the traffic of a ring all-reduce (Patarasuk and Yuan, 2009), with an order
that does not depend on W. Of two processes, or where there is little to send, each sends all to
all, which takes one round in place of two. The idea of virtual workers is that of EasyScale (Li et
al., SC 2023).

What a shard has no value of is left out of its leaf: nothing is added. Between processes such a
hole travels as -0.0, to which adding any number gives that number, to the bit; +0.0 would turn
-0.0 into +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

#: The values of one shard, or the sum of several: one for each slot, None where there is none.
Leaf = list[Tensor | None]

# torch's operations on lists of tensors, which its own optimizers use: one kernel for many.
foreach: Any = torch

# About how many bytes are sent at once: while one bucket is added up, the next is on its way. The
# first is small, as in DistributedDataParallel, so that sending begins early.
_BUCKET: Final = 10 * 2**20
_FIRST_BUCKET: Final = 2**20
# Up to how many bytes, of all processes together, one round costs less than two that send less.
_SMALL: Final = 2**18
# Slots begin at multiples of this many elements, so that kernels find them aligned, like tensors.
_ALIGNMENT: Final = 64


class PartialSums:
    """Adds up leaves in the order of a binary tree, as they come: by a binary counter."""

    def __init__(self) -> None:
        self._held: list[tuple[int, Leaf]] = []

    def add(self, leaf: Leaf, level: int = 0) -> None:
        """Takes the next leaf, or with level 1 the sum of two, and so on; its tensors, too."""
        held = self._held
        while held and held[-1][0] == level:
            leaf = _added(held.pop()[1], leaf)
            level += 1
        held.append((level, leaf))

    def with_last(self, slot: int, value: Tensor) -> Tensor:
        """Returns the sum in one slot, given the last leaf's value; it is not in the total then."""
        for _, leaf in reversed(self._held):
            held, leaf[slot] = leaf[slot], None
            if held is not None:
                value = held.add_(value)
        return value

    def total(self) -> Leaf:
        """Returns the sum of all leaves."""
        assert len(self._held) == 1, "the number of leaves is a power of two"
        return self._held.pop()[1]


def _added(left: Leaf, right: Leaf) -> Leaf:
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        foreach._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]


@dataclass(eq=False, slots=True)
class _Bucket:
    """A piece of a flat buffer that travels at once, with room for a slice of each process."""

    flat: Tensor
    #: Those of which some part lies in it.
    slots: list[int]
    #: Whether all is sent to all, in one round in place of two.
    at_once: bool
    #: How many of the slots have not been put in since the last sum.
    missing: int = 0


# From where to where a bucket goes, and the slots that lie in it.
_Cut = tuple[int, int, list[int]]


class _Flat:
    """Slots of one type, one after the other in a buffer, which is cut into buckets."""

    def __init__(self, dtype: torch.dtype, device: torch.device, processes: int) -> None:
        self.dtype, self.device = dtype, device
        self._whole = processes * _ALIGNMENT
        self.slots: list[tuple[int, int, Tensor]] = []
        self._size = self._start = 0
        self._open: list[int] = []
        self._least = _FIRST_BUCKET // dtype.itemsize

    def take(self, slot: int, like: Tensor) -> list[_Cut]:
        """Places a slot; returns the buckets that are complete then."""
        self.slots.append((slot, self._size, like))
        self._size += _up(max(1, like.numel()), _ALIGNMENT)
        self._open.append(len(self.slots) - 1)
        return self.close() if self._size - self._start >= self._least else []

    def close(self) -> list[_Cut]:
        """Completes the last bucket, or several, if it has become large by a large slot."""
        if not self._open:
            return []
        cuts: list[_Cut] = []
        self._size = _up(self._size, self._whole)
        most = max(1, _BUCKET // self.dtype.itemsize // self._whole) * self._whole
        for low in range(self._start, self._size, most):
            high = min(low + most, self._size)
            placed = [self.slots[at] for at in self._open]
            within = [
                slot
                for slot, first, like in placed
                if first < high and first + max(1, like.numel()) > low
            ]
            cuts.append((low, high, within))
        self._start, self._open = self._size, []
        self._least = _BUCKET // self.dtype.itemsize
        return cuts

    def allocate(self) -> Tensor:
        """Returns the buffer."""
        return torch.zeros(self._size, dtype=self.dtype, device=self.device)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class Exchange:
    """Adds up what W processes have, in the order of the tree; every process gets the sum.

    Values may be handed over one by one, while others are still being computed: what travels
    together is sent as soon as it is whole, in an order that is the same in all processes.

    Args:
        like: for each slot, a tensor of its type and shape, the same in all processes, in the
            order in which values come. Results have its strides, where it has no holes, so that
            whatever is computed from them is the same as where nothing was exchanged.
        processes: how many there are, a power of two.
    """

    def __init__(self, like: Sequence[Tensor], processes: int) -> None:
        self._processes = processes
        self._complex = [one.is_complex() for one in like]
        self._views: list[Tensor] = []
        self._buckets: list[_Bucket] = []
        self._of_slot: list[list[_Bucket]] = [[] for _ in like]
        self._lay_out([torch.view_as_real(one) if one.is_complex() else one for one in like])
        self._received: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._begin()

    def _lay_out(self, like: Sequence[Tensor]) -> None:
        flats: dict[tuple[torch.dtype, torch.device], _Flat] = {}
        order: list[tuple[_Flat, _Cut]] = []
        for slot, tensor in enumerate(like):
            kind = tensor.dtype, tensor.device
            flat = flats.setdefault(kind, _Flat(*kind, self._processes))
            order += [(flat, cut) for cut in flat.take(slot, tensor)]
        for flat in flats.values():
            order += [(flat, cut) for cut in flat.close()]
        views: dict[int, Tensor] = {}
        buffers = {flat: flat.allocate() for flat in flats.values()}
        for flat, buffer in buffers.items():
            for slot, first, one in flat.slots:
                views[slot] = _shaped(buffer[first : first + one.numel()], one)
        self._views = [views[slot] for slot in range(len(like))]
        for flat, (low, high, slots) in order:
            piece = buffers[flat][low:high]
            small = piece.numel() * piece.element_size() * self._processes <= _SMALL
            bucket = _Bucket(piece, slots, at_once=small and self._processes > 2)
            self._buckets.append(bucket)
            for slot in slots:
                self._of_slot[slot].append(bucket)

    def _begin(self) -> None:
        self._put = [False] * len(self._views)
        self._sent = 0
        self._asked: list[tuple[_Bucket, Tensor, Any]] = []
        self._gathering: list[Any] = []
        for bucket in self._buckets:
            bucket.missing = len(bucket.slots)

    def has(self, slot: int) -> bool:
        """Tells whether the slot's value for the next sum was handed over already."""
        return self._put[slot]

    def put(self, slot: int, value: Tensor) -> None:
        """Hands a slot's value over, before the others are known."""
        self._views[slot].copy_(torch.view_as_real(value) if value.is_complex() else value)
        self._mark(slot)
        self._send()

    def _mark(self, slot: int) -> None:
        self._put[slot] = True
        for bucket in self._of_slot[slot]:
            bucket.missing -= 1

    def sum(self, leaf: Leaf) -> list[Tensor]:
        """Returns the sum of all processes' values, in tensors that the next call overwrites.

        A collective operation. A slot that no process has a value of comes out as -0.0.

        Args:
            leaf: this process's values; what was handed over before is not looked at.
        """
        for bucket in self._buckets:
            self._fill([slot for slot in bucket.slots if not self._put[slot]], leaf)
            self._send()
        while self._asked:
            self._add_up(*self._asked.pop(0))
        for work in self._gathering:
            work.wait()
        self._begin()
        return [
            torch.view_as_complex(view) if self._complex[slot] else view
            for slot, view in enumerate(self._views)
        ]

    def _fill(self, slots: Sequence[int], leaf: Leaf) -> None:
        views: list[Tensor] = []
        values: list[Tensor] = []
        for slot in slots:
            value = leaf[slot]
            if value is None:
                self._views[slot].fill_(-0.0)
            else:
                views.append(self._views[slot])
                values.append(torch.view_as_real(value) if value.is_complex() else value)
            self._mark(slot)
        if views:
            foreach._foreach_copy_(views, values)

    def _send(self) -> None:
        """Sends the buckets that are whole, each after all before it, as all processes do."""
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            bucket = self._buckets[self._sent]
            if len(self._asked) == 2:
                self._add_up(*self._asked.pop(0))
            copies = self._processes if bucket.at_once else 1
            received = self._room_for(bucket.flat, copies)
            # As bytes: what is not added up on the way can be of any type.
            whole, own = _bytes(received), _bytes(bucket.flat)
            if bucket.at_once:
                work = gather_into(whole, own, async_op=True)
            elif self._processes == 2:
                # All of it to the other one: as much to send as by slices, in one round.
                other = [own.numel(), 0] if torch.distributed.get_rank() else [0, own.numel()]
                work = torch.distributed.all_to_all_single(whole, own, other, other, async_op=True)
            else:
                work = torch.distributed.all_to_all_single(whole, own, async_op=True)
            self._asked.append((bucket, received, work))
            self._sent += 1

    def _room_for(self, flat: Tensor, copies: int) -> Tensor:
        """Returns one of two buffers: one can be filled while the other is added up."""
        kind, size = (self._sent % 2, flat.dtype, flat.device), flat.numel() * copies
        buffer = self._received.get(kind)
        if buffer is None or buffer.numel() < size:
            buffer = self._received[kind] = flat.new_empty(size)
        return buffer[:size]

    def _add_up(self, bucket: _Bucket, received: Tensor, work: Any) -> None:
        """Adds up a bucket, or this process's slice of it and starts to gather those of all."""
        work.wait()
        size = self._processes
        if size == 2:
            both = (
                [received, bucket.flat] if torch.distributed.get_rank() else [bucket.flat, received]
            )
            torch.add(*both, out=bucket.flat)
            return
        parts = received.view(size, -1)
        step = 1
        while 2 * step < size:
            parts[:: 2 * step] += parts[step :: 2 * step]
            step *= 2
        if bucket.at_once:
            torch.add(parts[0], parts[step], out=bucket.flat)
            return
        # Not in place: the buffer is filled again while this is still on its way.
        own = parts[0] + parts[step]
        if len(self._gathering) == 2:
            # What is sent is held until then.
            self._gathering.pop(0).wait()
        whole = _bytes(bucket.flat)
        if own.device.type == "cpu":
            # Gloo gathers through buffers of its own, which take as much memory and two copies.
            work = torch.distributed.all_to_all_single(
                whole, _bytes(own).repeat(size), async_op=True
            )
        else:
            work = gather_into(whole, _bytes(own), async_op=True)
        self._gathering.append(work)


def gather_into(whole: Tensor, own: Tensor, async_op: bool = False) -> Any:
    """Fills a tensor with those of all processes, by the name that torch has for it."""
    gather = (
        getattr(torch.distributed, "all_gather_single", None)
        or torch.distributed.all_gather_into_tensor
    )
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
