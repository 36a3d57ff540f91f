"""What deterministic mode costs over a plain loader: microseconds a batch and a sample.

    python benchmarks/deterministic_cost.py

A step that does nothing is run over the same loader by `Engine` and by `DeterministicEngine`, with
batches of 1 and of 64 samples, with all three generators keyed and with torch's only, with 0 and 2
workers. The difference in time a batch is a line over the batch's size: its slope is the cost of a
sample, its value at 0 the cost of a batch. Rounds of both alternate; the medians are taken. With
workers, samples are keyed in the workers, so only a part of it is in the way of the training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

from crosstrain.engine import DeterministicEngine, Engine, Events

SMALL, LARGE = 1, 64
STREAMS = {"python, numpy, torch": ("python", "numpy", "torch"), "torch": ("torch",)}


class Constant:
    """A dataset that costs nothing: the difference is what is measured."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def first(batch: list[int]) -> int:
    """Collates as cheaply as can be."""
    return batch[0]


def nothing(engine: Any, batch: Any) -> None:
    """Does no training."""


def microseconds(engine: Any, loader: Any) -> float:
    """Returns the time of a batch in an epoch, from its second batch to its last."""
    marks: list[float] = []

    def mark() -> None:
        marks.append(time.perf_counter())

    with engine.add_event_handler(Events.ITERATION_COMPLETED, mark):
        engine.run(loader, max_epochs=1)
    return (marks[-1] - marks[0]) / (len(marks) - 1) * 1e6


def difference(
    batch_size: int, workers: int, streams: tuple[str, ...], batches: int, rounds: int
) -> tuple[float, float]:
    """Returns the median time of a plain batch and the median of the added time, in us."""
    plain, added = [], []
    for _ in range(rounds):
        loader = DataLoader(
            Constant(batch_size * batches),  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            collate_fn=first,
        )
        one = microseconds(Engine(nothing), loader)
        other = microseconds(DeterministicEngine(nothing, streams=streams), loader)
        plain.append(one)
        added.append(other - one)
    return statistics.median(plain), statistics.median(added)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'workers':>7}  {'keyed streams':22} {'us a batch':>10} {'us a sample':>11}   plain")
    for workers in (0, 2):
        for name, streams in STREAMS.items():
            sizes = (SMALL, LARGE)
            found = [difference(n, workers, streams, args.batches, args.rounds) for n in sizes]
            slope = (found[1][1] - found[0][1]) / (LARGE - SMALL)
            print(
                f"{workers:>7}  {name:22} {found[0][1] - slope * SMALL:>10.1f} {slope:>11.2f}   "
                f"{found[0][0]:.1f} and {found[1][0]:.1f} us a batch of {SMALL} and {LARGE}"
            )


if __name__ == "__main__":
    main()
