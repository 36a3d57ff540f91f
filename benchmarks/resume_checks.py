"""What a resume that proves itself costs: as a state is written, is loaded, and goes on.

    python benchmarks/resume_checks.py [--megabytes 400] [--rounds 7] [--folder DIR]

Printed are: the digest of the last batch, for a batch of 1 MB, also as a part of a save; looking
through what the step and handlers refer to; reading objects back, as a part of the load; and how
many batches a resume fetches beyond those that it trains on. Least of all rounds; the two loads are
taken in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import World
from crosstrain.engine import Checkpoint, Checks, DeterministicEngine, DiskSaver, Events
from crosstrain.engine.data.batch_before import hold, record

WIDTH = 2048


class Counted(Dataset[Any]):
    """Samples of 32 KB, which counts how many were fetched."""

    def __init__(self) -> None:
        # No list, which would be a part of the trainer's state.
        self.fetched: deque[int] = deque()

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> torch.Tensor:
        self.fetched.append(index)
        return torch.full((8192,), float(index)) + torch.rand(8192)


def objects(megabytes: int) -> dict[str, Any]:
    """Returns a perceptron and its AdamW; with the optimizer's state so many megabytes in all."""
    layers = max(1, round(megabytes * 2**20 / 3 / 4 / WIDTH**2))
    model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def least(function: Callable[[], Any], rounds: int) -> float:
    """Returns the least time of a function's calls, in seconds."""
    times: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def engine(checks: Checks | None = None) -> DeterministicEngine:
    """Returns a trainer whose step and handlers refer to some things."""
    seen: list[float] = []
    made = DeterministicEngine(
        lambda engine, batch: float(batch.sum()), seed=1, checks=checks or Checks()
    )
    made.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(made.state.output))
    return made


def resume(folder: Path) -> tuple[int, int]:
    """Returns how many samples a resumed run fetches beyond its own, and the batch size."""
    first = engine()
    loader = DataLoader(Counted(), 8, shuffle=True)
    states: dict[int, Any] = {}
    first.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: states.update({first.state.iteration: first.state_dict()}),
    )
    first.run(loader, max_epochs=1)
    second, data = engine(), Counted()
    second.load_state_dict(states[5])
    second.run(DataLoader(data, 8, shuffle=True), max_epochs=1)
    return len(data.fetched) - 7 * 8, 8


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rounds = options.rounds

    held = hold(torch.rand(8, 32768))
    digest = least(lambda: record(held, list(range(8)), World(0, 0, 1)), 20 * rounds)
    trainer = engine()
    trainer.run(DataLoader(Counted(), 8), max_epochs=1)
    everything = least(trainer.state_dict, 20 * rounds)
    trainer.checks = Checks(unnamed="off")
    looked = everything - least(trainer.state_dict, 20 * rounds)

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        to_save = objects(options.megabytes)
        saver = DiskSaver(name, require_empty=False)
        save = Checkpoint(to_save, saver, n_saved=1, global_step_transform=lambda *_: next(steps))
        steps = iter(range(10**6))
        took = least(lambda: save(trainer), max(2, rounds // 2))
        path = next(Path(name).glob("*.pt"))
        loads: dict[str, float] = {}
        for _ in range(rounds):
            for strictness in ("off", "error"):
                checks = Checks(read_back=strictness)  # type: ignore[arg-type]
                taken = least(lambda c=checks: Checkpoint.load_objects(to_save, path, checks=c), 1)
                loads[strictness] = min(taken, loads.get(strictness, taken))
    more, size = resume(options.folder)
    back = loads["error"] - loads["off"]
    print(f"digest of a batch of 1 MB: {1e3 * digest:.2f} ms, {digest / took:.2%} of a save")
    print(f"a save of {options.megabytes} MB: {took:.2f} s")
    print(
        f"a trainer's state: {1e3 * everything:.2f} ms, of that looked through {1e3 * looked:.2f}"
    )
    print(
        f"a load: {loads['off']:.3f} s; read back besides: {back:.3f} s, {back / loads['off']:.0%}"
    )
    print(f"a resume fetched {more} samples more, at {size} a batch")


if __name__ == "__main__":
    main()
