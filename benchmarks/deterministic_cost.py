"""What deterministic data costs: microseconds that a batch takes more than from the plain loader.

Run ``python benchmarks/deterministic_cost.py``. An engine with a step that does nothing runs over a
`DataLoader`, at two batch sizes, and beside it a plain `Engine`: the difference is what the main
process and the workers pay together. A small batch shows what is paid for each batch, a large one
what is paid for each sample. Beside it: what pytorch-ignite's and torchdata's deterministic ways
cost over their own plain ones. They key no random stream.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import DeterministicEngine, Engine

SMALL, LARGE = 8, 256


class Rows(Dataset[torch.Tensor]):
    """Rows of a tensor: what a sample costs is not their fetching."""

    def __init__(self, size: int) -> None:
        self.rows = torch.arange(size * 4.0).view(size, 4)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


def loader(batch: int, batches: int, workers: int, kind: Any = DataLoader) -> Any:
    return kind(
        Rows(batch * batches),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
    )


def nothing(engine: Any, batch: Any) -> None:
    """A step that does nothing."""


def cpu_seconds() -> float:
    """Gives the processor time of this process and of its workers that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def per_batch(run: Callable[[Any], None], data: Any) -> float:
    """Returns microseconds a batch, of the processor: the clock would tell how busy it is."""
    started = cpu_seconds()
    run(data)
    return (cpu_seconds() - started) / len(data) * 1e6


def engine_run(make: Callable[[], Any]) -> Callable[[Any], None]:
    """Returns a run of one epoch."""
    return lambda data: make()(nothing).run(data, max_epochs=1)


def loop_run(data: Any) -> None:
    """Loops over a loader."""
    for _ in data:
        pass


def only(*streams: str) -> Callable[[], Any]:
    return lambda: lambda step: DeterministicEngine(step, seed=1, streams=streams)


def ignite_engines() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from ignite.engine import Engine as Plain
    from ignite.engine.deterministic import DeterministicEngine as Deterministic

    return lambda: Plain, lambda: Deterministic


def pairs() -> dict[str, tuple[Any, Any, Any, Any]]:
    """By name: a plain way and a deterministic way to run, with the loaders they run over."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    plain, theirs = ignite_engines()
    ours = engine_run(lambda: Engine)
    return {
        "crosstrain, all three": (
            ours,
            engine_run(only("python", "numpy", "torch")),
            DataLoader,
            DataLoader,
        ),
        "crosstrain, torch only": (ours, engine_run(only("torch")), DataLoader, DataLoader),
        "crosstrain, none": (ours, engine_run(only()), DataLoader, DataLoader),
        "pytorch-ignite": (engine_run(plain), engine_run(theirs), DataLoader, DataLoader),
        "torchdata": (loop_run, loop_run, DataLoader, StatefulDataLoader),
    }


class Cost(NamedTuple):
    """Microseconds a batch: of the plain way, and what the other takes more."""

    plain: float
    best: float
    median: float


def compare(pair: tuple[Any, ...], batch: int, batches: int, workers: int, repeat: int) -> Cost:
    """Compares two ways to run, which take turns: the machine may be busy.

    Returns:
        The least of the plain way, by how much the other's least is above it, and the median of
        the differences.
    """
    plain, other, plain_kind, other_kind = pair
    times: list[tuple[float, float]] = []
    for _ in range(repeat):
        one = per_batch(plain, loader(batch, batches, workers, plain_kind))
        two = per_batch(other, loader(batch, batches, workers, other_kind))
        times.append((one, two))
    plain_best, best = (min(column) for column in zip(*times, strict=True))
    return Cost(plain_best, best - plain_best, statistics.median(two - one for one, two in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=9, help="runs of each (default: 9)")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}; microseconds (CPU)\n")
    print(
        f"{'':26}{'workers':>8}{f'batch of {SMALL}':>13}{f'batch of {LARGE}':>14}{'a sample':>10}"
    )
    for (name, pair), workers in itertools.product(pairs().items(), args.workers):
        small = compare(pair, SMALL, 2000, workers, args.repeat)
        large = compare(pair, LARGE, 200 if workers == 0 else 500, workers, args.repeat)
        print(
            f"{name:26}{workers:>8}{small.best:>+13.1f}{large.best:>+14.1f}"
            f"{large.best / LARGE:>+10.2f}    (median {small.median:+.1f}, {large.median:+.1f}; "
            f"plain: {small.plain:.0f}, {large.plain:.0f})"
        )


if __name__ == "__main__":
    main()
