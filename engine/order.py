"""Orders: the batches of a sampler from any batch on, without fetching and without Python lists.

torch's own samplers hold a permutation as a list of Python integers. Here it stays a tensor, which
is sliced: starting at batch 10**6 costs what starting at batch 0 does. A sampler of another type is
iterated over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

__all__ = ["Batch", "batches_from", "is_seekable", "samples_from"]

_BLOCK = 8192


class Batch(NamedTuple):
    """A batch of an order: its number, the position of its first sample, and its indices."""

    number: int
    first: int
    indices: Any


def is_seekable(sampler: Any) -> bool:
    """Tells whether a sampler's order can be entered anywhere without iterating up to there."""
    return type(sampler) in _CHUNKS or hasattr(sampler, "indices") and callable(sampler.indices)


def batches_from(batch_sampler: Any, start: int) -> Iterator[Batch]:
    """Yields the batches of a batch sampler from number `start` on.

    It draws the random numbers that torch's own iteration draws, in the same order.

    Args:
        batch_sampler: torch's, or any iterable of lists of indices.
        start: how many batches to leave out.
    """
    sampler = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is not BatchSampler or not is_seekable(sampler):
        yield from _walk(batch_sampler, start)
        return
    size, number = batch_sampler.batch_size, start
    samples = samples_from(sampler, start * size)
    while batch := list(islice(samples, size)):
        if len(batch) < size and batch_sampler.drop_last:
            return
        yield Batch(number, number * size, batch)
        number += 1


def _walk(batch_sampler: Iterable[Any], start: int) -> Iterator[Batch]:
    first = 0
    for number, indices in enumerate(batch_sampler):
        if number >= start:
            yield Batch(number, first, indices)
        first += len(indices)


def samples_from(sampler: Any, start: int) -> Iterator[Any]:
    """Yields the samples of a sampler from position `start` on.

    Args:
        sampler: torch's, one with a method `indices(start, stop)`, or any iterable.
        start: how many samples to leave out.
    """
    if not is_seekable(sampler):
        yield from islice(iter(sampler), start, None)
        return
    if type(sampler) is SequentialSampler:
        yield from range(start, len(sampler.data_source))
        return
    if type(sampler) not in _CHUNKS:
        size = len(sampler)
        for low in range(start, size, _BLOCK):
            yield from sampler.indices(low, min(low + _BLOCK, size)).tolist()
        return
    look_up = sampler.indices if type(sampler) is SubsetRandomSampler else None
    for chunk in _CHUNKS[type(sampler)](sampler):
        if start >= len(chunk):
            start -= len(chunk)
            continue
        for low in range(start, len(chunk), _BLOCK):
            block = chunk[low : low + _BLOCK].tolist()
            yield from block if look_up is None else [look_up[index] for index in block]
        start = 0


def _random(sampler: RandomSampler) -> Iterator[torch.Tensor]:
    size, wanted = len(sampler.data_source), sampler.num_samples
    generator = sampler.generator
    own = generator is None
    if own:
        generator = torch.Generator()
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    if sampler.replacement:
        for low in range(0, wanted, 32):
            yield torch.randint(size, (min(32, wanted - low),), generator=generator)
        if wanted % 32 == 0:
            torch.randint(size, (0,), generator=generator)
        return
    for _ in range(wanted // size):
        yield torch.randperm(size, generator=generator)
    # torch draws one more permutation even where it takes nothing of it: a generator that outlives
    # the epoch must be left as torch leaves it.
    if wanted % size or not own:
        yield torch.randperm(size, generator=generator)[: wanted % size]


def _subset(sampler: SubsetRandomSampler) -> Iterator[torch.Tensor]:
    yield torch.randperm(len(sampler.indices), generator=sampler.generator)


def _weighted(sampler: WeightedRandomSampler) -> Iterator[torch.Tensor]:
    yield torch.multinomial(
        sampler.weights, sampler.num_samples, sampler.replacement, generator=sampler.generator
    )


def _distributed(sampler: DistributedSampler[Any]) -> Iterator[torch.Tensor]:
    size = len(sampler.dataset)  # type: ignore[arg-type]
    places = torch.arange(sampler.rank, sampler.total_size, sampler.num_replicas) % size
    if not sampler.shuffle:
        yield places
        return
    generator = torch.Generator()
    generator.manual_seed(sampler.seed + sampler.epoch)
    yield torch.randperm(size, generator=generator)[places]


def _sequential(sampler: SequentialSampler) -> Iterator[torch.Tensor]:
    yield torch.arange(len(sampler.data_source))


_CHUNKS: dict[type, Any] = {
    SequentialSampler: _sequential,
    RandomSampler: _random,
    SubsetRandomSampler: _subset,
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}
