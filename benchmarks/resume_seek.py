"""How long a run takes to its first batch, resumed in the middle of an epoch, and its memory.

Run ``python benchmarks/resume_seek.py``. Rows: this engine with a shuffled `DataLoader` and with
`PermutationSampler`, pytorch-ignite's `DeterministicEngine`, torchdata's `StatefulDataLoader`, and
a plain `DataLoader` that begins an epoch, which no resume can beat unless it draws no permutation.
Each row has a process of its own, so that its peak of memory is its own. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import DeterministicEngine, Events, PermutationSampler

SIZES = (10**5, 10**6, 10**7)
BATCH = 32


class Numbers(Dataset[int]):
    """Holds nothing, so that what is measured is the order."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds to the first batch, and MiB: the peak, and what was added."""

    name: str
    size: int
    seconds: float
    peak: float
    added: float


def peak_memory() -> float:
    """Gives the most memory that this process has held, in MiB (`ru_maxrss` may be a parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: the peak memory needs Linux")


def loader(size: int, kind: Any = DataLoader, sampler: Any = None) -> Any:
    order = {"shuffle": True} if sampler is None else {"sampler": sampler}
    return kind(Numbers(size), batch_size=BATCH, **order)


def timed(first_batch: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds of a call, and the MiB that the process's peak grew by."""
    before, started = peak_memory(), time.perf_counter()
    first_batch()
    seconds = time.perf_counter() - started
    return seconds, peak_memory() - before


def terminate(engine: Any, batch: Any) -> None:
    engine.terminate()


def ours(size: int, sampler: Any = None) -> tuple[float, float]:
    states: list[Any] = []
    engine = DeterministicEngine(lambda engine, batch: None)
    data = loader(1000, sampler=sampler and PermutationSampler(1000))
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda: states.append(engine.state_dict())
    )
    engine.run(data)
    # A state of the middle of a long epoch, made from one of the beginning of a short one.
    state, batches = states[0], -(-size // BATCH)
    state["iteration"] = state["position"]["batch"] = state["progress"]["done"] = batches // 2
    state["epoch_length"] = state["position"]["data"]["batches"] = batches
    state["position"]["data"]["samples"] = size
    engine = DeterministicEngine(terminate)
    engine.load_state_dict(state)
    data = loader(size, sampler=sampler)
    return timed(lambda: engine.run(data))


def ours_permuted(size: int) -> tuple[float, float]:
    return ours(size, PermutationSampler(size))


def ignite(size: int) -> tuple[float, float]:
    from ignite.engine.deterministic import DeterministicEngine as Theirs

    engine = Theirs(terminate)
    batches = -(-size // BATCH)
    engine.load_state_dict(
        {"iteration": batches // 2, "epoch_length": batches, "max_epochs": 1, "rng_states": None}
    )
    data = loader(size)
    return timed(lambda: engine.run(data))


def torchdata(size: int) -> tuple[float, float]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = loader(size, StatefulDataLoader)
    data.load_state_dict(torchdata_state(size))
    return timed(lambda: next(iter(data)))


def torchdata_state(size: int) -> Any:
    """A state of the middle of a long epoch, made from one of a short one's."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = loader(4 * BATCH, StatefulDataLoader)
    iterator = iter(data)
    next(iterator)
    state, half = data.state_dict(), -(-size // BATCH) // 2
    return _moved(state, {1: half, BATCH: half * BATCH})


def _moved(state: Any, places: dict[int, int]) -> Any:
    """The state with its counts of batches and of samples exchanged."""
    if isinstance(state, dict):
        return {
            key: places.get(value, value) if "yielded" in key else _moved(value, places)
            for key, value in state.items()
        }
    return state


def plain(size: int) -> tuple[float, float]:
    data = loader(size)
    return timed(lambda: next(iter(data)))


JOBS: dict[str, Callable[[int], tuple[float, float]]] = {
    "crosstrain, shuffle": ours,
    "crosstrain, PermutationSampler": ours_permuted,
    "pytorch-ignite, shuffle": ignite,
    "torchdata, shuffle": torchdata,
    "plain torch, a fresh epoch": plain,
}


def measure(name: str, size: int) -> Row:
    torch.set_num_threads(1)
    for _ in range(5):
        # What a first call loads, on little data.
        JOBS[name](1000)
    seconds, added = JOBS[name](size)
    return Row(name, size, seconds, peak_memory(), added)


def best_of(name: str, size: int, repeat: int) -> Row:
    """The fastest of a few processes: the machine may be busy."""
    rows: list[Row] = []
    for _ in range(repeat):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(measure, (name, size)))
    return min(rows, key=lambda row: row.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="processes a row (default: 3)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="numbers of samples")
    args = parser.parse_args()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, batches of {BATCH}, "
        "resumed at 50 % of the epoch\n"
    )
    print(f"{'':32}{'N':>13}{'first batch':>14}{'peak':>12}{'added':>12}{'x ours':>9}")
    for size in args.sizes:
        own = 0.0
        for name in JOBS:
            row = best_of(name, size, args.repeat)
            own = own or row.seconds
            show(row, f"{row.seconds / own:.2f}")
        print()
    show(best_of("crosstrain, PermutationSampler", 10**10, args.repeat), "")


def show(row: Row, ratio: str) -> None:
    print(
        f"{row.name:32}{row.size:>13}{row.seconds * 1e3:>11.2f} ms{row.peak:>8.0f} MiB"
        f"{row.added:>8.0f} MiB{ratio:>9}"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
