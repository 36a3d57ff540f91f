"""What logical shards cost, beside DistributedDataParallel and beside micro-batches by hand.

Run ``python benchmarks/elastic.py``. For each case it starts torchrun with itself, several times.
There two trainings take turns in the same processes, one iteration each, with the same model,
optimizer and data, so that what else a busy machine does falls on both:

- S = W = 2: one pass for each process, beside DistributedDataParallel;
- S = 8 on 1 and on 2 processes, beside the same 8 micro-batches accumulated by hand, which
  DistributedDataParallel shares once, after the last.

Ratios are medians over all iterations, each of ours over the one by hand next to it; the bounds
hold the true median with 95 % probability. They are told for the wall's clock and for rank 0's CPU
time, which other programs disturb less. Then each of the programs trains a large model in processes
of its own, and the most memory that one held is told, in sizes of the model's parameters, above
what it held before the first step.
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
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import Events, create_supervised_trainer

#: (shards, processes, the most that the ratio may be)
CASES = ((2, 2, 1.10), (8, 1, 1.05), (8, 2, 1.05))
EACH = 32  # samples of a shard, and of a micro-batch
WARM = 3  # iterations that are not timed
WAYS = ("shards", "by hand")


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


def by_hand(model: Any, loader: Any, shards: int, size: int) -> Iterator[None]:
    """Train by hand; stop after each step of the optimizer."""
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
            (nn.functional.cross_entropy(model(x), y) / each).backward()
        if last:
            optimizer.step()
            yield


def in_shards(model: Any, shards: int) -> Any:
    """Give a trainer in logical shards."""
    return create_supervised_trainer(
        model,
        optimizer_of(model),
        nn.functional.cross_entropy,
        backend="cpu",
        deterministic=True,
        shards=shards,
    )


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


def turns(shards: int, size: int, iterations: int) -> list[list[float]]:
    """Give, for each iteration, seconds of both: by clock and by CPU, of ours and by hand."""
    other = by_hand(network(), loader_of("by hand", shards, size, WARM + iterations), shards, size)
    trainer = in_shards(network(), shards)
    found: list[list[float]] = []
    began = [0.0, 0.0]

    def now() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    def together() -> None:
        if size > 1:
            distributed.barrier()

    @trainer.on(Events.ITERATION_COMPLETED)
    def take_turns() -> None:
        ours = [late - early for late, early in zip(now(), began, strict=True)]
        together()
        began[:] = now()
        next(other)
        by_hand = [late - early for late, early in zip(now(), began, strict=True)]
        found.append([*ours, *by_hand])
        together()
        began[:] = now()

    trainer.run(loader_of("shards", shards, size, WARM + iterations))
    return found[WARM:]


def most_memory(way: str, shards: int, size: int) -> float:
    model = large()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loader = loader_of(way, shards, size, 3)
    if way == "shards":
        in_shards(model, shards).run(loader)
    else:
        list(by_hand(model, loader, shards, size))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    return most * 1024 / sum(p.numel() * p.element_size() for p in model.parameters())


def child(args: Any) -> None:
    torch.set_num_threads(1)
    size, shards = int(os.environ.get("WORLD_SIZE", "1")), args.shards
    if size > 1:
        distributed.init_process_group("gloo")
    told: Any = (
        most_memory(args.memory, shards, size)
        if args.memory
        else turns(shards, size, args.iterations)
    )
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
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result is not None:
        child(args)
        return
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread a process")
    told = ["--iterations", str(args.iterations)]
    for shards, size, most in CASES if args.starts else ():
        found = [
            one for _ in range(args.starts) for one in start(size, "--shards", str(shards), *told)
        ]
        ours, theirs = (statistics.median(one[at] for one in found) * 1e3 for at in (0, 2))
        ratios = [
            "{:.3f} ({:.3f} to {:.3f})".format(*bounds([one[at] / one[at + 2] for one in found]))
            for at in (0, 1)
        ]
        print(
            f"S = {shards}, W = {size}: {ours:.1f} ms, by hand {theirs:.1f} ms, ratio {ratios[0]}, "
            f"of CPU time {ratios[1]}; at most {most}; load {os.getloadavg()[0]:.1f}",
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
