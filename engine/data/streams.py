"""Keyed random streams: a sample's random numbers follow from what it is, not from who fetches it.

Before a sample is fetched, in whatever process, the generators of Python, NumPy and torch are
seeded from (seed, pass, position), where the position counts the samples of a pass over the data in
their order. Workers, prefetching and restarts then change nothing. Keys are mixed by splitmix64
(Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy
import torch

from crosstrain.engine.splitmix import mix, mix_range

ALL_STREAMS: Final = ("python", "numpy", "torch")

_MASK: Final = (1 << 64) - 1
# Kept apart from the positions of samples, which are below them: a batch as a whole, its collation.
_BATCH: Final = 1 << 61
_COLLATE: Final = 1 << 62
_RANK: Final = 1 << 60
_ANEW: Final = 1 << 59
_STEP: Final = 1 << 58

_SEEDERS: Final[dict[str, Callable[[int], Any]]] = {
    "python": random.seed,
    # The legacy seeding of NumPy's global generator takes 32 bits.
    "numpy": lambda key: numpy.random.seed(key & 0xFFFFFFFF),
    # Not torch.manual_seed, which visits every device and takes a hundred times as long.
    "torch": torch.default_generator.manual_seed,
}

# The sample that is being fetched in this thread: there is no argument through which a dataset's
# __getitem__ could be told.
_fetching = threading.local()


def _enter(key: int, streams: Iterable[str]) -> None:
    """Seeds this process's generators, and makes the key the current sample's."""
    _fetching.key = key
    for stream in streams:
        _SEEDERS[stream](key)


def seed_host(seed: int) -> None:
    """Seeds this process's generators as `manual_seed` does, and visits no device."""
    for seeder in _SEEDERS.values():
        seeder(seed)


def rank_seed(seed: int, rank: int) -> int:
    """Returns another seed for each process; for rank 0, the seed itself."""
    return mix(mix(seed), _RANK + rank) >> 1 if rank else seed


def step_seed(seed: int) -> int:
    """Returns another seed, for a step whose data draws from streams that begin with this one."""
    return mix(mix(seed), _STEP) >> 1


def leave() -> None:
    """Says that no sample is being fetched in this thread any more."""
    _fetching.key = None


class SampleKey:
    """The key of the sample that is being fetched in this thread, to be fetched under once more."""

    def __init__(self) -> None:
        self.value: int = getattr(_fetching, "key", None) or 0

    def enter(self, key: int, streams: Iterable[str] = ALL_STREAMS) -> None:
        """Makes a key the current sample's, and seeds streams of this process from it."""
        _fetching.asked = False
        _enter(key, streams)

    @property
    def asked(self) -> bool:
        """Whether `current_sample` was called since this was entered."""
        return bool(_fetching.asked)


@contextmanager
def sample_key() -> Generator[SampleKey, None, None]:
    """Leaves the current sample's key after the block as it was before it."""
    before = getattr(_fetching, "key", None)
    try:
        yield SampleKey()
    finally:
        _fetching.key = before


@dataclass(frozen=True, slots=True)
class SampleStreams:
    """The random streams of one sample, for a dataset that keeps off the global generators.

    Args:
        key: 64 bits that follow from (seed, pass, position).
    """

    key: int

    def torch(self, purpose: int = 0) -> torch.Generator:
        """Returns a CPU generator of its own for this sample.

        Args:
            purpose: a number that tells several generators of one sample apart.
        """
        generator = torch.Generator()
        generator.manual_seed(mix(self.key, purpose))
        return generator

    def numpy(self, purpose: int = 0) -> numpy.random.Generator:
        """Returns a NumPy generator (PCG64) of its own for this sample."""
        return numpy.random.Generator(numpy.random.PCG64(mix(self.key, purpose)))

    def python(self, purpose: int = 0) -> random.Random:
        """Returns a `random.Random` of its own for this sample."""
        return random.Random(mix(self.key, purpose))


def current_sample() -> SampleStreams:
    """Returns the streams of the sample that is being fetched, in a worker or in the main process.

    Call it in a dataset's `__getitem__`. In `collate_fn`, and in a `__getitems__` that does not
    iterate over its indices, the streams are those of the batch.

    Raises:
        RuntimeError: if no deterministic engine is fetching a sample in this thread.
    """
    key = getattr(_fetching, "key", None)
    if key is None:
        raise RuntimeError(
            "current_sample() was called where no DeterministicEngine fetches a sample. Call it in "
            "the __getitem__ of a DataLoader's dataset during DeterministicEngine.run(), or make a "
            "generator of your own elsewhere."
        )
    _fetching.asked = True
    return SampleStreams(key)


class StreamKey(NamedTuple):
    """What keys the streams of one pass over the data.

    Args:
        seed: the run's seed.
        epoch: which pass over the data it is, from 0.
        streams: which global generators are seeded: of `python`, `numpy`, `torch`.
        rank: tells processes apart whose data is their own; 0 where data is dealt out.
    """

    seed: int
    epoch: int
    streams: tuple[str, ...] = ALL_STREAMS
    rank: int = 0

    @property
    def base(self) -> int:
        """The 64 bits that all keys of the pass are made from."""
        base = mix(mix(self.seed & _MASK), self.epoch)
        return mix(base, _RANK + self.rank) if self.rank else base

    @property
    def host_seed(self) -> int:
        """What generators that a process draws from in this pass are seeded with."""
        return rank_seed((self.seed + self.epoch) % 2**63, self.rank)

    def seed_at(self, batch: int) -> int:
        """Returns a seed that follows from the place of a batch in this pass."""
        return mix(self.base, _ANEW + batch) >> 1


class KeyedIndices(list[Any]):
    """The indices of a batch; iterating over it seeds the streams before each of them.

    torch's loaders fetch a batch by iterating over its indices, in whatever process, so the key
    travels with them and neither loader nor dataset is changed. A `__getitems__` that iterates is
    served the same way; each time it does, the streams are others.

    Args:
        indices: what the batch sampler gave.
        base: what keys the pass.
        streams: which generators are seeded.
        batch: the batch's number in the pass.
        first: the position of its first sample in the pass.
        collates: whether collating may draw, and is to have streams of its own.
        offset: the place of its first sample in the batch, where it is a process's part of one.
    """

    __slots__ = ("_base", "_batch", "_collates", "_first", "_given", "_lap", "_offset", "_streams")

    def __init__(
        self,
        indices: Any,
        base: int,
        streams: tuple[str, ...],
        batch: int,
        first: int,
        collates: bool = True,
        offset: int = 0,
    ) -> None:
        super().__init__(indices)
        self._given = None if isinstance(indices, list) else indices
        self._base = base
        self._streams = streams
        self._batch = batch
        self._first = first
        self._collates = collates
        self._offset = offset
        self._lap = 0

    @property
    def plain(self) -> Any:
        """What the batch sampler gave, where that is no list: an array, a tuple; else this."""
        return self if self._given is None else self._given

    @property
    def values(self) -> Any:
        """What the batch sampler gave; nothing is seeded by it."""
        return list(super().__iter__()) if self._given is None else self._given

    def _next_base(self) -> int:
        lap, self._lap = self._lap, self._lap + 1
        return self._base if lap == 0 else mix(self._base, lap)

    def __iter__(self) -> Iterator[Any]:
        base, local = self._next_base(), _fetching
        seeders = [_SEEDERS[stream] for stream in self._streams]
        keys = mix_range(base, self._first, len(self))
        # What is paid for each sample: written out, and not called.
        for key, index in zip(keys, super().__iter__(), strict=True):
            local.key = key
            for seed in seeders:
                seed(key)
            yield index
        # The loader collates next.
        self._enter_collate(base)

    def enter(self) -> None:
        """Seeds the streams for the batch as a whole."""
        _enter(self._of_part(mix(self._base, _BATCH + self._batch)), self._streams)

    def enter_collate(self) -> None:
        """Seeds the streams for collating, after a dataset that has fetched the batch at once."""
        self._enter_collate(self._next_base())

    def _enter_collate(self, base: int) -> None:
        if self._collates:
            _enter(self._of_part(mix(base, _COLLATE + self._batch)), self._streams)

    def _of_part(self, key: int) -> int:
        # Other samples are to have other numbers; the first part has those of the whole batch.
        return mix(key, self._offset) if self._offset else key

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self._base, self._streams, self._batch, self._first, self._collates, self._offset)
        return KeyedIndices, (self.values, *place)


def plain_indices(indices: Any) -> Any:
    """Returns the indices of a batch as its sampler gave them; seeds nothing."""
    if isinstance(indices, KeyedIndices):
        return indices.values
    return indices.index if isinstance(indices, KeyedIndex) else indices


class KeyedIndex(NamedTuple):
    """The index of a sample that is fetched alone, without a batch (`batch_size=None`).

    It may be a list of indices; then `offset` tells the parts of several processes apart.
    """

    index: Any
    base: int
    streams: tuple[str, ...]
    position: int
    offset: int = 0

    def enter(self) -> None:
        """Seeds the streams for the sample."""
        key = mix(self.base, self.position)
        _enter(mix(key, self.offset) if self.offset else key, self.streams)


class KeyedDataset:
    """A dataset whose samples are fetched without batches, with keyed streams.

    There the loader does not iterate over indices, so the streams are seeded here. Everything else
    is the dataset's own: attributes are read from it and set on it.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "dataset", dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, KeyedIndex):
            index.enter()
            index = index.index
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Others ask for special methods to learn what this can do: it is to do what it says.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset,)


class KeyedBatchDataset(KeyedDataset):
    """A dataset that is fetched from by whole batches, with keyed streams."""

    def __getitems__(self, indices: Any) -> Any:
        """Fetches a batch, under the streams of the batch until it iterates over its indices."""
        if not isinstance(indices, KeyedIndices):
            return self.dataset.__getitems__(indices)
        indices.enter()
        items = self.dataset.__getitems__(indices.plain)
        indices.enter_collate()
        return items
