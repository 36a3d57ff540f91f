"""The memoryless shuffle is as even as `torch.randperm`, by tests that see a network too short.

Every statistic is turned into a standard normal deviate. Keys are consecutive integers, the worst
that users give. All is fixed, so a test either always passes or always fails: an even shuffle
stays below `EVEN`, and each statistic also gets a shuffle that it must refuse, beyond `REFUSED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from crosstrain.engine.data.permutation import (
    ROUNDS,
    FeistelNetwork,
    PermutationSampler,
    order_key,
    permute,
)

Orders = npt.NDArray[np.int64]
"""Shape (keys, n): each row an order of range(n)."""

EVEN = 4.0
REFUSED = 10.0
SHAPES = [(1024, 500), (1500, 400), (10_007, 100)]


def deviate(chi_square: float, freedom: int) -> float:
    """Wilson and Hilferty's normal approximation of a chi-square value."""
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))


def cells(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64] | float) -> float:
    """The deviate of counts from what is expected in each cell, which must be given exactly."""
    return deviate(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def columns_of(n: int) -> int:
    """How far apart two positions are that share the right half of the network's pair."""
    return -(-n // (math.isqrt(n - 1) + 1))


@cache
def feistel(n: int, keys: int, rounds: int) -> Orders:
    positions = np.arange(n, dtype=np.uint64)
    orders = [FeistelNetwork(n, key, rounds).forward(positions) for key in range(keys)]
    return np.stack(orders).view(np.int64)


@cache
def randperm(n: int, keys: int) -> Orders:
    generator = torch.Generator().manual_seed(0)
    return np.stack([torch.randperm(n, generator=generator).numpy() for _ in range(keys)])


def spearman(orders: Orders) -> float:
    """Rank correlation of index and position, squared and added over the orders."""
    keys, n = orders.shape
    ranks = np.arange(n) - (n - 1) / 2
    correlations = (orders - (n - 1) / 2) @ ranks / (ranks @ ranks)
    return deviate(float((correlations**2).sum() * (n - 1)), keys)


def serial(orders: Orders, lag: int) -> float:
    """Correlation of each order with itself ``lag`` positions on, around the end."""
    keys, n = orders.shape
    centred = orders - (n - 1) / 2
    products = (centred * np.roll(centred, -lag, axis=1)).sum(axis=1)
    correlations = products / (centred[0] @ centred[0]) + 1 / (n - 1)
    return deviate(float((correlations**2).sum() * n), keys)


def differences(orders: Orders, lag: int) -> float:
    """Each difference modulo n of indices ``lag`` positions apart comes equally often."""
    n = orders.shape[1]
    gaps = (orders[:, lag:] - orders[:, :-lag]) % n
    counts = np.bincount(gaps.ravel(), minlength=n)
    assert counts[0] == 0
    return cells(counts[1:], float(counts.sum()) / (n - 1))


def pairs(orders: Orders, lag: int, parts: int = 16) -> float:
    """The parts of the data from which two samples ``lag`` positions apart come are unrelated."""
    n = orders.shape[1]
    part = orders * parts // n
    sizes = np.bincount(part[0], minlength=parts).astype(np.float64)
    chance = (np.outer(sizes, sizes) - np.diag(sizes)) / (n * (n - 1))
    counts = np.bincount((part[:, :-lag] * parts + part[:, lag:]).ravel(), minlength=parts**2)
    return cells(counts, chance.ravel() * float(counts.sum()))


def upper_differences(orders: Orders) -> float:
    """As `differences` for the upper half of the pair, of inputs that share the lower half."""
    n = orders.shape[1]
    side = math.isqrt(n)
    assert side * side == n
    upper = orders // side
    gaps = (upper[:, side:] - upper[:, :-side]) % side
    counts = np.bincount(gaps.ravel(), minlength=side)
    chance = np.full(side, side / (n - 1))
    chance[0] = (side - 1) / (n - 1)  # an index cannot come twice
    return cells(counts, chance * float(counts.sum()))


Statistic = Callable[[Orders], float]


def statistics(n: int) -> dict[str, Statistic]:
    far = columns_of(n)
    return {
        "spearman": spearman,
        "serial 1": partial(serial, lag=1),
        "serial far": partial(serial, lag=far),
        "differences 1": partial(differences, lag=1),
        "differences far": partial(differences, lag=far),
        "pairs far": partial(pairs, lag=far),
    }


@pytest.mark.parametrize("name", statistics(1024))
@pytest.mark.parametrize(("n", "keys"), SHAPES)
def test_as_even_as_randperm_and_two_rounds_are_seen(n: int, keys: int, name: str) -> None:
    statistic = statistics(n)[name]
    assert statistic(randperm(n, keys)) < EVEN
    assert statistic(feistel(n, keys, ROUNDS)) < EVEN
    assert statistic(feistel(n, keys, 2)) > REFUSED


def test_neighbouring_samples_come_from_unrelated_parts() -> None:
    n, keys = 10_007, 100
    assert pairs(randperm(n, keys), lag=1) < EVEN
    assert pairs(feistel(n, keys, ROUNDS), lag=1) < EVEN
    assert pairs(feistel(n, keys, 2), lag=1) > REFUSED


def test_the_tested_network_is_the_one_that_the_sampler_uses() -> None:
    n = 1500
    assert permute(np.arange(n), n, 3).tolist() == feistel(n, 400, ROUNDS)[3].tolist()


def test_at_the_smallest_network_six_rounds_are_seen_and_eight_are_not() -> None:
    n, keys = 1024, 10_000
    assert upper_differences(feistel(n, keys, 6)) > REFUSED
    assert upper_differences(feistel(n, keys, ROUNDS)) < EVEN
    feistel.cache_clear()  # 80 MB each


def first_samples(n: int, seeds: int, epochs: int, position: int) -> npt.NDArray[np.int64]:
    found = np.empty((seeds, epochs), dtype=np.int64)
    sampler = PermutationSampler(n)
    for sampler.seed in range(seeds):
        for sampler.epoch in range(epochs):
            found[sampler.seed, sampler.epoch] = sampler.indices(position, position + 1)[0]
    return found


@pytest.mark.parametrize("n", [37, 2000])
@pytest.mark.parametrize("position", [0, 36])
def test_each_sample_is_equally_often_first_over_seeds_and_epochs(n: int, position: int) -> None:
    found = first_samples(n, 100, 100, position)
    assert abs(cells(np.bincount(found.ravel(), minlength=n), found.size / n)) < EVEN
    # What an epoch does to a sample says nothing of what the next one, or the next seed, does.
    parts = found * 16 // n
    chance = np.bincount(np.arange(n) * 16 // n) / n
    for left, right in ((parts[:, :-1], parts[:, 1:]), (parts[:-1], parts[1:])):
        counts = np.bincount((left * 16 + right).ravel(), minlength=256)
        assert abs(cells(counts, (np.outer(chance, chance) * left.size).ravel())) < EVEN


def test_a_key_of_seed_plus_epoch_would_be_seen() -> None:
    n = 2000
    seeds = [
        [int(permute([0], n, order_key(seed + epoch, 0))[0]) for epoch in range(100)]
        for seed in range(100)
    ]
    assert cells(np.bincount(np.ravel(seeds), minlength=n), 10_000 / n) > REFUSED


def orders_of_five(shuffle: Callable[[int], npt.NDArray[np.int64]]) -> float:
    numbers = {order: number for number, order in enumerate(permutations(range(5)))}
    counts = np.zeros(120, dtype=np.int64)
    for key in range(12_000):
        counts[numbers[tuple(shuffle(key).tolist())]] += 1
    return cells(counts, 100.0)


def test_all_orders_of_five_samples_are_equally_likely_and_a_network_would_not_do() -> None:
    five = np.arange(5, dtype=np.uint64)
    assert abs(orders_of_five(lambda key: permute(five, 5, key))) < EVEN
    assert orders_of_five(lambda key: FeistelNetwork(5, key).forward(five).view(np.int64)) > REFUSED


@pytest.mark.parametrize("n", [10**10, 2**48 - 5, 2**48])
def test_a_block_of_a_huge_order_is_spread_evenly(n: int) -> None:
    sampler = PermutationSampler(n, seed=1)
    for start in (0, n // 2, n - 400_000):
        block = sampler.indices(start, start + 400_000)
        # The low bits, the high bits and the pair of neighbours' high bits.
        low, high = block % 1024, (block * 1024.0 / n).astype(np.int64)
        neighbours = high[:-1] // 32 * 32 + high[1:] // 32
        for part in (low, high, neighbours):
            assert abs(cells(np.bincount(part, minlength=1024), part.size / 1024)) < EVEN
        gaps = np.diff(block) % n * 1024.0 / n
        assert abs(cells(np.bincount(gaps.astype(np.int64), minlength=1024), gaps.size / 1024)) < 4


def test_the_spread_of_a_huge_block_is_seen_to_fail_with_two_rounds() -> None:
    n = 10**10
    block = FeistelNetwork(n, 1, 2).forward(np.arange(400_000, dtype=np.uint64)).view(np.int64)
    gaps = np.diff(block) % n * 1024.0 / n
    assert cells(np.bincount(gaps.astype(np.int64), minlength=1024), gaps.size / 1024) > REFUSED
