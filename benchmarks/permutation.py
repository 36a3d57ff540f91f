"""What `PermutationSampler` costs at each size, beside `torch.randperm`.

Run ``python benchmarks/permutation.py``. Each row has a process of its own, so that its peak of
memory is its own; the figure is what was added after the imports. Linux only.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import sys
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import RandomSampler

from crosstrain.engine.data.permutation import PermutationSampler

SIZES = (10**3, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 2**48)
BATCH = 256
BLOCK = 8192


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, and MiB added to the process."""

    name: str
    size: int
    first_batch: float
    per_batch: float = math.nan
    per_block: float = math.nan
    epoch: float = math.nan
    memory: float = math.nan


def best(function: Callable[[], object], number: int, repeat: int = 7) -> float:
    """Give the seconds of one call: the best of a few runs, for the machine may be busy."""
    return min(timeit.repeat(function, number=number, repeat=repeat)) / number


def peak_memory() -> float:
    """Give the most memory that this process has held, in MiB (`ru_maxrss` would be a parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the peak memory needs Linux")


def seek(sampler: PermutationSampler) -> npt.NDArray[np.int64]:
    middle = len(sampler) // 2
    return sampler.indices(middle, middle + min(BATCH, len(sampler) - middle))


def measure_ours(size: int) -> Row:
    PermutationSampler(5000).indices(0, 5000)  # what a first call loads
    before = peak_memory()
    first = best(lambda: seek(PermutationSampler(size)), number=1, repeat=50)
    sampler = PermutationSampler(size)
    batch = best(lambda: seek(sampler), number=500)
    block = best(lambda: sampler.indices(0, BLOCK), number=50) if size >= BLOCK else math.nan
    epoch = math.nan
    if size <= 10**7:
        epoch = best(lambda: sum(1 for _ in sampler), number=1, repeat=3)
    return Row("PermutationSampler", size, first, batch, block, epoch, peak_memory() - before)


def measure_tensor(size: int) -> Row:
    torch.randperm(5000)
    before = peak_memory()
    generator = torch.Generator().manual_seed(0)

    def first() -> list[int]:
        order = torch.randperm(size, generator=generator)
        return order[size // 2 : size // 2 + BATCH].tolist()

    seconds = best(first, number=1, repeat=3)
    return Row("randperm, sliced tensor", size, seconds, memory=peak_memory() - before)


def measure_list(size: int) -> Row:
    torch.randperm(5000).tolist()
    before = peak_memory()
    generator = torch.Generator().manual_seed(0)
    seconds = best(lambda: torch.randperm(size, generator=generator).tolist(), number=1, repeat=3)
    return Row("randperm + tolist", size, seconds, memory=peak_memory() - before)


def measure_random_sampler(size: int) -> Row:
    torch.randperm(5000).tolist()
    before = peak_memory()
    sampler = RandomSampler(range(size))
    first = best(lambda: next(iter(sampler)), number=1, repeat=3)
    epoch = best(lambda: sum(1 for _ in sampler), number=1, repeat=3)
    return Row("torch RandomSampler", size, first, epoch=epoch, memory=peak_memory() - before)


def show(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10**7, help="size of the rows of torch")
    size = parser.parse_args().size
    jobs: list[tuple[Callable[[int], Row], int]] = [(measure_ours, n) for n in SIZES]
    jobs += [(job, size) for job in (measure_tensor, measure_list, measure_random_sampler)]
    print(
        f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    titles = ("first batch", f"{BATCH} indices", f"block of {BLOCK}", "whole epoch", "memory")
    print(f"{'':24}{'N':>16}" + "".join(f"{title:>15}" for title in titles))
    for job, n in jobs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(job, (n,))
        times = (row.first_batch, row.per_batch, row.per_block, row.epoch)
        memory = f"{row.memory:.1f} MiB"
        print(f"{row.name:24}{row.size:>16}" + "".join(f"{show(t):>15}" for t in times), end="")
        print(f"{memory:>15}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
