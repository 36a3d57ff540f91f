"""Shares: which part of a global batch is whose, in a world of several processes.

The order of the samples is that of one process, and a loader's batch is the global batch: rank r of
W takes its part of each, from the left, as even as can be. So the batches, and what is drawn for
their samples, do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.utils.data import BatchSampler

from crosstrain.backends import World
from crosstrain.engine.ranks.world import joined
from crosstrain.engine.state import Unread

from .order import BLOCK, Batch, computes_its_order, pinned

if TYPE_CHECKING:
    from crosstrain.backends import Backend

ALONE: Final = World()


class BatchShare(NamedTuple):
    """What a process has of a global batch.

    Attributes:
        samples: how many of its samples are this process's.
        total: how many it has.
        processes: among how many processes it was dealt out.
    """

    samples: int
    total: int
    processes: int

    @property
    def weight(self) -> float:
        """What a process's mean loss is multiplied by, because gradients are averaged over ranks.

        Exactly 1.0 where each process has as many samples; 0.0 where this one has none.
        """
        own = self.samples * self.processes
        return 1.0 if own == self.total else own / self.total


class ShardedBatch(list[Any]):
    """A process's part of a global batch that was dealt out to logical shards.

    A list of the parts of this process's shards, as the loader collated them, in their order. A
    shard without a sample has a placeholder, which is to count for nothing.

    Args:
        parts: the parts.
        shares: what is in each.
        first: the first of this process's shards.
    """

    def __init__(self, parts: Iterable[Any], shares: Sequence[BatchShare], first: int) -> None:
        super().__init__(parts)
        #: How many samples each part has.
        self.samples = [share.samples for share in shares]
        #: How many the global batch has.
        self.total = shares[0].total
        #: The number of shards of the run, and the first of this process's.
        self.shards, self.first = shares[0].processes, first


@dataclass(frozen=True, slots=True)
class Shards(World):
    """The logical shards that a process computes, for which batches are dealt out as for processes.

    There are `size` of them in the run.
    """

    #: Those of this process.
    own: range = range(1)

    @classmethod
    def of(cls, count: int, world: World) -> Shards:
        """Returns the shards of a process: as many as of every other, in the order of ranks."""
        each = count // world.size
        return cls(0, 0, count, range(world.rank * each, (world.rank + 1) * each))


class Dealt(NamedTuple):
    """A process's part of a batch of an order.

    Args:
        number: the batch's number.
        first: the position of the part's first sample in the order.
        offset: the place of that sample in the batch.
        indices: the indices; those of a placeholder where no sample is this process's.
        share: the counts; None where nothing is dealt out.
    """

    number: int
    first: int
    offset: int
    indices: Any
    share: BatchShare | None = None


#: What a loader has asked for and not given yet: a batch's keyed indices, and the counts.
Waiting = tuple[Any, BatchShare | None]


def span(count: int, world: World) -> tuple[int, int]:
    """Returns from where to where a process has a batch; the first may have one sample more."""
    each, more = divmod(count, world.size)
    low = world.rank * each + min(world.rank, more)
    return low, low + each + (world.rank < more)


def world_of(backend: Backend | None) -> World:
    """Returns which process of how many this is: the backend's world, or the process group's."""
    if backend is not None:
        return backend.world
    return joined() or ALONE


def deal(order: Iterable[Batch], world: World) -> Iterator[Dealt]:
    """Yields a process's part of each batch.

    A batch with fewer samples than there are processes leaves some without. They take the batch's
    first sample as a placeholder, of weight 0: all processes have to take part in what they do
    together.
    """
    places = _places(world)
    for batch in order:
        indices = batch.indices
        total = len(indices)
        for place in places:
            low, high, share = _part(total, place)
            try:
                part = indices[low:high]
            except TypeError:
                # Some other collection, such as a set.
                part = list(indices)[low:high]
            yield Dealt(batch.number, batch.first + low, low, part, share)


def _places(world: World) -> list[World]:
    """Returns for whom a process takes parts: for itself, or for each of its logical shards."""
    if not isinstance(world, Shards):
        return [world]
    return [World(shard, shard, world.size) for shard in world.own]


def _part(total: int, place: World) -> tuple[int, int, BatchShare]:
    """Returns from where to where a part of a batch goes, and what is in it."""
    low, high = span(total, place)
    share = BatchShare(high - low, total, place.size)
    return (0, 1, share) if low == high else (low, high, share)


def deal_spans(batch_sampler: Any, start: int, world: World) -> Iterator[Dealt] | None:
    """Returns a process's part of each batch, computed without the rest of the batch.

    None where that cannot be done, or costs more than to slice the batch: a call of `indices` costs
    as much as some 2000 samples in a block.
    """
    if type(batch_sampler) is not BatchSampler or batch_sampler.batch_size < BLOCK // 4:
        return None
    sampler = batch_sampler.sampler
    return _spans(batch_sampler, start, world) if computes_its_order(sampler) else None


def _spans(batch_sampler: Any, start: int, world: World) -> Iterator[Dealt]:
    sampler, size = pinned(batch_sampler.sampler), batch_sampler.batch_size
    count, places = len(sampler), _places(world)
    for number in range(start, count // size if batch_sampler.drop_last else -(-count // size)):
        first = number * size
        total = min(size, count - first)
        for place in places:
            low, high, share = _part(total, place)
            part = sampler.indices(first + low, first + high).tolist()
            yield Dealt(number, first + low, low, part, share)


def check_divisible(batch_size: Any, world: World) -> None:
    """Refuses batches of fewer samples than there are processes."""
    if isinstance(world, Shards):
        # Those without a sample count for nothing.
        return
    if isinstance(batch_size, int) and batch_size < world.size:
        counts = "1 process" if batch_size == 1 else f"1 to {batch_size} processes"
        raise ValueError(
            f"A global batch of {batch_size} cannot be dealt out to {world.size} processes: "
            "batch_size is that of all of them together, and each has to have a sample of it. "
            f"Start {counts}, or, for a new run, give the loader a batch_size of at least "
            f"{world.size}."
        )


def check_shards(count: Any, world: World) -> int:
    """Returns a number of logical shards, if a world of processes can compute them."""
    if not isinstance(count, int) or count < 1 or count & (count - 1):
        raise ValueError(
            f"The number of logical shards is a power of two (1, 2, 4, 8, ...), got {count!r}. "
            "Choose at least the largest number of processes that the run will have."
        )
    if count % world.size:
        works = ", ".join(str(1 << level) for level in range(count.bit_length()))
        raise ValueError(
            f"{count} logical shards cannot be dealt out evenly to {world.size} processes. Start "
            f"as many as one of {works}: the number of shards is the run's, and stays."
        )
    return count


def deals_out(engine: Any) -> bool:
    """Tells whether an engine deals its batches out to the processes."""
    return hasattr(engine, "share")


def share_of(engine: Any) -> BatchShare | None:
    """Returns what this process has of an engine's batch; None where nothing was dealt out."""
    share: BatchShare | None = getattr(engine, "share", None)
    return share


def mean_over_ranks(trainer: Any, value: Any = None) -> torch.Tensor:
    """Returns the mean over the global batch of a value that is a mean over this process's part.

    `trainer.state.output`, the loss, is that of this process's samples. With this, every process
    gets the loss of the global batch. It is a collective operation: call it in all processes, at
    the same event, and no more often than somebody looks at the value. The result is not read.

    Args:
        trainer: the engine, after its batch was taken.
        value: a number or a tensor of any shape, the same in all processes, on the backend's
            device; the iteration's output by default.

    Returns:
        A detached tensor, weighted by how many samples of the batch each process had.

    Raises:
        TypeError: if the value is neither a number nor a tensor of floats.
    """
    found = trainer.state.raw_output if value is None else value
    if isinstance(found, Unread):
        found = found.tensor
    if isinstance(found, (int, float)):
        device = None if trainer.backend is None else trainer.backend.device
        found = torch.tensor(found, dtype=torch.float64, device=device)
    if not (isinstance(found, torch.Tensor) and found.is_floating_point()):
        raise TypeError(
            "mean_over_ranks() takes a number or a tensor of floats; the value, by default the "
            f"iteration's output, is a {type(found).__name__}. Give it one by value=."
        )
    mean = found.detach().clone()
    world = world_of(trainer.backend)
    if world.size == 1 or (value is None and getattr(trainer, "shards", None) is not None):
        # With logical shards the output of a factory's trainer is the global batch's.
        return mean
    share = share_of(trainer)
    weight = 1.0 if share is None else share.weight
    if weight == 0:
        # What a placeholder gave is no part of the mean, not even as 0 times NaN.
        mean.zero_()
    else:
        mean *= weight / world.size
    group: Any = torch.distributed
    group.all_reduce(mean)
    return mean
