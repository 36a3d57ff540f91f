"""Keyed random streams: each sample's random numbers follow from what it is, not from who fetches it.

Before a sample is fetched, in whatever process, the generators of Python, NumPy and torch are seeded
from (seed, epoch, position), where the position counts the samples of the epoch in their order.
Workers, prefetching and restarts then change nothing. Keys are mixed by splitmix64 (Steele, Lea and
Flood 2014).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy
import torch

__all__ = [
    "ALL_STREAMS",
    "KeyedDataset",
    "KeyedIndex",
    "KeyedIndices",
    "SampleStreams",
    "StreamKey",
    "current_sample",
]

ALL_STREAMS: Final = ("python", "numpy", "torch")

_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
# Kept apart from the positions of samples, which are below it.
_COLLATE: Final = 1 << 62

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


def _mix(value: int) -> int:
    """Returns 64 well-mixed bits of an integer: splitmix64's output function."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class SampleStreams:
    """The random streams of one sample, for a dataset that keeps off the global generators.

    Args:
        key: 64 bits that follow from (seed, epoch, position).
    """

    key: int

    def torch(self, purpose: int = 0) -> torch.Generator:
        """Returns a CPU generator of its own for this sample.

        Args:
            purpose: a number that tells several generators of one sample apart.
        """
        generator = torch.Generator()
        generator.manual_seed(_mix(self.key + purpose))
        return generator

    def numpy(self, purpose: int = 0) -> numpy.random.Generator:
        """Returns a NumPy generator (PCG64) of its own for this sample."""
        return numpy.random.Generator(numpy.random.PCG64(_mix(self.key + purpose)))

    def python(self, purpose: int = 0) -> random.Random:
        """Returns a `random.Random` of its own for this sample."""
        return random.Random(_mix(self.key + purpose))


def current_sample() -> SampleStreams:
    """Returns the streams of the sample that is being fetched, in a worker or in the main process.

    Call it in a dataset's `__getitem__`, `__getitems__` or in `collate_fn`.

    Raises:
        RuntimeError: if no deterministic engine is fetching a sample in this thread.
    """
    key = getattr(_fetching, "key", None)
    if key is None:
        raise RuntimeError(
            "current_sample() was called where no DeterministicEngine fetches a sample. Call it in "
            "a dataset's __getitem__ during DeterministicEngine.run(), or make a generator of your "
            "own elsewhere."
        )
    return SampleStreams(key)


@dataclass(frozen=True, slots=True)
class StreamKey:
    """What keys the streams of one pass over the data.

    Args:
        seed: the run's seed.
        epoch: which pass over the data it is, from 0.
        streams: which global generators are seeded: of `python`, `numpy`, `torch`.
    """

    seed: int
    epoch: int
    streams: tuple[str, ...] = ALL_STREAMS

    def enter(self, position: int) -> None:
        """Seeds this process's generators for the sample at a position of the pass."""
        key = _mix(_mix(_mix(self.seed & _MASK) + self.epoch) + position)
        _fetching.key = key
        for stream in self.streams:
            _SEEDERS[stream](key)

    def enter_collate(self, batch: int) -> None:
        """Seeds this process's generators for the collation of a batch of the pass."""
        self.enter(_COLLATE + batch)


class KeyedIndices(list[int]):
    """The indices of a batch; iterating over it seeds the streams before each of them.

    torch's loaders fetch a batch by iterating over its indices, in whatever process, so the key
    travels with them and neither loader nor dataset is changed.

    Args:
        indices: what the batch sampler gave.
        key: what keys the pass.
        batch: the batch's number in the pass.
        first: the position of its first sample in the pass.
    """

    def __init__(self, indices: Sequence[Any], key: StreamKey, batch: int, first: int) -> None:
        super().__init__(indices)
        self.key = key
        self.batch = batch
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        enter = self.key.enter
        position = self.first
        for index in super().__iter__():
            enter(position)
            position += 1
            yield index
        # The loader collates next.
        self.key.enter_collate(self.batch)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = list(super().__iter__())
        return KeyedIndices, (plain, self.key, self.batch, self.first)

    def enter(self) -> None:
        """Seeds the streams for the batch as a whole."""
        self.key.enter(self.first)


@dataclass(frozen=True, slots=True)
class KeyedIndex:
    """The index of a sample that is fetched alone, without a batch (`batch_size=None`)."""

    index: Any
    key: StreamKey
    position: int

    def enter(self) -> None:
        """Seeds the streams for the sample."""
        self.key.enter(self.position)


class KeyedDataset:
    """A dataset that is fetched from by whole batches, or without batches, with keyed streams.

    There the loader does not iterate over indices, so the streams are seeded here, once a fetch.
    Everything else is the dataset's own: attributes are read from it and set on it.

    Args:
        dataset: the user's dataset.
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
        # Unpickling asks for attributes before there is a dataset.
        if name == "dataset" or name.startswith("__") and name != "__getitems__":
            raise AttributeError(name)
        value = getattr(self.dataset, name)
        if name == "__getitems__" and value:
            return lambda indices: (indices.enter(), value(indices))[1]
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)
