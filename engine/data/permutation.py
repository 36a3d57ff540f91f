"""A sampler that shuffles data of any size, holds nothing and starts anywhere at once."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import numpy as np
from torch.utils.data import Sampler

from .bijection import (
    BLOCK,
    MAX_KEY,
    MAX_SIZE,
    SORTED_BELOW,
    FeistelNetwork,
    IndexArray,
    as_int,
    integer_within,
    order_key,
    permute,
    sorted_orders,
    unpermute,
)

__all__ = ["PermutationSampler", "order_key", "permute", "unpermute"]


class PermutationSampler(Sampler[int]):
    """A shuffle for data of any size: holds nothing, and starts anywhere in an epoch at once.

    It is used as ``sampler=`` of a `torch.utils.data.DataLoader`. The order is a pure function of
    (size, seed, epoch): it depends on no random state, so there is nothing to save. Without
    `set_epoch` every epoch has the same order.

    From 1024 samples on, the index at a position is computed by an unbalanced generalised Feistel
    network with cycle walking (Black and Rogaway 2002), whose round function is splitmix64
    (Steele, Lea and Flood 2014) with Stafford's finalizer Mix13. Below 1024 the order sorts the
    words of a splitmix64 stream. Both are integer arithmetic modulo 2**64 and call no generator of
    NumPy or torch, so the order is the same on every platform and with every version of them.
    `crosstrain.engine.data.bijection` has the method.

    Args:
        data_source_or_size: the dataset (its ``len`` is read once, here), or the number of
            samples, from 1 to 2**48.
        seed: the seed, from 0 to 2**64 - 1.
        num_samples: how many samples make an epoch; all by default. Fewer gives the first ones
            of the order. More appends further orders of the whole data, each shuffled anew.

    Raises:
        TypeError: the data has no length, or a number is not an integer.
        ValueError: a number is out of range, or the data is empty.
    """

    def __init__(
        self, data_source_or_size: Sized | int, *, seed: int = 0, num_samples: int | None = None
    ) -> None:
        self._size = _size_of(data_source_or_size)
        self._seed = integer_within("seed", seed, 0, MAX_KEY)
        self._epoch = 0
        if num_samples is None:
            num_samples = self._size
        # Positions are 64-bit signed integers, and so is what len() may return.
        self._num_samples = integer_within("num_samples", num_samples, 1, 2**63 - 1)

    @property
    def size(self) -> int:
        """The number of samples that the data has."""
        return self._size

    @property
    def num_samples(self) -> int:
        """The number of samples that an epoch has."""
        return self._num_samples

    @property
    def seed(self) -> int:
        """The seed; may be set, from 0 to 2**64 - 1."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = integer_within("seed", seed, 0, MAX_KEY)

    @property
    def epoch(self) -> int:
        """The epoch whose order is given; may be set, as with `set_epoch`."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = integer_within("epoch", epoch, 0, MAX_KEY)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, as with `torch.utils.data.DistributedSampler`: call it before each.

        Args:
            epoch: from 0 to 2**64 - 1.

        Raises:
            TypeError: it is not an integer.
            ValueError: it is out of range.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_samples

    def __iter__(self) -> Iterator[int]:
        # Bound now, not at the first next(): set_epoch() never changes an order half-way.
        return self._stream(self._seed, self._epoch)

    def __repr__(self) -> str:
        return (
            f"PermutationSampler({self._size}, seed={self._seed}, "
            f"num_samples={self._num_samples}, epoch={self._epoch})"
        )

    def indices(self, start: int, stop: int) -> IndexArray:
        """Give the indices at positions ``start`` to ``stop - 1`` of this epoch.

        Time and memory grow with ``stop - start`` only, wherever it starts.

        Args:
            start: the first position, from 0 to ``stop``.
            stop: the end, not included, up to ``len(self)``.

        Returns:
            int64, shape (stop - start,).

        Raises:
            TypeError: an argument is not an integer.
            IndexError: the positions are not all in this epoch.
        """
        start, stop = as_int("start", start), as_int("stop", stop)
        if not 0 <= start <= stop <= self._num_samples:
            raise IndexError(
                f"positions {start} to {stop} are not in this epoch: "
                f"0 <= start <= stop <= {self._num_samples} must hold"
            )
        return self._span(self._seed, self._epoch, start, stop)

    def position_of(self, index: int) -> int:
        """Say when a sample comes in this epoch: the position at which ``indices`` has it.

        Args:
            index: the sample, from 0 to ``size - 1``.

        Returns:
            Its position in the first pass over the data. With ``num_samples`` below the size it
            may be ``len(self)`` or more: then the epoch ends before the sample comes.

        Raises:
            TypeError: the index is not an integer.
            IndexError: the index is out of range.
        """
        index = as_int("index", index)
        if not 0 <= index < self._size:
            raise IndexError(f"index must be from 0 to {self._size - 1}, not {index}")
        key = order_key(self._seed, self._epoch, 0)
        return int(unpermute([index], self._size, key)[0])

    def _stream(self, seed: int, epoch: int) -> Iterator[int]:
        for start in range(0, self._num_samples, BLOCK):
            stop = min(start + BLOCK, self._num_samples)
            yield from self._span(seed, epoch, start, stop).tolist()

    def _span(self, seed: int, epoch: int, start: int, stop: int) -> IndexArray:
        size = self._size
        if size < SORTED_BELOW:
            first = start // size
            keys = [order_key(seed, epoch, lap) for lap in range(first, -(-stop // size))]
            orders = sorted_orders(size, keys).reshape(-1)
            return orders[start - first * size : stop - first * size]
        out = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < len(out):
            lap, offset = divmod(start + done, size)
            count = min(len(out) - done, size - offset)
            positions = np.arange(offset, offset + count, dtype=np.uint64)
            network = FeistelNetwork(size, order_key(seed, epoch, lap))
            out[done : done + count] = network.forward(positions).view(np.int64)
            done += count
        return out


def _size_of(source: Sized | int) -> int:
    if isinstance(source, Sized):
        size = len(source)
        if size == 0:
            raise ValueError("the data source is empty: there is nothing to shuffle")
        return integer_within("the length of the data source", size, 1, MAX_SIZE)
    try:
        return integer_within("size", source, 1, MAX_SIZE)
    except TypeError as error:
        raise TypeError(
            f"a PermutationSampler takes a dataset with a length or a number of samples, "
            f"not {source!r} ({type(source).__name__}); give the number if the data has no len()"
        ) from error
