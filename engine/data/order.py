"""Orders: the batches of a sampler from any batch on, without fetching and without Python lists.

torch's own samplers hold a permutation as a list of Python integers. Here it stays a tensor, which
is sliced: starting at batch 10**6 costs what starting at batch 0 does. A sampler of another type is
iterated over.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from crosstrain.backends import random_state

# The versions of torch whose samplers draw as it is done here.
_TESTED: Final = "2.9 and 2.13"

# How many indices are made Python integers at once: few at first, so that the first batch is there
# soon.
_FIRST_BLOCK: Final = 256
BLOCK: Final = 8192


class Batch(NamedTuple):
    """A batch of an order: its number, the position of its first sample, and its indices."""

    number: int
    first: int
    indices: Any


def computes_its_order(sampler: Any) -> bool:
    """Tells whether a sampler gives any part of its order by `indices(start, stop)`."""
    return callable(getattr(sampler, "indices", None))


def pinned(sampler: Any) -> Any:
    """Returns a sampler that computes the order that this one has now, whatever becomes of it.

    The sampler of a loader is told another epoch while an order of it is still being given.
    """
    return copy.copy(sampler)


def is_seekable(sampler: Any) -> bool:
    """Tells whether a sampler's order can be entered anywhere without iterating up to there."""
    return _kind(sampler) in (SequentialSampler, *_CHUNKS) or computes_its_order(sampler)


def draws_at_once(sampler: Any) -> bool:
    """Tells whether all that iterating over a sampler draws is drawn before its first sample."""
    if _kind(sampler) is BatchSampler:
        return draws_at_once(sampler.sampler)
    # Without a generator of its own, torch's RandomSampler draws the seed of one.
    return is_seekable(sampler)


def _kind(sampler: Any) -> Any:
    # Not isinstance: a subclass may give another order.
    return sampler.__class__


def batches_from(batch_sampler: Any, start: int) -> Iterator[Batch]:
    """Yields the batches of a batch sampler from number `start` on.

    It draws the random numbers that torch's own iteration draws, in the same order.
    """
    sampler = getattr(batch_sampler, "sampler", None)
    if type(batch_sampler) is not BatchSampler or not is_seekable(sampler):
        yield from _walk(batch_sampler, start)
        return
    size, number = batch_sampler.batch_size, start
    left: list[Any] = []
    for block in _blocks_from(sampler, start * size):
        left += block
        whole = len(left) - len(left) % size
        for low in range(0, whole, size):
            yield Batch(number, number * size, left[low : low + size])
            number += 1
        del left[:whole]
    if left and not batch_sampler.drop_last:
        yield Batch(number, number * size, left)


def _walk(batch_sampler: Iterable[Any], start: int) -> Iterator[Batch]:
    first = 0
    for number, indices in enumerate(batch_sampler):
        if number >= start:
            yield Batch(number, first, indices)
        first += len(indices)


def samples_from(sampler: Any, start: int) -> Iterator[Any]:
    """Yields the samples of a sampler from position `start` on."""
    if is_seekable(sampler):
        return chain.from_iterable(_blocks_from(sampler, start))
    return islice(iter(sampler), start, None)


@functools.cache
def _check_copies() -> None:
    """Refuses a torch whose own samplers draw small orders otherwise than they are drawn here."""
    data, weights = range(5), [0.1, 0.4, 0.2, 0.3, 0.5]
    tried: list[Any] = [
        RandomSampler(data),
        RandomSampler(data, generator=torch.Generator()),
        RandomSampler(data, replacement=True, num_samples=40),
        RandomSampler(data, num_samples=12),
        SubsetRandomSampler([3, 1, 4, 0]),
        WeightedRandomSampler(weights, 7),
        DistributedSampler(data, num_replicas=2, rank=1, seed=3),  # type: ignore[arg-type]
        DistributedSampler(data, num_replicas=2, rank=1, shuffle=False),  # type: ignore[arg-type]
    ]
    with random_state.preserved():
        for sampler in tried:
            drawn: list[list[Any]] = []
            for order in (iter(sampler), _drawn(sampler)):
                # Not torch.manual_seed, which seeds every device, too.
                torch.default_generator.manual_seed(11)
                if getattr(sampler, "generator", None) is not None:
                    sampler.generator.manual_seed(11)
                drawn.append([*order, int(torch.randint(1 << 30, ()))])
            if drawn[0] != drawn[1]:
                raise RuntimeError(
                    f"torch {torch.__version__} draws the order of a {type(sampler).__name__} in "
                    f"another way than the versions that this was tested with ({_TESTED}): "
                    f"{drawn[0]} instead of {drawn[1]}. Install one of these, or give the loader a "
                    "sampler of your own, such as PermutationSampler."
                )


def _drawn(sampler: Any) -> Iterator[Any]:
    for chunk in _CHUNKS[_kind(sampler)](sampler):
        places: list[int] = chunk.tolist()
        yield from _looked_up(sampler, places) if type(sampler) is SubsetRandomSampler else places


def _blocks_from(sampler: Any, start: int) -> Iterator[list[Any]]:
    """Yields the samples of a seekable sampler in lists, each drawn when it is asked for."""
    kind = _kind(sampler)
    if kind in _CHUNKS:
        _check_copies()
    if kind is SequentialSampler:
        for low, high in _spans(start, len(sampler.data_source)):
            yield list(range(low, high))
    elif kind not in _CHUNKS:
        sampler = pinned(sampler)
        for low, high in _spans(start, len(sampler)):
            yield sampler.indices(low, high).tolist()
    else:
        for chunk in _CHUNKS[kind](sampler):
            for low, high in _spans(start, len(chunk)):
                places: list[int] = chunk[low:high].tolist()
                yield _looked_up(sampler, places) if kind is SubsetRandomSampler else places
            start = max(0, start - len(chunk))


def _looked_up(sampler: SubsetRandomSampler, places: list[int]) -> list[int]:
    return [sampler.indices[place] for place in places]


def _spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
    size = _FIRST_BLOCK
    while start < stop:
        yield start, min(start + size, stop)
        start, size = start + size, BLOCK


def _random(sampler: RandomSampler) -> Iterator[torch.Tensor]:
    size, wanted = len(sampler.data_source), sampler.num_samples
    given: torch.Generator | None = getattr(sampler, "generator", None)
    generator = torch.Generator() if given is None else given
    if given is None:
        generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))
    if sampler.replacement:
        for _ in range(wanted // 32):
            yield torch.randint(size, (32,), generator=generator)
        yield torch.randint(size, (wanted % 32,), generator=generator)
        return
    for _ in range(wanted // size):
        yield torch.randperm(size, generator=generator)
    # torch draws one more permutation even where it takes nothing of it: a generator that outlives
    # the pass must be left as torch leaves it.
    if wanted % size or given is not None:
        yield torch.randperm(size, generator=generator)[: wanted % size]


def _subset(sampler: SubsetRandomSampler) -> Iterator[torch.Tensor]:
    yield torch.randperm(len(sampler.indices), generator=getattr(sampler, "generator", None))


def _weighted(sampler: WeightedRandomSampler) -> Iterator[torch.Tensor]:
    generator: torch.Generator | None = getattr(sampler, "generator", None)
    yield torch.multinomial(
        sampler.weights, sampler.num_samples, sampler.replacement, generator=generator
    )


def _distributed(sampler: Any) -> Iterator[torch.Tensor]:
    size = len(sampler.dataset)
    # The indices that torch appends, so that each process gets as many, are those at the beginning.
    places = torch.arange(sampler.rank, sampler.total_size, sampler.num_replicas) % size
    if not sampler.shuffle:
        yield places
        return
    generator = torch.Generator()
    generator.manual_seed(sampler.seed + sampler.epoch)
    yield torch.randperm(size, generator=generator)[places]


_CHUNKS: Final[dict[type, Callable[[Any], Iterator[torch.Tensor]]]] = {
    RandomSampler: _random,
    SubsetRandomSampler: _subset,
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}
