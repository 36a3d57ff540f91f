"""The memoryless shuffle: a bijection for every size, seekable, and the same for ever."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from crosstrain.engine.data.permutation import (
    FeistelNetwork,
    PermutationSampler,
    order_key,
    permute,
    unpermute,
)

LARGEST = 2**48
# Primes, squares and powers of two with their neighbours, and sizes with many spare cells.
ODD_SIZES = [
    *(997, 1009, 10_007, 65_537, 999_983),
    *(k * k + d for k in (32, 99, 1000) for d in (-1, 0, 1)),
    *(2**k + d for k in (10, 11, 13, 16, 19) for d in (-1, 0, 1)),
    *(k * k + k + d for k in (40, 500) for d in (-1, 0, 1)),
    1_000_000 - 1001,
]


def splitmix64(state: int) -> Iterator[int]:
    """The published generator, on Python integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        yield z ^ (z >> 31)


def jump(state: int, count: int) -> int:
    """Output ``count`` of `splitmix64`, reached by its arithmetic sequence."""
    return next(splitmix64((state + count * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF))


def reference_index(position: int, n: int, key: int) -> int:
    """The network once more, from its description: one value, no arrays, nothing can overflow."""
    a = math.isqrt(n) + (0 if math.isqrt(n) ** 2 == n else 1)
    b = math.ceil(n / a)
    round_keys = list(islice(splitmix64(jump(key, n)), 8))
    while True:
        left, right = divmod(position, b)
        for turn, round_key in enumerate(round_keys):
            if turn % 2 == 0:
                left = (left + (jump(round_key, right) // 2**24 * a) // 2**40) % a
            else:
                right = (right + (jump(round_key, left) // 2**24 * b) // 2**40) % b
        position = left * b + right
        if position < n:
            return position


def assert_bijection(n: int, key: int) -> None:
    positions = np.arange(n)
    order = permute(positions, n, key)
    assert order.dtype == np.int64
    assert order.min() == 0
    assert order.max() == n - 1
    assert np.bincount(order, minlength=n).max() == 1
    np.testing.assert_array_equal(unpermute(order, n, key), positions)


def test_splitmix64_of_these_tests_is_the_published_one() -> None:
    assert list(islice(splitmix64(1234567), 5)) == [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    assert [jump(1234567, i) for i in range(3)] == list(islice(splitmix64(1234567), 3))


def test_every_size_up_to_2000_is_a_bijection() -> None:
    for n in range(1, 2001):
        for key in (0, 2**64 - 1 - n):
            assert_bijection(n, key)


@pytest.mark.parametrize("n", ODD_SIZES)
def test_awkward_sizes_are_bijections(n: int) -> None:
    assert_bijection(n, n)


def test_the_network_itself_is_a_bijection_where_the_sampler_does_not_use_it() -> None:
    for n in range(1, 1024):
        positions = np.arange(n, dtype=np.uint64)
        network = FeistelNetwork(n, n)
        order = network.forward(positions)
        np.testing.assert_array_equal(np.sort(order), positions)
        np.testing.assert_array_equal(network.inverse(order), positions)


@pytest.mark.parametrize(
    "n", [1024, 1025, 10_007, 10**10, 2**47 + 1, LARGEST - 2**24, LARGEST - 1, LARGEST]
)
def test_equals_the_description_computed_with_plain_integers(n: int) -> None:
    positions = [0, 1, 2, n // 3, n // 2, n - 2, n - 1]
    for key in (0, 1, 2**63, 2**64 - 1):
        expected = [reference_index(position, n, key) for position in positions]
        assert permute(positions, n, key).tolist() == expected


@settings(deadline=None, max_examples=150)
@given(data=st.data(), n=st.integers(1, LARGEST), key=st.integers(0, 2**64 - 1))
def test_blocks_of_any_size_are_injective_in_range_and_invertible(
    data: st.DataObject, n: int, key: int
) -> None:
    count = data.draw(st.integers(1, min(n, 9000)))
    start = data.draw(st.integers(0, n - count))
    positions = np.arange(start, start + count)
    order = permute(positions, n, key)
    assert order.min() >= 0
    assert order.max() < n
    assert len(np.unique(order)) == count
    np.testing.assert_array_equal(unpermute(order, n, key), positions)
    np.testing.assert_array_equal(permute(unpermute(positions, n, key), n, key), positions)


def test_shape_is_kept_and_empty_is_allowed() -> None:
    grid = np.arange(12).reshape(3, 4)
    assert permute(grid, 5000, 1).tolist() == permute(grid.ravel(), 5000, 1).reshape(3, 4).tolist()
    assert permute([], 5000, 1).shape == (0,)
    assert unpermute([], 10, 1).shape == (0,)
    assert PermutationSampler(5000).indices(7, 7).shape == (0,)
    assert PermutationSampler(10).indices(10, 10).shape == (0,)


@pytest.mark.parametrize(
    ("size", "num_samples"),
    [
        *((size, num) for size in (1, 7, 1023, 1024, 10_007) for num in (None, 1, 13, 1030)),
        *((size, 30_000) for size in (1023, 1024, 10_007)),
    ],
)
def test_seeking_gives_the_slice_of_the_whole_order(size: int, num_samples: int | None) -> None:
    sampler = PermutationSampler(size, seed=5, num_samples=num_samples)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert len(whole) == len(sampler) == (num_samples or size)
    assert all(type(index) is int for index in whole[:10])
    chosen = np.random.default_rng(0).integers(0, len(whole) + 1, size=(60, 2))
    for start, stop in np.sort(chosen, axis=1).tolist():
        assert sampler.indices(start, stop).tolist() == whole[start:stop]
    for lap in range(0, len(whole), size):
        part = whole[lap : lap + size]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(size))


def test_each_pass_beyond_the_data_is_shuffled_anew() -> None:
    for size in (50, 2000):
        whole = list(PermutationSampler(size, num_samples=3 * size))
        first, second, third = whole[:size], whole[size : 2 * size], whole[2 * size :]
        assert sorted(first) == sorted(second) == sorted(third) == list(range(size))
        assert first != second != third != first
        assert second == permute(np.arange(size), size, order_key(0, 0, 1)).tolist()


def test_a_shorter_epoch_is_the_start_of_the_whole_one() -> None:
    whole = PermutationSampler(10_000, seed=3)
    part = PermutationSampler(10_000, seed=3, num_samples=123)
    assert list(part) == whole.indices(0, 123).tolist()


@pytest.mark.parametrize("size", [600, 6000, 10**10, LARGEST])
def test_position_of_finds_each_index(size: int) -> None:
    sampler = PermutationSampler(size, seed=9)
    sampler.set_epoch(4)
    start = size // 2
    for offset, index in enumerate(sampler.indices(start, start + 20).tolist()):
        assert sampler.position_of(index) == start + offset


def test_orders_differ_by_seed_by_epoch_and_by_size() -> None:
    for size in (900, 5000):
        orders = set[tuple[int, ...]]()
        for seed in range(8):
            sampler = PermutationSampler(size, seed=seed)
            for epoch in range(8):
                sampler.set_epoch(epoch)
                orders.add(tuple(sampler))
        assert len(orders) == 64  # with seed + epoch as key there would be 15
        same_place = np.array([*orders])[0] == np.array([*orders])[1]
        assert same_place.sum() < 10
        smaller = list(PermutationSampler(size - 1))
        grown = [index for index in PermutationSampler(size) if index != size - 1]
        assert np.sum(np.array(smaller) == np.array(grown)) < 10


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = PermutationSampler(3000, seed=1)
    first = list(sampler)
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    assert list(sampler) == first
    assert torch.equal(torch.get_rng_state(), state)
    sampler.epoch = 7
    seventh = list(sampler)
    assert seventh != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    other = PermutationSampler(range(3000))
    other.seed, other.epoch = 1, 7
    assert list(other) == seventh


def test_an_iterator_keeps_the_order_with_which_it_began() -> None:
    sampler = PermutationSampler(20_000, seed=1)
    expected = list(sampler)
    iterator = iter(sampler)
    sampler.set_epoch(1)
    got = list(islice(iterator, 100))
    sampler.seed = 2
    got.extend(iterator)
    assert got == expected


def test_pickled_sampler_goes_on_with_the_same_order() -> None:
    sampler = PermutationSampler(5000, seed=11, num_samples=7000)
    sampler.set_epoch(3)
    copy = pickle.loads(pickle.dumps(sampler))
    assert (copy.seed, copy.epoch, len(copy), copy.size) == (11, 3, 7000, 5000)
    assert list(copy) == list(sampler)
    assert repr(copy) == "PermutationSampler(5000, seed=11, num_samples=7000, epoch=3)"


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_yields_the_sampler_order(workers: int) -> None:
    dataset = TensorDataset(torch.arange(3001))
    sampler = PermutationSampler(dataset, seed=2)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=64, sampler=sampler, num_workers=workers
    )
    assert len(loader) == 47
    seen = list[list[int]]()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen.append(torch.cat([batch for (batch,) in loader]).tolist())
        assert seen[epoch] == sampler.indices(0, 3001).tolist()
    assert seen[0] != seen[1]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(3001))


def test_batch_sampler_of_torch_takes_it() -> None:
    sampler = PermutationSampler(1030)
    batches = list(BatchSampler(sampler, batch_size=100, drop_last=True))
    assert [index for batch in batches for index in batch] == sampler.indices(0, 1000).tolist()


def peak_bytes(size: int) -> int:
    tracemalloc.start()
    try:
        sampler = PermutationSampler(size)
        sampler.indices(size // 2, size // 2 + 256)
        sampler.position_of(size - 1)
        assert sum(1 for _ in islice(sampler, 30_000)) == 30_000
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_size() -> None:
    peak_bytes(10**5)  # what a first use loads
    peaks = [peak_bytes(size) for size in (10**6, 10**10, LARGEST)]
    # A block is 8192 words of 8 bytes, of which a few are alive at once, and 8192 Python integers.
    assert max(peaks) < 1_500_000
    assert max(peaks) < 1.2 * min(peaks)


GOLDEN = [
    ((10, 0, 0), [4, 9, 2, 3, 7], [5, 1, 6, 0, 8]),
    ((10, 0, 1), [3, 9, 5, 2, 6], [7, 1, 0, 4, 8]),
    ((10, 1, 0), [0, 1, 4, 3, 7], [9, 2, 6, 5, 8]),
    ((1023, 7, 3), [5, 890, 958, 55, 517], [231, 761, 846, 1017, 234]),
    ((1024, 7, 3), [1022, 894, 935, 385, 186], [888, 136, 550, 599, 58]),
    ((1025, 7, 3), [410, 541, 225, 265, 1016], [128, 324, 913, 463, 636]),
    ((60_000, 56, 2), [18482, 18177, 47980, 48863, 52629], [46761, 19986, 31371, 37432, 2886]),
    (
        (999_983, 2**64 - 1, 5),
        [403407, 182047, 53732, 121407, 31842],
        [595756, 19869, 127725, 617083, 677090],
    ),
    (
        (10**10, 1, 0),
        [3210604869, 3984309443, 7739085299, 8679857999, 3657066161],
        [6742119222, 1100123680, 8947159960, 9186398529, 1988411958],
    ),
    (
        (LARGEST - 1, 0, 0),
        [210692045750679, 130929960523134, 166160876101283, 38770462179849, 251793738656979],
        [41554767060572, 83417755708717, 137509841095517, 113596146293461, 172134832454160],
    ),
    (
        (LARGEST, 0, 0),
        [149133057784883, 89308582507505, 58069032818377, 162889264092119, 36097342923252],
        [254888444953176, 50062606871849, 270428787978682, 204955554860438, 96770549204074],
    ),
]


@pytest.mark.parametrize(("order", "first", "last"), GOLDEN)
def test_orders_never_change_between_versions(
    order: tuple[int, int, int], first: list[int], last: list[int]
) -> None:
    size, seed, epoch = order
    sampler = PermutationSampler(size, seed=seed)
    sampler.set_epoch(epoch)
    assert sampler.indices(0, 5).tolist() == first
    assert sampler.indices(size - 5, size).tolist() == last


class _Unsized:
    pass


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (0, {}, ValueError, "size must be from 1 to 281474976710656, not 0"),
        (-3, {}, ValueError, "not -3"),
        (LARGEST + 1, {}, ValueError, "not 281474976710657"),
        ([], {}, ValueError, "data source is empty"),
        (range(LARGEST + 1), {}, ValueError, "length of the data source must be from 1"),
        (5.0, {}, TypeError, r"dataset with a length or a number of samples, not 5\.0 \(float\)"),
        (True, {}, TypeError, "not True"),
        (None, {}, TypeError, "not None"),
        (_Unsized(), {}, TypeError, "give the number if the data has no len"),
        (10, {"seed": -1}, ValueError, "seed must be from 0 to 18446744073709551615, not -1"),
        (10, {"seed": 2**64}, ValueError, "seed must be"),
        (10, {"seed": 1.5}, TypeError, r"seed must be an integer, not 1\.5 \(float\)"),
        (10, {"seed": None}, TypeError, "seed must be an integer"),
        (10, {"seed": np.True_}, TypeError, "seed must be an integer"),
        (10, {"num_samples": 0}, ValueError, "num_samples must be from 1"),
        (10, {"num_samples": "5"}, TypeError, "num_samples must be an integer, not '5'"),
    ],
)
def test_wrong_arguments_are_named(
    source: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PermutationSampler(source, **options)


def test_wrong_epochs_and_positions_are_named() -> None:
    size: Any = np.int64(100)
    seed: Any = np.uint64(3)
    sampler = PermutationSampler(size, seed=seed)
    assert (sampler.size, sampler.seed) == (100, 3)
    with pytest.raises(ValueError, match=r"epoch must be from 0 to \d+, not -1"):
        sampler.set_epoch(-1)
    with pytest.raises(TypeError, match="epoch must be an integer, not 'two'"):
        sampler.epoch = "two"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="seed must be from 0"):
        sampler.seed = -5
    assert (sampler.seed, sampler.epoch) == (3, 0)
    for start, stop in ((-1, 5), (5, 101), (6, 5), (101, 101)):
        with pytest.raises(IndexError, match=f"positions {start} to {stop} are not in this epoch"):
            sampler.indices(start, stop)
    with pytest.raises(TypeError, match="stop must be an integer"):
        sampler.indices(0, 2.0)  # type: ignore[arg-type]
    for index in (-1, 100, 2**70):
        with pytest.raises(IndexError, match=f"index must be from 0 to 99, not {index}"):
            sampler.position_of(index)


def test_wrong_arguments_of_the_pure_functions_are_named() -> None:
    for function, name in ((permute, "positions"), (unpermute, "indices")):
        for values in ([0, 100], [-1, 3]):
            with pytest.raises(IndexError, match=f"{name} must be from 0 to 99"):
                function(values, 100, 0)
        with pytest.raises(TypeError, match=f"{name} must be integers, not float64"):
            function([0.5], 100, 0)
        with pytest.raises(ValueError, match="n must be from 1"):
            function([0], 0, 0)
        with pytest.raises(ValueError, match="key must be from 0"):
            function([0], 100, 2**64)
    with pytest.raises(ValueError, match="rounds must be from 1"):
        FeistelNetwork(10, 0, rounds=0)
    with pytest.raises(ValueError, match="lap must be from 0"):
        order_key(0, 0, -1)
