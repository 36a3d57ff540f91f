"""What logical shards cost, beside DistributedDataParallel and beside micro-batches by hand.

Run ``python benchmarks/elastic.py``. For each case it starts torchrun with itself; there both take
turns, round by round, in the same processes, with the same model, optimizer and data:

- S = W = 2: one pass for each process, beside DistributedDataParallel;
- S = 8 on 1 and on 2 processes, beside the same 8 micro-batches accumulated by hand, which
  DistributedDataParallel shares once, after the last.

Ratios are medians over the rounds, each a turn of ours over the turn by hand next to it, of the
wall's clock; the bounds hold the true median with 95 % probability. Then each of the programs
trains a large model in processes of its own, and the most memory that one held is told, in sizes of
the model's parameters, above what it held before the first step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import create_supervised_trainer

#: (shards, processes, the most that the ratio may be)
CASES = ((2, 2, 1.10), (8, 1, 1.05), (8, 2, 1.05))
EACH = 32  # samples of a shard, and of a micro-batch


class Clock:
    """Times a training from within: a loss function that notes its calls.

    Args:
        iterations: how many to time, after three that are not.
        calls: how often it is called in each.
    """

    def __init__(self, iterations: int, calls: int) -> None:
        self.iterations, self.first = iterations, 3 * calls
        self.last = (3 + iterations) * calls
        self.calls, self.began, self.took = 0, 0.0, 0.0

    def __call__(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """Give the cross entropy of predictions, shape (n, classes), and classes, shape (n,)."""
        if self.calls == self.first:
            self.began = time.perf_counter()
        if self.calls == self.last:
            self.took = time.perf_counter() - self.began
        self.calls += 1
        return nn.functional.cross_entropy(y_pred, y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4096, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def large() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 4096), nn.ReLU(), nn.Linear(4096, 4096))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def by_hand(model: Any, clock: Any, loader: Any, shards: int, size: int) -> None:
    each = shards // size
    if size > 1:
        model = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    model.train()
    for number, (x, y) in enumerate(loader):
        if number % each == 0:
            optimizer.zero_grad()
        last = number % each == each - 1
        with nullcontext() if last or size == 1 else model.no_sync():
            (clock(model(x), y) / each).backward()
        if last:
            optimizer.step()


def in_shards(model: Any, clock: Any, loader: Any, shards: int, size: int) -> None:
    trainer = create_supervised_trainer(
        model, optimizer_of(model), clock, backend="cpu", deterministic=True, shards=shards
    )
    trainer.run(loader)


WAYS = {"by hand": by_hand, "shards": in_shards}


def loader_of(way: str, shards: int, size: int, iterations: int) -> Any:
    """Give a loader of global batches, or, by hand, of the process's micro-batches."""
    draws = torch.Generator().manual_seed(1)
    count = shards * EACH
    x = torch.randn(count, 3, 32, 32, generator=draws)
    data = TensorDataset(x, torch.randint(0, 10, (count,), generator=draws))
    if way == "shards":
        batches = [list(range(count))] * iterations
    else:
        rank, each = (distributed.get_rank() if size > 1 else 0), shards // size
        own = range(rank * each, (rank + 1) * each)
        batches = [list(range(s * EACH, (s + 1) * EACH)) for s in own] * iterations
    return DataLoader(data, batch_sampler=batches)  # type: ignore[arg-type]


def child(args: Any) -> None:
    torch.set_num_threads(1)
    size, shards = int(os.environ.get("WORLD_SIZE", "1")), args.shards
    if size > 1:
        distributed.init_process_group("gloo")
    if args.memory:
        model = large()
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loader = loader_of(args.memory, shards, size, 3)
        WAYS[args.memory](model, nn.functional.cross_entropy, loader, shards, size)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        told: Any = most * 1024 / parameters
    else:
        told = []
        for number in range(args.rounds):
            took: dict[str, float] = {}
            for way in sorted(WAYS, reverse=number % 2 == 0):
                clock = Clock(args.iterations, shards // size)
                loader = loader_of(way, shards, size, args.iterations + 4)
                if size > 1:
                    distributed.barrier()
                WAYS[way](network(), clock, loader, shards, size)
                took[way] = clock.took / args.iterations * 1e3
            told.append(took)
    if int(os.environ.get("RANK", "0")) == 0:
        args.result.write_text(json.dumps(told))


def start(size: int, *told: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(size), __file__, "--result", str(result), *told]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return json.loads(result.read_text())


def bounds(ratios: list[float]) -> tuple[float, float, float]:
    """Give the median and the bounds that hold the true one with 95 % probability."""
    ordered, count = sorted(ratios), len(ratios)
    away = math.ceil(0.98 * math.sqrt(count))
    middle = statistics.median(ordered)
    return middle, ordered[max(0, count // 2 - away)], ordered[min(count - 1, count // 2 + away)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result is not None:
        child(args)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread a process")
    told = ["--rounds", str(args.rounds), "--iterations", str(args.iterations)]
    for shards, size, most in CASES:
        found = start(size, "--shards", str(shards), *told)
        middle, low, high = bounds([one["shards"] / one["by hand"] for one in found])
        milliseconds = {way: statistics.median(one[way] for one in found) for way in WAYS}
        print(
            f"S = {shards}, W = {size}: {milliseconds['shards']:.1f} ms, by hand "
            f"{milliseconds['by hand']:.1f} ms, ratio {middle:.3f} ({low:.3f} to {high:.3f}), "
            f"at most {most}",
            flush=True,
        )
    for shards, size, _ in CASES:
        held = {way: start(size, "--shards", str(shards), "--memory", way) for way in WAYS}
        print(
            f"S = {shards}, W = {size}: memory, in sizes of the parameters: "
            f"{held['shards']:.1f}, by hand {held['by hand']:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
