"""A program for several processes: what they save together, where they are not alike."""

from __future__ import annotations

import functools
import json
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import get
from crosstrain.engine import (
    Checkpoint,
    DeterministicEngine,
    DiskSaver,
    Engine,
    Events,
    RankFailed,
    ResumableSource,
    agree,
    create_supervised_evaluator,
    create_supervised_trainer,
    resume_or_start,
)

ITERATIONS = 8


class Meter:
    """A mean of what this process has seen."""

    def __init__(self) -> None:
        self.value = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class Count(nn.Module):
    """A metric that is a module without parameters."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


class Average(nn.Module):
    """As of a model with batch norm: parameters that are alike, and buffers of this process's."""

    seen: torch.Tensor
    places: torch.Tensor

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("places", torch.arange(4)[rank::size], persistent=False)


class Part(nn.Linear):
    """A layer that knows its rank, and how many there are."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(4, 2)
        self.rank, self.size = rank, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * (1 + self.rank / self.size))


def training(rank: int, size: int = 2) -> tuple[Engine, dict[str, Any], Callable[[], list[float]]]:
    """Returns a trainer, its objects, of which some differ between ranks, and what they hold."""
    model = Part(rank, size)
    shown = torch.arange(6)[rank::size]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend="cpu", deterministic=True
    )
    trainer.state_dict_user_keys.append("average")
    state: Any = trainer.state
    state.average = 0.0
    meter, count, mean = Meter(), Count(), Average(rank, size)
    noise = torch.Generator().manual_seed(rank)
    drawn = [0.0]

    @trainer.on(Events.ITERATION_COMPLETED)
    def measure() -> None:
        loss = trainer.state.output
        meter.value += loss * len(shown)
        count.seen += loss
        mean.seen += loss
        state.average += loss
        drawn[0] = torch.rand(1, generator=noise).item()

    to_save = {"model": model, "optimizer": optimizer, "meters": [meter, count, mean]}
    to_save["noise"] = ResumableSource(noise)

    def held() -> list[float]:
        return [meter.value, count.seen.item(), mean.seen.item(), state.average, drawn[0]]

    return trainer, to_save, held


def loader() -> DataLoader[Any]:
    """Returns the data, the same in each process."""
    x = torch.randn(8 * ITERATIONS, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8, shuffle=True)


def own(folder: Path, rank: int) -> list[list[float]]:
    """A run that does not stop, and one that was stopped in the middle: what each rank holds."""
    told: list[list[float]] = []
    for name, ends in (("whole", [None]), ("parted", [5, None])):
        for end in ends:
            torch.manual_seed(1 if end != ends[-1] or name == "whole" else 2)
            trainer, to_save, held = training(rank)
            run = resume_or_start(trainer, to_save, folder / name, every=5, signals=())
            if end is not None:
                trainer.add_event_handler(
                    Events.ITERATION_COMPLETED(once=end), lambda t: t.terminate(goes_on=True)
                )
            trainer.run(loader(), max_epochs=1)
            run.checkpoint.wait()
        told.append(held())
    return told


def copied(folder: Path, rank: int) -> list[int]:
    """A second tier, which one process copies to, at other iterations than the first's."""
    trainer, to_save, _ = training(rank)
    at: list[int] = []
    tiers: dict[str, Any] = {"every": 3, "remote": f"file://{folder}/copies", "every_remote": 2}
    resume_or_start(trainer, to_save, folder / "disk", background=False, **tiers)
    trainer.add_event_handler(
        Checkpoint.SAVED_CHECKPOINT, lambda: at.append(trainer.state.iteration)
    )
    trainer.run(loader(), max_epochs=1)
    return at


def scored(folder: Path, rank: int) -> list[str]:
    """Each rank has evaluated another part: their scores differ, and one of them saves."""
    trainer, to_save, _ = training(rank)
    scores = iter([0.1, 0.2, 0.3, 0.4] if rank else [0.3, 0.4, 0.1, 0.2])
    handler = Checkpoint(
        {**to_save, "trainer": trainer},
        DiskSaver(folder / "best", create_dir=True),
        score_function=lambda _: next(scores),
        n_saved=1,
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    trainer.run(loader(), max_epochs=1)
    return [str(handler.state_dict()["_saved"])]


def named(folder: Path, rank: int) -> str:
    """One rank names an object that the other does not have."""
    trainer, to_save, _ = training(rank)
    if rank == 0:
        to_save["log"] = Meter()
    resume_or_start(trainer, to_save, folder / "named", every=2)
    try:
        trainer.run(loader(), max_epochs=1)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def evaluated(rank: int) -> int:
    """One rank evaluates the model that it shares the gradients of."""
    backend = get("cpu").open()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    shared, _ = backend.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    evaluator = create_supervised_evaluator(shared, backend=backend)
    if rank == 0:
        evaluator.run(loader())
    ones: Any = torch.ones(())
    module: Any = distributed
    module.all_reduce(ones)
    return int(ones.item())


def parted(folder: Path, rank: int) -> list[str]:
    """A schedule that has followed this rank's own loss: ranks step by other numbers."""
    trainer, to_save, _ = training(rank)
    to_save["optimizer"].param_groups[0]["lr"] = 0.1 * (1 + rank)
    handler = Checkpoint({**to_save, "trainer": trainer}, DiskSaver(folder / "p", create_dir=True))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(loader(), max_epochs=1)
    return [str(one.message) for one in caught]


def spread(folder: Path) -> list[bool]:
    """An optimizer whose state lies in both processes is saved whole, and loaded in parts."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    backend = get("cpu").open()

    def made() -> tuple[dict[str, Any], Any]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        shared = nn.parallel.DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(
            shared.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9
        )

        def step(engine: Engine, batch: Any) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(shared(batch[0]), batch[1]).backward()
            optimizer.step()

        trainer = DeterministicEngine(step, backend)
        return {"model": model, "optimizer": optimizer, "trainer": trainer}, optimizer

    objects, optimizer = made()
    handler = Checkpoint(objects, DiskSaver(folder / "zero", create_dir=True))
    objects["trainer"].add_event_handler(Events.ITERATION_COMPLETED, handler)
    objects["trainer"].run(loader(), max_epochs=1)
    again, loaded = made()
    Checkpoint.load_objects(again, Checkpoint.latest(folder / "zero"))
    before, after = (
        [one.optim.state[each] for each in one.optim.param_groups[0]["params"]]
        for one in (optimizer, loaded)
    )
    return [
        torch.equal(one["momentum_buffer"], other["momentum_buffer"])
        for one, other in zip(before, after, strict=True)
    ]


def unfrozen() -> list[str]:
    """A parameter that a handler unfreezes: its gradients are shared, or it is said that not."""
    told: list[str] = []
    for shards in (None, 2):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(
            model,
            optimizer,
            nn.functional.cross_entropy,
            backend="cpu",
            deterministic=True,
            shards=shards,
        )
        thaw = functools.partial(model[0].requires_grad_, True)
        trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda _, thaw=thaw: thaw())
        try:
            trainer.run(loader(), max_epochs=2)
        except (ValueError, RankFailed) as error:
            told.append(f"{trainer.state.iteration} {error}")
        else:
            told.append("nothing")
    return told


def alone(folder: Path) -> list[str]:
    """An engine that has not been told of the process group which the script has joined."""
    model = nn.Linear(4, 2)
    engine = DeterministicEngine(lambda engine, batch: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.state_dict()
    try:
        resume_or_start(engine, {"model": model}, folder / "alone", every=2)
    except ValueError as error:
        return [str(error), *(str(one.message) for one in caught)]
    return []


def apart(rank: int, state: bool) -> list[str]:
    """A rank waits for another in a collective operation; that one is, or saves, elsewhere."""
    module: Any = distributed
    group = module.new_group()
    # Not when it is made: to connect may take longer.
    module.distributed_c10d._set_pg_timeout(timedelta(seconds=1), group)
    engine = DeterministicEngine(lambda engine, batch: None, get("cpu").open())
    agree(engine)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def part() -> None:
        if rank == 1:
            module.all_reduce(torch.ones(()), group=group)
        elif state:
            engine.state_dict()
        else:
            time.sleep(2)

    try:
        engine.run(max_epochs=1, epoch_length=2000)
    except RuntimeError as error:
        return [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    return []


def main(folder: Path) -> None:
    """Does all of it and writes what came of it."""
    with get("cpu") as backend:
        rank, size = backend.world.rank, backend.world.size
        told = {
            "own": own(folder, rank),
            "copied": copied(folder, rank),
            "scored": scored(folder, rank),
            "named": named(folder, rank),
            "evaluated": evaluated(rank),
            "parted": parted(folder, rank),
            "spread": spread(folder),
            "unfrozen": unfrozen(),
            "alone": alone(folder),
            "apart": apart(rank, False),
            "apart from a state": apart(rank, True),
        }
    (folder / f"{rank}-of-{size}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
