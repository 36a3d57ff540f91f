"""The order of the data at 10,000 ranks over 10**10 samples, simulated a rank at a time.

Run ``python benchmarks/order_at_scale.py``. It shows that every sample comes once: the ranks' parts
tile each batch and the batches the epoch (all of them, by arithmetic); each sample comes once in an
epoch of 10**6 samples (all of them, drawn); and samples of the large epoch are where the order has
them (some thousand, drawn). And it measures what a rank pays to start in the middle of the epoch:
time to the first batch, with a DataLoader, and memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import World
from crosstrain.engine import PermutationSampler
from crosstrain.engine.data.mapflow import MapFlow
from crosstrain.engine.data.shares import span
from crosstrain.engine.data.streams import StreamKey

RANKS, SAMPLES, EACH = 10_000, 10**10, 32
TARGET = 1.0  # ms
SEED, EPOCH = 7, 3


class Numbers(Dataset[int]):
    """The numbers from 0 to size - 1."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def batches(size: int, batch: int, world: World, start: int) -> Iterator[list[int]]:
    """What a rank is given from a batch of the epoch on, as a DeterministicEngine opens it."""
    data = Numbers(size)
    loader: Any = DataLoader(data, batch, sampler=PermutationSampler(data, seed=SEED))
    flow = MapFlow(loader, iter, world)
    for given in flow.open(StreamKey(SEED, EPOCH, ("torch",)), start, None):
        counts = flow.shares.popleft() if flow.shares is not None else None
        # A placeholder is no sample of this rank's.
        yield given.tolist() if counts is None or counts.samples else []


def order_of(size: int) -> PermutationSampler:
    sampler = PermutationSampler(size, seed=SEED)
    sampler.set_epoch(EPOCH)
    return sampler


def check_tiling(size: int, batch: int, ranks: int) -> None:
    """Every position of the epoch belongs to one rank: of a full batch, and of the last."""
    full, last = divmod(size, batch)
    for total in {batch, last} - {0}:
        place = 0
        for rank in range(ranks):
            low, high = span(total, World(rank, rank, ranks))
            assert low == place
            assert high - low in (total // ranks, total // ranks + 1)
            place = high
        assert place == total
    print(
        f"{ranks} parts tile a batch of {batch} and the last of {last}; {full} full batches and it "
        f"tile {size} positions, of which the order is a bijection"
    )


def check_exhaustively(size: int, batch: int, ranks: int) -> None:
    """Every sample of an epoch is given once, and every batch is that of one process."""
    seen, order = np.zeros(size, np.int8), order_of(size)
    parts = [batches(size, batch, World(rank, rank, ranks), 0) for rank in range(ranks)]
    for number in range(-(-size // batch)):
        given = [index for part in parts for index in next(part)]
        assert given == order.indices(number * batch, min(size, (number + 1) * batch)).tolist()
        np.add.at(seen, given, 1)
    assert (seen == 1).all()
    print(f"{ranks} ranks over {size} samples, global batch {batch}: every sample is given once")


def check_sampled(size: int, batch: int, ranks: int, checks: int) -> None:
    """Samples are given by the rank, in the batch and at the place, that the order says."""
    draw, order = random.Random(1), order_of(size)
    for _ in range(checks):
        index = draw.randrange(size)
        number, place = divmod(order.position_of(index), batch)
        total = min(batch, size - number * batch)
        each, more = divmod(total, ranks)
        # The first `more` ranks have a sample more.
        rank = place // (each + 1)
        rank = rank if rank < more else more + (place - more * (each + 1)) // each
        low, high = span(total, World(rank, rank, ranks))
        assert low <= place < high
        given = next(batches(size, batch, World(rank, rank, ranks), number))
        assert given[place - low] == index
    print(f"{checks} samples of {size}, drawn at random: each is given by the rank that has it")


def measure(size: int, ranks: int, times: int) -> tuple[list[float], float]:
    """Returns the ms to the first batch of some ranks, and the most KiB that one holds."""
    found: list[float] = []
    middle = size // (EACH * ranks) // 2
    chosen = random.Random(2).sample(range(ranks), min(times, ranks))
    next(batches(size, EACH * ranks, World(0, 0, ranks), middle))
    for rank in chosen:
        started = time.perf_counter()
        next(batches(size, EACH * ranks, World(rank, rank, ranks), middle))
        found.append((time.perf_counter() - started) * 1e3)
    tracemalloc.start()
    part = batches(size, EACH * ranks, World(chosen[0], chosen[0], ranks), middle)
    for _ in range(min(20, middle)):
        next(part)
    peak = tracemalloc.get_traced_memory()[1] / 1024
    tracemalloc.stop()
    return found, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--starts", type=int, default=1000, help="ranks that are started")
    parser.add_argument("--checks", type=int, default=2000, help="samples that are looked up")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {TARGET} ms")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_tiling(SAMPLES + 12_345, EACH * options.ranks, options.ranks)
    check_exhaustively(10**6 + 17, 8192, 100)
    check_sampled(SAMPLES + 12_345, EACH * options.ranks, options.ranks, options.checks)
    print(f"\n{'samples':>12}{'ranks':>8}{'median ms':>11}{'99 %':>8}{'most':>8}{'peak KiB':>10}")
    worst = 0.0
    for size, ranks in ((10**7, 1000), (10**7, options.ranks), (SAMPLES, options.ranks)):
        found, peak = measure(size, ranks, options.starts)
        worst = statistics.median(found)
        tail = sorted(found)[int(0.99 * len(found))]
        print(f"{size:>12}{ranks:>8}{worst:>11.3f}{tail:>8.3f}{max(found):>8.3f}{peak:>10.0f}")
    met = worst <= TARGET
    print(
        f"start of one rank of {options.ranks}: {worst:.3f} ms; target {TARGET} ms: "
        f"{'met' if met else 'missed'}"
    )
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
