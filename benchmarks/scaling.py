"""Samples a second in one process and in several, beside a DistributedDataParallel loop by hand.

Run ``python benchmarks/scaling.py``. For each number of processes it starts torchrun with itself;
there both take turns, round by round, in the same processes, with the same model, data, optimizer
and batch for each process; and it does so several times over, since two starts of the same programs
differ by more than their rounds do. The clock starts at the third loss of a turn, when
DistributedDataParallel has settled on its buckets, and stops at the last. The
ratios are medians over the rounds, each a turn of ours over the turn by hand next to it: of the
wall's clock, and of the processor's, which does not count what other programs of a busy machine
take (nor what a process waits for). Between the two stand the bounds that hold the true median with
95 % probability, from the order of the rounds' ratios: where they are wide, take more rounds. The
last column is the ratio of the fastest turns.

The rows: by hand, with a DistributedSampler; a trainer with the same sampler; and a trainer with
``deterministic=True``, which deals the batches out and sets three random generators for each
sample, so that the run resumes bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from crosstrain.engine import create_supervised_trainer

TARGET = 1.03
EACH, SAMPLES = 32, 4096  # samples of a batch for each process, and of the data


class Clock:
    """Times a training from within: a loss function that notes its third call and its last.

    Args:
        iterations: how many to time.
    """

    def __init__(self, iterations: int) -> None:
        self.iterations, self.calls = iterations, iterations + 3
        self.left = self.calls
        self.wall = self.processor = 0.0

    def __call__(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """Give the cross entropy of predictions, shape (n, classes), and classes, shape (n,)."""
        now = time.perf_counter(), time.process_time()
        self.left -= 1
        if self.left == self.iterations:
            self.wall, self.processor = now
        if self.left == 0:
            self.wall, self.processor = now[0] - self.wall, now[1] - self.processor
        return nn.functional.cross_entropy(y_pred, y)

    def milliseconds(self) -> tuple[float, float]:
        """Give the mean time of an iteration: on the wall's clock, and the processor's."""
        assert self.left == 0
        return self.wall / self.iterations * 1e3, self.processor / self.iterations * 1e3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def by_hand(data: TensorDataset, clock: Clock, size: int) -> None:
    model: Any = network()
    if size > 1:
        model = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    sampler: Any = DistributedSampler(data, size, distributed.get_rank() if size > 1 else 0)
    loader, left = DataLoader(data, EACH, sampler=sampler, drop_last=True), clock.calls
    model.train()
    epoch = 0
    while left:
        sampler.set_epoch(epoch)
        epoch += 1
        for x, y in loader:
            optimizer.zero_grad()
            loss = clock(model(x), y)
            loss.backward()
            optimizer.step()
            left -= 1
            if not left:
                break


def plain(data: TensorDataset, clock: Clock, size: int) -> None:
    model = network()
    trainer = create_supervised_trainer(model, optimizer_of(model), clock, backend="cpu")
    sampler: Any = DistributedSampler(data, size, distributed.get_rank() if size > 1 else 0)
    loader = DataLoader(data, EACH, sampler=sampler, drop_last=True)
    trainer.run(loader, max_iters=clock.calls)


def exact(data: TensorDataset, clock: Clock, size: int) -> None:
    model = network()
    trainer = create_supervised_trainer(
        model, optimizer_of(model), clock, backend="cpu", deterministic=True
    )
    loader = DataLoader(data, EACH * size, shuffle=True, drop_last=True)
    trainer.run(loader, max_iters=clock.calls)


Training = Callable[[TensorDataset, Clock, int], None]
CONTESTANTS: dict[str, Training] = {
    "by hand": by_hand,
    "crosstrain": plain,
    "crosstrain, exact": exact,
}


def take_turns(rounds: int, iterations: int, file: Path) -> None:
    """What each process of a world does; rank 0 writes the times."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(SAMPLES, 3, 32, 32, generator=generator)
    data = TensorDataset(images, torch.arange(SAMPLES) % 10)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTESTANTS}
    names = list(CONTESTANTS)
    for number in range(rounds + 1):
        # Whoever comes first in a round may have it harder: each is so as often as the others.
        for name in names[number % 3 :] + names[: number % 3]:
            if size > 1:
                distributed.barrier()
            clock = Clock(iterations)
            CONTESTANTS[name](data, clock, size)
            if number:  # the first round warms up
                times[name].append(clock.milliseconds())
    if size == 1 or distributed.get_rank() == 0:
        file.write_text(json.dumps(times))
    if size > 1:
        distributed.destroy_process_group()


def measure(size: int, rounds: int, iterations: int) -> dict[str, list[list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        command = [sys.executable]
        if size > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(size)]
        command += [__file__, "--file", str(file), "--rounds", str(rounds)]
        command += ["--iterations", str(iterations)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        times: dict[str, list[list[float]]] = json.loads(file.read_text())
    return times


def bounds(ratios: list[float]) -> tuple[float, float]:
    """Give the bounds that hold the median with 95 % probability, whatever the distribution."""
    ordered, half = sorted(ratios), 0.98 * math.sqrt(len(ratios))
    last = len(ratios) - 1
    low, high = math.floor(len(ratios) / 2 - half), math.ceil(len(ratios) / 2 + half)
    return ordered[max(0, low)], ordered[min(last, high)]


def report(size: int, starts: list[dict[str, list[list[float]]]]) -> float:
    """Prints a table and returns the ratio of our plain step to the one by hand."""
    print(f"\n{size} processes" if size > 1 else "\n1 process")
    print(
        f"{'':<20}{'ms a step':>11}{'samples/s':>11}{'over by hand':>14}{'95 %':>16}"
        f"{'processor':>11}{'of least':>10}"
    )
    medians: dict[str, float] = {}
    times = {name: [one for start in starts for one in start[name]] for name in CONTESTANTS}
    for name, values in times.items():
        pairs = list(zip(values, times["by hand"], strict=True))
        ratios = [mine[0] / theirs[0] for mine, theirs in pairs]
        medians[name] = statistics.median(ratios)
        between = "{:.3f} to {:.3f}".format(*bounds(ratios))
        processor = statistics.median(mine[1] / theirs[1] for mine, theirs in pairs)
        wall = statistics.median(value[0] for value in values)
        samples = EACH * size / wall * 1e3
        least = min(value[0] for value in values) / min(value[0] for value in times["by hand"])
        print(
            f"{name:<20}{wall:>11.2f}{samples:>11.0f}{medians[name]:>14.3f}{between:>16}"
            f"{processor:>11.3f}{least:>10.3f}"
        )
    return medians["crosstrain"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--starts", type=int, default=6, help="of the processes (default 6)")
    parser.add_argument("--rounds", type=int, default=20, help="turns a start (default 20)")
    parser.add_argument("--iterations", type=int, default=10, help="of a turn (default 10)")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {TARGET}")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file is not None:
        take_turns(options.rounds, options.iterations, options.file)
        return 0
    print(f"Python {platform.python_version()}, torch {torch.__version__}, gloo, 1 thread each")
    worst = 0.0
    for size in options.processes:
        starts = [measure(size, options.rounds, options.iterations) for _ in range(options.starts)]
        worst = max(worst, report(size, starts))
    met = worst <= TARGET
    verdict = "met" if met else "missed"
    print(f"\ncrosstrain over by hand: at most {worst:.3f}; target {TARGET}: {verdict}")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
