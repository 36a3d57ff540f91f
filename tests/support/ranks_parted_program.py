"""A program for several processes: trainings in which they are not alike, stopped and resumed.

Each is run through, and once more in two parts by objects that are made anew; what each process has
in the end, and has been told, is written down.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import get
from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    create_supervised_trainer,
    resume_or_start,
)

ITERATIONS, EPOCHS = 4, 2
Made = tuple[Engine, dict[str, Any]]


class Network(nn.Module):
    """Its layers are used in another order than they are made, as gradients then come."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(33, 2), nn.Linear(4, 64)
        self.between = nn.Linear(64, 33)
        self.norm = nn.BatchNorm1d(64) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.between(x)))


class HookState:
    """What a communication hook of torch's keeps, to be named."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.names = [n for n in state.__slots__ if n not in ("process_group", "rng")]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.state, name) for name in self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.names:
            setattr(self.state, name, state[name])


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def stepped(model: Any, optimizer: Any, after: Callable[[Engine], None] | None = None) -> Any:
    """Returns a step by hand."""

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if after is not None:
            after(engine)
        return loss.item()

    return step


def average(tensors: Any) -> None:
    module: Any = distributed
    for one in tensors:
        module.all_reduce(one)
        one /= module.get_world_size()


def local_sgd(backend: Any) -> Made:
    """Each process trains a model of its own; now and then they take the mean. And an average."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ema = copy.deepcopy(model)

    def after(engine: Engine) -> None:
        with torch.no_grad():
            if engine.state.iteration % 3 == 0:
                average(model.parameters())
            for one, other in zip(ema.parameters(), model.parameters(), strict=True):
                one.lerp_(other, 0.2)

    trainer = DeterministicEngine(stepped(model, optimizer, after), backend)
    return trainer, {"model": model, "optimizer": optimizer, "ema": ema}


def own_statistics(backend: Any) -> Made:
    """Gradients are shared by hand, and those of batch norm are each process's own."""
    model = Network(norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        average([p.grad for p in model.parameters()])
        optimizer.step()
        return loss.item()

    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def evaluated(backend: Any) -> Made:
    """A factory's windows; before each iteration all evaluate, by statistics of their own."""
    model = Network(norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        backend=backend,
        deterministic=True,
        gradient_accumulation_steps=3,
    )
    x = torch.ones(1, 4)

    @trainer.on(Events.ITERATION_STARTED)
    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            shown = model(x).abs().mean()
        model.train()
        average([shown])
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + shown.item())

    return trainer, {"model": model, "optimizer": optimizer}


def windows(backend: Any) -> Made:
    """The same by hand: DistributedDataParallel sends no buffers within a window."""
    model = Network(norm=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = DistributedDataParallel(model)

    def step(engine: Engine, batch: Any) -> float:
        model.eval()
        with torch.no_grad():
            weight = 1 + loss_of(model, batch)
        model.train()
        if engine.state.iteration % 3:
            with shared.no_sync():
                loss = weight * loss_of(shared, batch)
                loss.backward()
        else:
            loss = weight * loss_of(shared, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def wrapped(backend: Any) -> Made:
    """A model that the script shares itself, frozen in part by then: in which order it adds up."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = DeterministicEngine(stepped(DistributedDataParallel(model), optimizer), backend)
    return trainer, {"model": model, "optimizer": optimizer}


class Recorded(nn.Module):
    """Has a number and a buffer that no `state_dict` has, and another of each in each process."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature = Network(), 1.0
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.2)
        return self.inner(x - self.mean) / self.temperature


def recorded(backend: Any) -> Made:
    """What is recorded with a state: of modules, what is frozen, and the last output."""
    model = Recorded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = DeterministicEngine(stepped(model, optimizer), backend)

    @trainer.on(Events.ITERATION_STARTED)
    def change() -> None:
        loss = trainer.state.output or 0.0
        model.temperature = 1 + loss
        if trainer.state.iteration == 2 and backend.world.rank == 1:
            model.inner.first.weight.requires_grad_(False)

    return trainer, {"model": model, "optimizer": optimizer}


def untrained(backend: Any) -> Made:
    """A random target of each process's own, which stays, and an average that one of them keeps."""
    model, rank = Network(), backend.world.rank
    ema = copy.deepcopy(model)
    torch.manual_seed(rank)
    target = Network().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared, _ = backend.prepare(model, optimizer)

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = (shared(batch[0]) - target(batch[0])).square().mean()
        loss.backward()
        optimizer.step()
        if rank == 0:
            with torch.no_grad():
                for one, other in zip(ema.parameters(), model.parameters(), strict=True):
                    one.lerp_(other, 0.2)
        return loss.item()

    named = {"model": model, "optimizer": optimizer, "ema": ema, "target": target}
    return DeterministicEngine(step, backend), named


def static(backend: Any) -> Made:
    """One that cannot be laid out beforehand."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = DistributedDataParallel(model, static_graph=True)
    trainer = DeterministicEngine(stepped(shared, optimizer), backend)
    return trainer, {"model": model, "optimizer": optimizer}


def in_buckets(backend: Any, every: int = 1, local: bool = False) -> Made:
    """One whose gradients lie in its buckets, and stay there: for good, or within a window."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(engine: Engine, batch: Any) -> float:
        last = engine.state.iteration % every == 0
        with shared.no_sync() if local and not last else nullcontext():
            loss = loss_of(shared, batch)
            loss.backward()
        if last:
            optimizer.step()
            # By position, as some write it.
            optimizer.zero_grad(every > 1)
        return loss.item()

    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def window_in_buckets(backend: Any) -> Made:
    return in_buckets(backend, 3)


def window_of_its_own(backend: Any) -> Made:
    """Each process adds up a window by itself: what it has is not in the buckets yet."""
    return in_buckets(backend, 3, local=True)


def compressed(backend: Any, named: bool = True) -> Made:
    """A hook that keeps what it has not sent yet."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared, _ = backend.prepare(model, optimizer)
    kept: Any = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=1)
    shared.register_comm_hook(kept, powerSGD_hook.powerSGD_hook)
    trainer = DeterministicEngine(stepped(shared, optimizer), backend)
    hook = {"hook": HookState(kept)} if named else {}
    return trainer, {"model": model, "optimizer": optimizer, **hook}


def compressed_unnamed(backend: Any) -> Made:
    return compressed(backend, named=False)


def averaged(backend: Any) -> Made:
    """torch's averager counts the steps."""
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = PeriodicModelAverager(period=3)
    step = stepped(model, optimizer, lambda _: averager.average_parameters(model.parameters()))
    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def post_local(backend: Any) -> Made:
    """torch's optimizer that averages, which has nothing of an optimizer of its own."""
    module: Any = distributed
    model = Network()
    shared = DistributedDataParallel(model)
    alone, _ = module.new_subgroups(1)
    kept = post_localSGD_hook.PostLocalSGDState(None, alone, 2)
    shared.register_comm_hook(kept, post_localSGD_hook.post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(shared.parameters(), lr=0.1), PeriodicModelAverager(period=3)
    )
    trainer = DeterministicEngine(stepped(shared, optimizer), backend)
    return trainer, {"model": model, "optimizer": optimizer}


def kept_back(backend: Any) -> Made:
    """FSDP within a window: it has the gradients, and nobody else."""
    model: Any = Network()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Any) -> float:
        last = engine.state.iteration % 3 == 0
        model.set_requires_gradient_sync(last)
        loss = loss_of(model, batch)
        loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def taught(backend: Any, seeded: bool = True) -> Made:
    """A teacher of FSDP's, which nobody names: a pass without gradients leaves it whole."""
    model: Any = Network()
    if not seeded:
        torch.seed()
    teacher: Any = Network().requires_grad_(False)
    for one in (model, teacher):
        fully_shard(one)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = (model(batch[0]) - teacher(batch[0])).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return DeterministicEngine(step, backend), {"model": model, "optimizer": optimizer}


def taught_anew(backend: Any) -> Made:
    """Another one in each start."""
    return taught(backend, seeded=False)


EXACT = (
    taught,
    local_sgd,
    own_statistics,
    evaluated,
    windows,
    window_of_its_own,
    wrapped,
    compressed,
    recorded,
    untrained,
)
TOLD = (static, in_buckets, window_in_buckets, compressed_unnamed, averaged, post_local, kept_back)


def loader() -> DataLoader[Any]:
    x = torch.randn(12 * ITERATIONS, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=12, shuffle=True)


def run(backend: Any, make: Callable[[Any], Made], folder: Path, at: int, end: int | None) -> Any:
    """Runs a training to its end, or to an iteration; returns its losses, and what it has then."""
    torch.manual_seed(1)
    trainer, to_save = make(backend)
    going = resume_or_start(trainer, to_save, folder, every=at, signals=())
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output)
    )
    if end is not None:
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=end), lambda t: t.terminate(goes_on=True)
        )
    trainer.run(loader(), max_epochs=EPOCHS)
    going.checkpoint.wait()
    model = to_save["model"]
    held = {name: one.state_dict() for name, one in to_save.items() if name != "model"}
    tensors = [getattr(t, "_local_tensor", t).tolist() for t in model.state_dict().values()]
    return losses, tensors, repr(held)


def same(backend: Any, make: Callable[[Any], Made], folder: Path, at: int) -> bool:
    """Tells whether a training that is stopped at an iteration ends as one that is not."""
    where = folder / f"{make.__name__}-{at}"
    losses, *whole = run(backend, make, where / "whole", at, None)
    before, *_ = run(backend, make, where / "parted", at, at)
    after, *parted = run(backend, make, where / "parted", at, None)
    return before + after == losses and parted == whole


def told(backend: Any, make: Callable[[Any], Made], folder: Path) -> list[str]:
    """Returns what a training is told of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(backend, make, folder / make.__name__, 4, 5)
    return [str(one.message) for one in caught]


def main(folder: Path, at: list[int]) -> None:
    """Does all of it and writes what came of it."""
    with get("cpu") as backend:
        rank, size = backend.world.rank, backend.world.size
        found: dict[str, Any] = {make.__name__: told(backend, make, folder) for make in TOLD}
        # It goes on from where it was the first time.
        found["taught_anew"] = [told(backend, taught_anew, folder) for _ in range(2)][1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number, make in enumerate(EXACT):
                found[make.__name__] = same(backend, make, folder, at[number])
        found["in vain"] = [str(one.message) for one in caught]
    (folder / f"{rank}-of-{size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(int, sys.argv[2:])))
