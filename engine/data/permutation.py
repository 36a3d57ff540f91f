"""A shuffle that needs no memory and starts anywhere at once: the sampler, and its arithmetic.

``torch.randperm(n)`` holds n integers, and the only way to its middle is to draw all of it. Here
the index at a position is *computed* from the position, the size and a 64-bit key, so any part of
an epoch of any size up to 2**48 costs the same, and nothing is held.

The bijection is the generalised Feistel cipher of J. Black and P. Rogaway, "Ciphers with Arbitrary
Finite Domains" (CT-RSA 2002): a position is split into a pair (left, right) of Z_a x Z_b with
a * b >= n, each round adds a keyed function of one half to the other modulo a or b, and the few
values that land at n or above are sent through the network again until they land below ("cycle
walking").

The round function at x is output x of the splitmix64 generator (G. L. Steele, D. Lea and C. H.
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) started at the round's key,
that is Stafford's finalizer "Mix13" (D. Stafford, "Better Bit Mixing", 2011) of an arithmetic
sequence. It is reduced to a half's range by multiplying and shifting (D. Lemire, "Fast Random
Integer Generation in an Interval", ACM TOMACS 2019).

Everything is integer arithmetic modulo 2**64, so an order is the same on every platform and with
every version of Python, NumPy and torch. It is made to be even, not to keep a secret.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence, Sized
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from crosstrain.engine.splitmix import GOLDEN, WORD, Words, mix, mix_into, word

IndexArray = npt.NDArray[np.int64]

MAX_SIZE: Final = 2**48
"""The largest size. Its halves have 24 bits, so that 40 random bits times a half fit 64 bits."""

MAX_KEY: Final = 2**64 - 1
"""The largest key, seed and epoch."""

SORTED_BELOW: Final = 1024
"""Sizes below this are shuffled by sorting random words: a network over tiny halves is biased."""

ROUNDS: Final = 8
"""Rounds of the network. On few values a Feistel network of few rounds leaves a bias in the
differences of related inputs (M. Bellare, V. T. Hoang and S. Tessaro, "Message-Recovery Attacks on
Feistel-Based Format Preserving Encryption", CCS 2016). At 1024 values 6 rounds show it, 8 do not.
"""

BLOCK: Final = 8192
"""How many values are computed at a time: their temporaries stay in the processor's cache."""

_FRACTION_BITS: Final = 40


_W_DROPPED: Final = word(64 - _FRACTION_BITS)
_W_FRACTION: Final = word(_FRACTION_BITS)


def order_key(seed: int, epoch: int, lap: int = 0) -> int:
    """Give the 64-bit key of one order, so that `permute` can recompute what a sampler yielded.

    Two epochs of one seed never share a key, nor do two seeds in one epoch. Seed 0 in epoch 1 and
    seed 1 in epoch 0 are unrelated (with ``seed + epoch`` as key they would be the same order).

    Args:
        seed: the run's seed, from 0 to 2**64 - 1.
        epoch: the epoch, from 0 to 2**64 - 1.
        lap: which pass over the data within the epoch; above 0 only where ``num_samples`` is
            larger than the data.

    Returns:
        An integer from 0 to 2**64 - 1.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """
    seed = integer_within("seed", seed, 0, MAX_KEY)
    epoch = integer_within("epoch", epoch, 0, MAX_KEY)
    lap = integer_within("lap", lap, 0, MAX_KEY)
    return mix(mix(mix(seed, 0), epoch), lap)


class FeistelNetwork:
    """The keyed bijection of [0, size) itself, for any size; `permute` chooses when to use it.

    It works on the grid of a = ceil(sqrt(size)) times b = ceil(size / a) cells, which has fewer
    than a cells too many: cycle walking concerns less than one value in sqrt(size).

    Args:
        size: how many values there are, from 1 to 2**48.
        key: which bijection, from 0 to 2**64 - 1.
        rounds: how many rounds; another number gives another bijection. Below `ROUNDS` it is
            measurably less even: only tests want that.
    """

    __slots__ = ("_columns", "_rows", "_size", "_states", "_walks")

    def __init__(self, size: int, key: int, rounds: int = ROUNDS) -> None:
        size = integer_within("size", size, 1, MAX_SIZE)
        key = integer_within("key", key, 0, MAX_KEY)
        rounds = integer_within("rounds", rounds, 1, 64)
        rows = math.isqrt(size - 1) + 1
        columns = -(-size // rows)
        # The size is part of the key, so that the orders of n and n + 1 samples are unrelated.
        base = mix(key, size)
        self._states = tuple(word((mix(base, turn) + GOLDEN) % WORD) for turn in range(rounds))
        self._size = word(size)
        self._rows = word(rows)
        self._columns = word(columns)
        self._walks = rows * columns > size

    def forward(self, positions: Words) -> Words:
        """Give the value at each position, which are below ``size`` (unchecked)."""
        return self._blockwise(positions, backwards=False)

    def inverse(self, values: Words) -> Words:
        """Give the position of each value: undoes `forward`."""
        return self._blockwise(values, backwards=True)

    def _blockwise(self, values: Words, *, backwards: bool) -> Words:
        out = np.empty_like(values)
        for start in range(0, len(values), BLOCK):
            block = self._once(values[start : start + BLOCK], backwards)
            if self._walks:
                outside = np.flatnonzero(block >= self._size)
                while outside.size:
                    moved = self._once(block[outside], backwards)
                    block[outside] = moved
                    outside = outside[moved >= self._size]
            out[start : start + BLOCK] = block
        return out

    def _once(self, values: Words, backwards: bool) -> Words:
        left, right = self._split(values)
        draw, scratch = np.empty_like(left), np.empty_like(left)
        turns = range(len(self._states))
        for turn in reversed(turns) if backwards else turns:
            # Left first: neighbouring positions differ in the right half, which feeds round 0.
            odd = turn % 2
            source, target = (left, right) if odd else (right, left)
            modulus = self._columns if odd else self._rows
            _draw_into(draw, scratch, self._states[turn], source, modulus)
            # A difference below zero wraps to a huge word, so the minimum is the residue.
            if backwards:
                np.subtract(target, draw, target)
                np.add(target, modulus, scratch)
            else:
                np.add(target, draw, target)
                np.subtract(target, modulus, scratch)
            np.minimum(target, scratch, out=target)
        return self._join(left, right)

    def _split(self, values: Words) -> tuple[Words, Words]:
        left = np.floor_divide(values, self._columns)
        right = np.multiply(left, self._columns)
        np.subtract(values, right, right)
        return left, right

    def _join(self, left: Words, right: Words) -> Words:
        np.multiply(left, self._columns, left)
        np.add(left, right, left)
        return left


def _draw_into(out: Words, scratch: Words, state: Words, source: Words, modulus: Words) -> None:
    """Write a keyed pseudorandom number in [0, modulus) for each element of ``source``."""
    mix_into(out, scratch, state, source)
    # The upper 40 bits as a fraction of the modulus: 40 + 24 bits never overflow, and one residue
    # is likelier than another by 2**-16 at most (a modulus of 2**24), unmeasurably little.
    np.right_shift(out, _W_DROPPED, out)
    np.multiply(out, modulus, out)
    np.right_shift(out, _W_FRACTION, out)


def sorted_orders(size: int, keys: Sequence[int]) -> IndexArray:
    """Shuffle a small ``range(size)`` once for each key, a row each, by sorting random words."""
    states = [(mix(key, size) + GOLDEN) % WORD for key in keys]
    words = np.empty((len(keys), size), dtype=np.uint64)
    column = np.array(states, dtype=np.uint64)[:, None]
    mix_into(words, np.empty_like(words), column, np.arange(size, dtype=np.uint64))
    # The outputs of one generator differ from each other, so no algorithm of sorting changes this.
    orders: IndexArray = np.argsort(words, axis=1).astype(np.int64, copy=False)
    return orders


def permute(positions: npt.ArrayLike, n: int, key: int) -> IndexArray:
    """Give the indices at some positions of the keyed shuffle of ``range(n)``.

    A pure function: for one ``n`` and ``key`` it is a bijection of [0, n). Below 1024 it is a sort
    of n random words, above that a `FeistelNetwork`.

    Args:
        positions: integers of any shape, each from 0 to n - 1.
        n: the number of samples, from 1 to 2**48.
        key: which shuffle, from 0 to 2**64 - 1; `order_key` gives a sampler's.

    Returns:
        int64, the shape of ``positions``.

    Raises:
        TypeError: ``positions``, ``n`` or ``key`` holds something other than integers.
        ValueError: ``n`` or ``key`` is out of range.
        IndexError: a position is out of range.
    """
    n = integer_within("n", n, 1, MAX_SIZE)
    key = integer_within("key", key, 0, MAX_KEY)
    words, shape = _checked(positions, n, "positions")
    if n < SORTED_BELOW:
        picked: IndexArray = sorted_orders(n, [key])[0][words.view(np.int64)]
        return picked.reshape(shape)
    return FeistelNetwork(n, key).forward(words).view(np.int64).reshape(shape)


def unpermute(indices: npt.ArrayLike, n: int, key: int) -> IndexArray:
    """Give the positions at which some indices come in the keyed shuffle: undoes `permute`.

    Raises:
        TypeError: ``indices``, ``n`` or ``key`` holds something other than integers.
        ValueError: ``n`` or ``key`` is out of range.
        IndexError: an index is out of range.
    """
    n = integer_within("n", n, 1, MAX_SIZE)
    key = integer_within("key", key, 0, MAX_KEY)
    words, shape = _checked(indices, n, "indices")
    if n < SORTED_BELOW:
        places = np.argsort(sorted_orders(n, [key])[0]).astype(np.int64, copy=False)
        picked: IndexArray = places[words.view(np.int64)]
        return picked.reshape(shape)
    return FeistelNetwork(n, key).inverse(words).view(np.int64).reshape(shape)


def as_int(name: str, value: object) -> int:
    """Give an integer of any type as an int, or refuse it by its name."""
    if type(value) is int:  # the common case; the check of a protocol takes microseconds
        return value
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass  # an array or a tensor that is not one integer
    raise TypeError(f"{name} must be an integer, not {value!r} ({type(value).__name__})")


def integer_within(name: str, value: object, low: int, high: int) -> int:
    """Give an integer as an int, or refuse it with the legal values."""
    number = as_int(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {number}")
    return number


def _checked(values: npt.ArrayLike, n: int, name: str) -> tuple[Words, tuple[int, ...]]:
    """Give ``values`` as flat words below ``n``, and their shape."""
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64:  # what NumPy makes of an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= n):
        raise IndexError(
            f"{name} must be from 0 to {n - 1}, not {int(array.min())} to {int(array.max())}"
        )
    return array.reshape(-1).astype(np.uint64), array.shape


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
    This file's docstring has the method.

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
