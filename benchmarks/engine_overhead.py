"""What an iteration costs where the step does nothing: our engine, peers and a bare loop.

Run ``python benchmarks/engine_overhead.py``. All take turns, round by round, in one process, and
what is taken is the processor's time of this thread: a busy machine is busy for all of them, so
trust the ratios. Each goes over a list of 1,000 numbers again and again with a function that
returns a constant, with no handler, with five that do nothing, and with one and five of
``every=100``, all at the end of the iteration. The cost of starting a run is paid once and shared
by all its iterations. A peer that is not installed is left out, and named:
``pip install 'crosstrain[bench]'`` installs them.
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

EPOCH = 1000
DATA = list(range(EPOCH))
# ignite's time over ours: at least this, by how handlers are attached.
TARGETS = {"no handler": 18.0, "5 handlers": 10.0}
# How many handlers, and the options of their event.
HANDLERS: dict[str, tuple[int, dict[str, int]]] = {
    "no handler": (0, {}),
    "5 handlers": (5, {}),
    "1 with every=100": (1, {"every": 100}),
    "5 with every=100": (5, {"every": 100}),
}

# Runs some epochs with some handlers and their event's options.
Contestant = Callable[[int, int, dict[str, int]], object]


def step(engine: Any, batch: Any) -> int:
    return 1


def handler(engine: Any) -> None:
    pass


def bare(epochs: int, handlers: int, options: dict[str, int]) -> object:
    """A loop that calls the step and the handlers, and counts for ``every``."""
    listeners, every = [handler] * handlers, options.get("every", 1)
    iteration = 0
    for _ in range(epochs):
        for batch in DATA:
            step(None, batch)
            iteration += 1
            for listener in listeners:
                if iteration % every == 0:
                    listener(None)
    return iteration


def bare_without_handlers(epochs: int) -> object:
    for _ in range(epochs):
        for batch in DATA:
            step(None, batch)
    return None


def run_bare(epochs: int, handlers: int, options: dict[str, int]) -> object:
    return bare(epochs, handlers, options) if handlers else bare_without_handlers(epochs)


def crosstrain(epochs: int, handlers: int, options: dict[str, int]) -> object:
    from crosstrain.engine import Engine, Events

    engine = Engine(step)
    event: Any = Events.ITERATION_COMPLETED
    for _ in range(handlers):
        engine.add_event_handler(event(**options) if options else event, handler)
    return engine.run(DATA, max_epochs=epochs)


def ignite(epochs: int, handlers: int, options: dict[str, int]) -> object:
    from ignite.engine import Engine, Events

    engine = Engine(step)
    event: Any = Events.ITERATION_COMPLETED
    for _ in range(handlers):
        engine.add_event_handler(event(**options) if options else event, handler)
    return engine.run(DATA, max_epochs=epochs)


def lightning(epochs: int, handlers: int, options: dict[str, int]) -> object:
    """Lightning's Trainer, in its mode for measuring overhead, with callbacks for handlers."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    every = options.get("every", 1)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            step(self, batch)

        def configure_optimizers(self) -> None:
            return None

    class Listener(Callback):
        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            if (index + 1) % every == 0:
                handler(trainer)

        @property
        def state_key(self) -> str:
            return str(id(self))

    class Data:
        # Lightning takes a list for several loaders.
        def __iter__(self) -> Iterator[int]:
            return iter(DATA)

        def __len__(self) -> int:
            return EPOCH

    # Its import sets the level of its loggers.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        barebones=True,
        callbacks=[Listener() for _ in range(handlers)],
    )
    return trainer.fit(Module(), Data())


# The name in the table, the contestant, the distribution it needs, and what share of the epochs it
# runs: the slow ones need fewer for the same precision.
CONTESTANTS: list[tuple[str, Contestant, str, float]] = [
    ("bare loop", run_bare, "crosstrain", 1.0),
    ("crosstrain", crosstrain, "crosstrain", 1.0),
    ("ignite", ignite, "pytorch-ignite", 0.1),
    ("Lightning Trainer", lightning, "lightning", 0.01),
]

Times = dict[tuple[str, str], list[float]]


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(contestants: list[tuple[str, Contestant, float]], rounds: int, epochs: int) -> Times:
    """Gives the microseconds an iteration of each contestant, by handlers, in each round."""
    times: Times = {}
    for number in range(rounds + 1):
        for kind, (handlers, options) in HANDLERS.items():
            for name, contestant, share in contestants:
                turns = max(1, round(epochs * share))
                start = time.thread_time()
                contestant(turns, handlers, options)
                taken = (time.thread_time() - start) / (turns * EPOCH) * 1e6
                if number:  # the first round warms up
                    times.setdefault((kind, name), []).append(taken)
    return times


def report(times: Times) -> dict[str, float]:
    """Prints the table; returns ignite's time over ours, by handlers, where both were measured."""
    print(f"\n{'':<18}{'':<20}{'least µs':>10}{'median µs':>11}{'over ours':>11}")
    ratios: dict[str, float] = {}
    last = ""
    for (kind, name), values in sorted(times.items(), key=_order):
        ours = times[kind, "crosstrain"]
        ratio = statistics.median(value / base for value, base in zip(values, ours, strict=True))
        if name == "ignite":
            ratios[kind] = ratio
        print(
            f"{'' if kind == last else kind:<18}{name:<20}{min(values):>10.3f}"
            f"{statistics.median(values):>11.3f}{ratio:>11.2f}"
        )
        last = kind
    return ratios


def _order(item: tuple[tuple[str, str], list[float]]) -> tuple[int, int]:
    kinds, names = list(HANDLERS), [name for name, *_ in CONTESTANTS]
    kind, name = item[0]
    return kinds.index(kind), names.index(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument(
        "--epochs", type=int, default=200, help="of 1,000 iterations, a turn (default 200)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 below the targets")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"Python {platform.python_version()}")
    contestants: list[tuple[str, Contestant, float]] = []
    for name, contestant, distribution, share in CONTESTANTS:
        version = installed(distribution)
        if version is None:
            print(f"{name}: {distribution} is not installed; left out")
            continue
        print(f"{name}: {distribution} {version}")
        contestants.append((name, contestant, share))
    ratios = report(measure(contestants, options.rounds, options.epochs))
    print()
    missed = False
    for kind, target in TARGETS.items():
        if kind not in ratios:
            print(f"ignite over crosstrain, {kind}: not measured")
            continue
        verdict = "met" if ratios[kind] >= target else "missed"
        missed |= ratios[kind] < target
        print(f"ignite over crosstrain, {kind}: {ratios[kind]:.1f}; target {target:.0f}: {verdict}")
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
