"""Our training step on XLA beside the same torch_xla loop written by hand: time a step.

Run it with torch_xla installed: ``PJRT_DEVICE=CPU python benchmarks/xla_step.py``. Prints, for
each, the median over rounds of the mean time of a step, and the median of the rounds' ratios: what
disturbs the machine disturbs both runs of a round alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from crosstrain import backends
from crosstrain.engine import create_supervised_trainer

LOSS = torch.nn.functional.cross_entropy


def make_model(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, width),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(width, 10),
    )


def make_data(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(64, 64, generator=generator), torch.randint(10, (64,), generator=generator))
        for _ in range(count)
    ]


def by_hand(width: int) -> Callable[[Any], None]:
    import torch_xla

    device = torch_xla.device()
    model = make_model(width).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run(data: Any) -> None:
        model.train()
        for x, y in data:
            optimizer.zero_grad()
            loss = LOSS(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            torch_xla.sync()
        torch_xla.core.xla_model.wait_device_ops()

    return run


def by_us(width: int) -> Callable[[Any], None]:
    import torch_xla

    model = make_model(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    backend = backends.get("xla").open()
    trainer = create_supervised_trainer(model, optimizer, LOSS, backend=backend)

    def run(data: Any) -> None:
        trainer.run(data, max_epochs=1)
        torch_xla.core.xla_model.wait_device_ops()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
    data = make_data(arguments.steps)
    runs = {"by hand": by_hand(arguments.width), "crosstrain": by_us(arguments.width)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(data[:20])  # compiles
    for number in range(arguments.rounds):
        # In turns, and each first in half of the rounds: the machine's speed drifts.
        for name in sorted(runs, reverse=bool(number % 2)):
            start = time.perf_counter()
            runs[name](data)
            times[name].append((time.perf_counter() - start) / len(data) * 1e3)
    for name, found in times.items():
        print(f"{name:12} {statistics.median(found):.3f} ms a step (from {min(found):.3f})")
    ratios = [b / a for a, b in zip(times["by hand"], times["crosstrain"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratio        {middle:.3f} (half of the rounds between {low:.3f} and {high:.3f})")


if __name__ == "__main__":
    main()
