"""A program for torchrun: what each process of a world is given of the data, and what it learns.

It is started with 2 processes, then 1, then 4, on one folder: each start goes on from the states
that the one before has saved, and writes what happened to `<rank>-of-<size>.json`.
"""

from __future__ import annotations

import json
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler

from crosstrain.backends import get
from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    PermutationSampler,
    PerRank,
    ResumeWarning,
    create_supervised_trainer,
    current_sample,
    mean_over_ranks,
)

SAMPLES, BATCH, WINDOW, EPOCHS, SEED = 22, 5, 3, 2, 7
ITERATIONS = EPOCHS * math.ceil(SAMPLES / BATCH)
# Both in the middle of an accumulation window.
FIRST, SECOND = 2, 7


class Draws(Dataset[Any]):
    """Samples of 3 features, with a number that was drawn from each stream for them."""

    def __init__(self, size: int = SAMPLES) -> None:
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(1)).double()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        own = torch.rand((), generator=current_sample().torch())
        drawn = torch.stack([torch.rand(()), torch.tensor(random.random()), own]).double()
        drawn[0] += float(np.random.uniform())
        x = self.x[index] + 0.1 * drawn
        return x, x.sum().sin(), torch.tensor(index), drawn


class WholeBatches(Draws):
    """The same, fetched by whole batches, sample by sample."""

    def __getitems__(self, indices: Any) -> list[Any]:
        return [self[index] for index in indices]


class Lists(Dataset[Any]):
    """A dataset that is indexed by lists."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, indices: list[int]) -> Any:
        return torch.tensor(indices), torch.rand(len(indices))


class Uneven:
    """A user's batch sampler: batches of 1, 2, 3, ... samples, in an order of its own."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(SAMPLES).tolist()
        for size in range(1, 6):
            yield np.array(order[:size]) if size == 3 else tuple(order[:size])
            order = order[size:]

    def __len__(self) -> int:
        return 5


def collate_with_draws(samples: list[Any]) -> Any:
    """Adds what collating draws."""
    return *torch.utils.data.default_collate(samples), torch.rand(())


def loaders(kind: str) -> DataLoader[Any]:
    """The data of one kind; what they give is compared between worlds."""
    data = Draws()
    if kind == "permutation":
        return DataLoader(data, BATCH, sampler=PermutationSampler(data, seed=3))
    if kind == "workers":
        return DataLoader(data, BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    if kind == "getitems":
        return DataLoader(WholeBatches(), BATCH, shuffle=True, drop_last=True)
    if kind == "batch sampler":
        sampler: Any = Uneven()
        return DataLoader(data, batch_sampler=sampler)
    if kind == "lists":
        lists = BatchSampler(RandomSampler(range(SAMPLES)), BATCH, drop_last=False)
        return DataLoader(Lists(), batch_size=None, sampler=lists)
    if kind == "collate":
        return DataLoader(data, BATCH, collate_fn=collate_with_draws)
    assert kind == "large batch"
    large = Draws(5000)
    return DataLoader(large, 2100, sampler=PermutationSampler(large))


KINDS = "permutation", "workers", "getitems", "batch sampler", "lists", "collate", "large batch"


def given(engine: Any, batch: Any) -> list[Any]:
    """What this process has of a batch: indices and draws, or nothing of a placeholder."""
    if engine.share is not None and engine.share.samples == 0:
        return []
    index, drawn = (batch[2], batch[3]) if len(batch) > 2 else batch
    return [index.tolist(), drawn.tolist(), *(x.item() for x in batch[4:])]


def only_data(kind: str) -> list[Any]:
    """Goes through two passes of the data, and tells what this process was given."""
    told: list[Any] = []
    with get("cpu") as backend:
        engine = DeterministicEngine(
            lambda engine, batch: told.append(given(engine, batch)), backend, seed=SEED
        )
        engine.run(loaders(kind), max_epochs=2)
    return told


def split(batch: Any, device: Any, non_blocking: bool) -> Any:
    return batch[0], batch[1]


class Training:
    """A training whose batches, losses of the global batches, and end are told."""

    def __init__(self, loss_fn: Any = None, spec: str = "cpu") -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
        self.model.double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.trainer = create_supervised_trainer(
            self.model,
            self.optimizer,
            loss_fn or nn.functional.mse_loss,
            deterministic=True,
            gradient_accumulation_steps=WINDOW,
            prepare_batch=split,
            backend=spec,
        )
        self.losses: dict[int, float] = {}
        self.batches: dict[int, Any] = {}
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.tell)

    def tell(self, engine: Any) -> None:
        iteration = engine.state.iteration
        self.losses[iteration] = mean_over_ranks(engine).item()
        self.batches[iteration] = given(engine, engine.state.batch)

    def run(self, until: int | None = None) -> Training:
        """Trains; up to the end of an iteration, if one is given."""
        if until is not None:
            self.trainer.add_event_handler(
                Events.ITERATION_COMPLETED(once=until), lambda engine: engine.interrupt()
            )
        # The run's seed is drawn from it.
        torch.manual_seed(SEED)
        self.trainer.run(DataLoader(Draws(), BATCH, shuffle=True), max_epochs=EPOCHS)
        return self

    def save(self) -> dict[str, Any]:
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**states, "trainer": self.trainer.state_dict()}

    def load(self, states: Any) -> Training:
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.trainer.load_state_dict(states["trainer"])
        return self

    def told(self) -> dict[str, Any]:
        states: list[Any] = list(self.model.state_dict().values())
        # Each process has a part of a sharded one.
        whole = [
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in states
        ]
        weights = [value.flatten().tolist() for value in whole]
        return {"losses": self.losses, "batches": self.batches, "weights": weights}


def same_world() -> bool:
    """Whether a run that is resumed in as many processes ends with the same bits."""
    whole, begun = Training().run(), Training().run(FIRST)
    resumed = Training().load(begun.save()).run()
    return resumed.told()["weights"] == whole.told()["weights"]


def distributed_sampler() -> list[Any]:
    """What torch gives with a DistributedSampler, what the engine gives, and resumed."""
    data = Draws()
    sampler: Any = DistributedSampler(data, seed=3)
    expected: list[Any] = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected += list(BatchSampler(sampler, BATCH, drop_last=False))
    found: list[list[Any]] = [[], [], []]

    def make(rows: list[Any]) -> DeterministicEngine:
        engine = DeterministicEngine(
            lambda engine, batch: rows.append((batch[2].tolist(), batch[3].tolist())),
            get("cpu").open(),
            seed=SEED,
        )
        engine.add_event_handler(
            Events.EPOCH_STARTED, lambda engine: sampler.set_epoch(engine.state.epoch - 1)
        )
        return engine

    loader = DataLoader(data, BATCH, sampler=sampler)
    make(found[0]).run(loader, max_epochs=2)
    stopped = make(found[1])
    stopped.add_event_handler(Events.ITERATION_COMPLETED(once=4), stopped.terminate)
    stopped.run(loader, max_epochs=2)
    resumed = make(found[1])
    resumed.load_state_dict(stopped.state_dict())
    resumed.run(loader)
    return [expected, found[0], found[1]]


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        # The process's own, or, if another one was faster, what happened there.
        return str(error)
    return "no error"


def trainer_of(deterministic: bool, **more: Any) -> Engine:
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_supervised_trainer(
        *(model, optimizer, nn.functional.mse_loss),
        **{"deterministic": deterministic, "backend": "cpu", "prepare_batch": split, **more},
    )


def refusals(rank: int, size: int) -> dict[str, str]:
    """What goes wrong when data cannot be dealt out, or the processes differ."""
    data = Draws()
    batch = data.x[:2]
    plain, exact = trainer_of(False), trainer_of(True)
    other: Any = DistributedSampler(data, num_replicas=size + 1, rank=rank)
    seeded = DeterministicEngine(lambda engine, batch: None, exact.backend, seed=rank)
    own = PerRank([(torch.zeros(2, 3).double(), torch.zeros(2, 1).double())])
    return {
        "same data": error_of(lambda: plain.run(DataLoader(data, BATCH))),
        "list": error_of(lambda: exact.run([batch])),
        "list, plain": error_of(lambda: trainer_of(False).run([(batch, batch)])),
        "small": error_of(lambda: trainer_of(True).run(DataLoader(data, size - 1))),
        "single": error_of(lambda: trainer_of(True).run(DataLoader(data, batch_size=None))),
        "other": error_of(lambda: trainer_of(True).run(DataLoader(data, 1, sampler=other))),
        "seeds": error_of(lambda: seeded.run(DataLoader(data, BATCH))),
        "own": error_of(lambda: trainer_of(False).run(own)),
    }


def own_position(rank: int, size: int) -> str:
    """What another number of processes says to a position in data that was each one's own."""
    engine = DeterministicEngine(lambda engine, batch: None, get("cpu").open(), seed=SEED)
    engine.run(PerRank([1, 2, 3]), max_epochs=1)
    state = engine.state_dict()
    state["max_epochs"] = 2
    state["position"]["data"]["processes"] = size + 1
    again = DeterministicEngine(lambda engine, batch: None, engine.backend)
    again.load_state_dict(state)
    return error_of(lambda: again.run(PerRank([1, 2, 3])))


def streams() -> dict[str, Any]:
    """What the processes draw in training, what seed they have, what their own data is keyed by."""
    drawn: list[float] = []
    own: list[float] = []
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    with get("cpu") as backend:
        engine = DeterministicEngine(
            lambda engine, batch: drawn.append(torch.rand(()).item()), backend
        )
        engine.run(DataLoader(Draws(), BATCH, shuffle=True), max_epochs=1)
        seed = engine.state.seed

        def numbers() -> Iterator[float]:
            while True:
                yield torch.rand(()).item()

        engine = DeterministicEngine(lambda engine, batch: own.append(batch), backend, seed=SEED)
        engine.run(PerRank(numbers()), max_epochs=1, epoch_length=3)
    return {"drawn": drawn, "seed": seed, "own": own}


def placeholders(spec: str) -> dict[str, Any]:
    """The weights after a training in which whoever has a placeholder gets NaN for it."""
    training: Any = None

    def loss_fn(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.mse_loss(y_pred, y)
        share = training.trainer.share
        return loss * math.nan if share is not None and share.samples == 0 else loss

    training = Training(loss_fn, spec)
    told: dict[str, Any] = training.run().told()
    return told


def ended_within_window() -> Any:
    """The weights after a run that was ended in the middle of an accumulation window."""
    training = Training()
    training.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=WINDOW + 2), lambda engine: engine.terminate()
    )
    return training.run().told()["weights"]


def chain(folder: Path, size: int) -> Any:
    """Begins with two processes, goes on with one, ends with four."""
    now, until = {2: (None, FIRST), 1: ("of-2.pt", SECOND), 4: ("of-1.pt", None)}[size]
    training = Training()
    if now is not None:
        states = torch.load(folder / now, weights_only=True)
        training.load(states)
    training.run(until)
    # Rank 0 gets what differs on the others, such as the gradients of an open window.
    states = training.save()
    if training.trainer.backend.world.rank == 0:  # type: ignore[union-attr]
        torch.save(states, folder / f"of-{size}.pt")
    return training.told()


def main(folder: Path) -> None:
    # Resuming in another world says so.
    warnings.simplefilter("ignore", ResumeWarning)
    torch.set_num_threads(1)
    with get("cpu") as backend:
        rank, size = backend.world.rank, backend.world.size
        told: dict[str, Any] = {"course": Training().run().told(), "chain": chain(folder, size)}
        told["data"] = {kind: only_data(kind) for kind in KINDS}
        told["streams"], told["placeholders"] = streams(), placeholders("cpu")
        told["ended"] = ended_within_window()
        if size == 2:
            told["same world"] = same_world()
            told["distributed"] = distributed_sampler()
            told["own position"] = own_position(rank, size)
        if size > 1:
            told["sharded"] = placeholders("cpu:fsdp")
            told["refusals"] = refusals(rank, size)
        (folder / f"{rank}-of-{size}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
