"""What a training step costs: through our factory and through peers, over one written by hand.

Run ``python benchmarks/train_step.py``. All take turns, round by round, in one process, with the
same model, data and optimizer, on the CPU and one thread, and what is taken is the processor's time
of this thread: a busy machine is busy for all of them, so trust the ratios. The clock starts at the
first loss and stops at the last, so nothing counts but what is paid for each iteration. A peer that
is not installed is left out, and named: ``pip install 'crosstrain[bench]'`` installs them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

TARGET = 1.05

Batch = tuple[Tensor, Tensor]
# Trains a model over a list of batches with an optimizer and a loss, and returns nothing.
Training = Callable[[nn.Module, torch.optim.Optimizer, "Clock", list[Batch]], object]


class Clock:
    """Times a training from within: a loss function that notes its first call and its last.

    Args:
        calls: how often it will be called.
    """

    def __init__(self, calls: int) -> None:
        self.calls, self.left = calls, calls
        self.first = self.last = 0.0

    def __call__(self, y_pred: Tensor, y: Tensor) -> Tensor:
        """Give the mean squared error of predictions and targets of one shape."""
        if self.left == self.calls:
            self.first = time.thread_time()
        self.left -= 1
        if self.left == 0:
            self.last = time.thread_time()
        return nn.functional.mse_loss(y_pred, y)

    def microseconds(self) -> float:
        """Give the mean time from one call to the next."""
        assert self.left == 0
        return (self.last - self.first) / (self.calls - 1) * 1e6


def by_hand(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> Tensor:
    model.train()
    output = torch.zeros(())
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        output = loss.detach()
    return output


def ours(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> object:
    from crosstrain.engine import create_supervised_trainer

    return create_supervised_trainer(model, optimizer, loss_fn, backend="cpu").run(data)


def ours_with_handlers(
    model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]
) -> object:
    from crosstrain.engine import Events, StepEvents, create_supervised_trainer

    trainer = create_supervised_trainer(model, optimizer, loss_fn, backend="cpu")
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=100), lambda: None)
    return trainer.run(data)


def ignite(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> object:
    from ignite.engine import create_supervised_trainer

    return create_supervised_trainer(model, optimizer, loss_fn).run(data)


def fabric(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> object:
    from lightning.fabric import Fabric

    runner: Any = Fabric(accelerator="cpu", devices=1)
    model, optimizer = runner.setup(model, optimizer)
    model.train()
    output = torch.zeros(())
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        runner.backward(loss)
        optimizer.step()
        output = loss.detach()
    return output


def accelerate(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> object:
    from accelerate import Accelerator

    runner: Any = Accelerator(cpu=True)
    model, optimizer = runner.prepare(model, optimizer)
    model.train()
    output = torch.zeros(())
    for x, y in data:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        runner.backward(loss)
        optimizer.step()
        output = loss.detach()
    return output


def lightning(model: nn.Module, optimizer: Any, loss_fn: Clock, data: list[Batch]) -> object:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            return loss_fn(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer

    class Data:
        # Lightning takes a list for several loaders.
        def __iter__(self) -> Iterator[Batch]:
            return iter(data)

    # Its import sets the level of its loggers.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True)
    return trainer.fit(Module(), Data())


# The name in the table, the training, and the distribution that it needs.
CONTESTANTS: list[tuple[str, Training, str]] = [
    ("by hand", by_hand, "torch"),
    ("crosstrain", ours, "crosstrain"),
    ("crosstrain, 2 handlers", ours_with_handlers, "crosstrain"),
    ("ignite", ignite, "pytorch-ignite"),
    ("Fabric", fabric, "lightning"),
    ("Accelerate", accelerate, "accelerate"),
    ("Lightning Trainer", lightning, "lightning"),
]


def tiny() -> tuple[nn.Module, Batch]:
    return nn.Linear(4, 4), (torch.randn(8, 4), torch.randn(8, 4))


def small() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return model, (torch.randn(64, 64), torch.randn(64, 10))


MODELS = {"Linear(4,4)": tiny, "MLP 64-256-256-10, batch 64": small}


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    make: Callable[[], tuple[nn.Module, Batch]],
    contestants: list[tuple[str, Training]],
    rounds: int,
    iterations: int,
) -> dict[str, list[float]]:
    """Gives the microseconds an iteration of each contestant in each round."""
    times: dict[str, list[float]] = {name: [] for name, _ in contestants}
    for number in range(rounds + 1):
        for name, training in contestants:
            torch.manual_seed(0)
            model, batch = make()
            optimizer, clock = torch.optim.SGD(model.parameters(), lr=1e-3), Clock(iterations)
            training(model, optimizer, clock, [batch] * iterations)
            if number:  # the first round warms up
                times[name].append(clock.microseconds())
    return times


def report(title: str, times: dict[str, list[float]]) -> float:
    """Prints a table and returns the ratio of our step to the one by hand."""
    reference = times["by hand"]
    print(f"\n{title:<28}{'least µs':>10}{'median µs':>11}{'over by hand':>14}{'of least':>10}")
    ratios: dict[str, float] = {}
    for name, values in times.items():
        ratios[name] = statistics.median(
            value / base for value, base in zip(values, reference, strict=True)
        )
        least = min(values) / min(reference)
        print(
            f"{name:<28}{min(values):>10.1f}{statistics.median(values):>11.1f}"
            f"{ratios[name]:>14.3f}{least:>10.3f}"
        )
    return ratios["crosstrain"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25, help="turns of each (default 25)")
    parser.add_argument("--iterations", type=int, default=400, help="of a turn (default 400)")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 above {TARGET}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, 1 thread")
    contestants: list[tuple[str, Training]] = []
    for name, training, distribution in CONTESTANTS:
        version = installed(distribution)
        if version is None:
            print(f"{name}: {distribution} is not installed; left out")
            continue
        print(f"{name}: {distribution} {version}")
        contestants.append((name, training))
    worst = 0.0
    for title, make in MODELS.items():
        times = measure(make, contestants, options.rounds, options.iterations)
        worst = max(worst, report(title, times))
    met = worst <= TARGET
    verdict = "met" if met else "missed"
    print(f"\ncrosstrain over by hand: at most {worst:.3f}; target {TARGET}: {verdict}")
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
