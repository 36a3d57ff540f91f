"""Building blocks of composed runs: samplers, datasets, collators, optimizers, modules.

Some keep everything where a resume finds it, some hide what they draw from where nobody looks. Each
block is made by a function of a `random.Random`, so that a composition is remade from its seed. All
are one file: blocks of a kind are listed side by side, and a new one is drawn once it is listed.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SAMPLES, FEATURES, BATCH = 22, 3, 4

# ------------------------------------------------------------------------- hidden generators

GLOBALS: dict[str, Any] = {}


class _Slots:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def _source(kind: str, seed: int) -> tuple[Any, Callable[[Any], float]]:
    """Returns something that has a state, and what draws a number from it."""
    if kind == "torch":
        return torch.Generator().manual_seed(seed), lambda g: float(torch.rand((), generator=g))
    if kind == "numpy":
        return np.random.default_rng(seed), lambda g: float(g.random())
    if kind == "numpy legacy":
        return np.random.RandomState(seed), lambda g: float(g.rand())
    if kind == "python":
        return random.Random(seed), lambda g: float(g.random())
    if kind == "count":
        return itertools.count(seed), lambda g: (next(g) * 0.618) % 1.0
    assert kind == "number"
    return [seed], _next_number


def _next_number(held: list[int]) -> float:
    held[0] = (held[0] * 48271 + 11) % 2147483647
    return held[0] / 2147483647


KINDS = ("torch", "numpy", "numpy legacy", "python", "count", "number")
# Where a generator may lie, and by which words a message may say so.
PLACES: dict[str, tuple[str, ...]] = {
    "attribute": (".rng",),
    "private": ("._rng",),
    "dict": (".config",),
    "list": (".transforms",),
    "slots": (".helper",),
    "closure": ("'source'",),
    "partial": ("argument 0",),
    "default": ("a default",),
    "module": ("'GLOBALS'",),
    "class": (".shared",),
    "function": ("'source'", ".rng"),
    "lazy": ("'held'",),
}
# What holds a generator that was hidden, and the place, of the composition that was made last.
HIDDEN: list[tuple[Any, str]] = []


def hide(owner: Any, place: str, kind: str, seed: int) -> Callable[[], float]:
    """Puts a generator somewhere; returns a function of no arguments that draws from it."""
    source, draw = _source(kind, seed)
    if place == "attribute":
        owner.rng = source
        return lambda: draw(owner.rng)
    if place == "private":
        owner._rng = source
        return lambda: draw(owner._rng)
    if place == "dict":
        owner.config = {"inner": {"rng": source}}
        return lambda: draw(owner.config["inner"]["rng"])
    if place == "list":
        owner.transforms = [None, source]
        return lambda: draw(owner.transforms[1])
    if place == "slots":
        owner.helper = _Slots(source)
        return lambda: draw(owner.helper.inner)
    if place == "partial":
        return functools.partial(draw, source)
    if place == "default":
        return lambda g=source: draw(g)
    if place == "module":
        GLOBALS["rng"] = source
        return lambda: draw(GLOBALS["rng"])
    if place == "class":
        type(owner).shared = source
        return lambda: draw(type(owner).shared)
    if place == "lazy":
        held: list[Any] = []

        def lazily() -> float:
            if not held:
                held.append(source)
            return draw(held[0])

        return lazily

    def drawn() -> float:
        return draw(source)

    if place == "function":
        drawn.rng = source  # type: ignore[attr-defined]
    return drawn


def hidden(owner: Any, choose: random.Random) -> Callable[[], float]:
    """Hides a generator of any kind in any place."""
    place = choose.choice(tuple(PLACES))
    HIDDEN.append((owner, place))
    return hide(owner, place, choose.choice(KINDS), choose.randrange(1000))


GLOBAL_DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),
    "python": random.random,
}


def drawing(owner: Any, how: str, choose: random.Random) -> Callable[[], float]:
    """Returns what draws: nothing, a global generator, or a hidden one."""
    if how == "nothing":
        return lambda: 0.0
    if how == "hidden":
        return hidden(owner, choose)
    return GLOBAL_DRAWS[choose.choice(sorted(GLOBAL_DRAWS))]


# ----------------------------------------------------------------------------------- samplers


class OwnSampler(Sampler[int]):
    """Orders the samples by what it draws."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(range(SAMPLES), key=lambda i: (self.draw(), i)))


class LazySampler(OwnSampler):
    """Draws each index when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        for index in range(SAMPLES):
            yield int(self.draw() * SAMPLES) if index % 2 else index


class SelfAdvancing(Sampler[int]):
    """Counts its own epochs."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = list(range(SAMPLES))
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class EpochSampler(SelfAdvancing):
    """Is told its epoch by a handler."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(SAMPLES))
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class Endless(Sampler[int]):
    """Never ends; may have a length, may go on where it was."""

    def __init__(self, how: str, choose: random.Random, keeps: bool) -> None:
        self.draw = drawing(self, how, choose)
        self.keeps = keeps
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        place = self.place if self.keeps else 0
        while True:
            place += 1
            if self.keeps:
                self.place = place
            yield int(self.draw() * SAMPLES) if place % 3 else place % SAMPLES


class EndlessWithLength(Endless):
    """Has a length and no end."""

    def __len__(self) -> int:
        return SAMPLES


class Batches:
    """A batch sampler of batches whose number changes from pass to pass."""

    def __init__(self, how: str, choose: random.Random, length: str) -> None:
        self.draw = drawing(self, how, choose)
        self.length = length
        self.passes = 0

    def _count(self) -> int:
        return 5 + self.passes % 3

    def __len__(self) -> int:
        return self._count() if self.length == "true" else 6

    def __iter__(self) -> Iterator[list[int]]:
        self.passes += 1
        for number in range(self._count()):
            size = 2 + int(self.draw() * 3)
            yield [(number * 5 + i * 3 + int(self.draw() * 7)) % SAMPLES for i in range(size)]


class Budget:
    """Groups the samples of a shuffled order by a budget, so that the length is not known."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        spent = 0
        for index in sorted(range(SAMPLES), key=lambda i: (self.draw(), i)):
            batch.append(index)
            spent += 1 + index % 4
            if spent >= 9:
                yield batch
                batch, spent = [], 0
        if batch:
            yield batch


SAMPLERS = (
    "in order",
    "shuffled",
    "own generator",
    "replacement",
    "weighted",
    "weighted, own generator",
    "subset",
    "own",
    "lazy",
    "self-advancing",
    "set_epoch",
    "endless",
    "endless with length",
    "endless that goes on",
    "batches",
    "batches of true length",
    "budget",
)
# Those of no class of torch's.
OWN_SAMPLERS: dict[str, type] = {
    "own": OwnSampler,
    "lazy": LazySampler,
    "self-advancing": SelfAdvancing,
    "set_epoch": EpochSampler,
    "endless": Endless,
    "endless with length": EndlessWithLength,
    "endless that goes on": EndlessWithLength,
    "batches": Batches,
    "batches of true length": Batches,
    "budget": Budget,
}


def sampler_arguments(name: str, how: str, choose: random.Random) -> dict[str, Any]:
    """Returns the arguments of a DataLoader for a sampler."""
    generator = torch.Generator().manual_seed(5)
    weights = [1.0 + i % 5 for i in range(SAMPLES)]
    whole: dict[str, Callable[[], dict[str, Any]]] = {
        "in order": dict,
        "shuffled": lambda: {"shuffle": True},
        "own generator": lambda: {"shuffle": True, "generator": generator},
        "batches": lambda: {"batch_sampler": Batches(how, choose, "wrong")},
        "batches of true length": lambda: {"batch_sampler": Batches(how, choose, "true")},
        "budget": lambda: {"batch_sampler": Budget(how, choose)},
    }
    if name in whole:
        found = whole[name]()
        return found if "batch_sampler" in found else {"batch_size": BATCH, **found}
    data = range(SAMPLES)
    samplers: dict[str, Callable[[], Any]] = {
        "replacement": lambda: RandomSampler(data, replacement=True, num_samples=18),
        "weighted": lambda: WeightedRandomSampler(weights, SAMPLES),
        "weighted, own generator": lambda: WeightedRandomSampler(
            weights, SAMPLES, generator=generator
        ),
        "subset": lambda: SubsetRandomSampler(range(0, SAMPLES, 2)),
        "own": lambda: OwnSampler(how, choose),
        "lazy": lambda: LazySampler(how, choose),
        "self-advancing": SelfAdvancing,
        "set_epoch": EpochSampler,
        "endless": lambda: Endless(how, choose, keeps=False),
        "endless with length": lambda: EndlessWithLength(how, choose, keeps=False),
        "endless that goes on": lambda: EndlessWithLength(how, choose, keeps=True),
    }
    sampler = samplers[name]()
    if choose.random() < 0.2:
        return {"batch_sampler": BatchSampler(sampler, BATCH, drop_last=False)}
    return {"batch_size": BATCH, "sampler": sampler}


# ----------------------------------------------------------------------------------- datasets


def features(index: int) -> torch.Tensor:
    """Returns a sample's numbers, the same in every process."""
    return torch.tensor([((index * 7 + k * 3) % 11) / 11.0 for k in range(FEATURES)])


class Mapped(Dataset[Any]):
    """A map-style dataset with noise from what it draws from."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)
        self.shift = 0.0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x = features(index) + 0.1 * self.draw() + self.shift
        return x, torch.tensor([float(index % 2)])


class Fetching(Mapped):
    """Fetches a whole batch at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = self.draw()
        return [(x + noise, y) for x, y in (self[i] for i in indices)]


class Caching(Mapped):
    """Keeps what it has made once: later passes depend on earlier ones."""

    def __init__(self, how: str, choose: random.Random) -> None:
        super().__init__(how, choose)
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = super().__getitem__(index)
        return self.cache[index]


class Streamed(IterableDataset[Any]):
    """An iterable dataset without a state."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)
        self.shift = 0.0

    def __iter__(self) -> Iterator[Any]:
        for index in range(SAMPLES):
            yield features(index) + 0.1 * self.draw() + self.shift, torch.tensor([index % 2 + 0.0])


class StatefulStream(Streamed):
    """One that keeps where it is, and its generator's state if it holds one."""

    def __init__(self, how: str, choose: random.Random) -> None:
        super().__init__(how, choose)
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < SAMPLES:
            self.place += 1
            noise = 0.1 * self.draw()
            yield features(self.place) + noise, torch.tensor([self.place % 2 + 0.0])
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class StartKeeping(Streamed):
    """One whose state is where its pass began, as of other libraries."""

    def __init__(self, how: str, choose: random.Random) -> None:
        super().__init__(how, choose)
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.start, SAMPLES):
            yield features(index) + 0.1 * self.draw(), torch.tensor([index % 2 + 0.0])

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


class Iterated:
    """Any iterable of batches."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)

    def __iter__(self) -> Iterator[Any]:
        for number in range(5):
            x = torch.stack([features(number * BATCH + i) for i in range(BATCH)])
            yield x + self.draw(), torch.tensor([[float(i % 2)] for i in range(BATCH)])


def batch_list() -> list[Any]:
    """Returns batches in a list."""
    return [
        (torch.stack([features(n + i) for i in range(BATCH)]), torch.full((BATCH, 1), n % 2.0))
        for n in range(5)
    ]


MAPPED = {"map": Mapped, "fetching": Fetching, "caching": Caching}
ITERABLE = {"stream": Streamed, "stateful": StatefulStream, "start-keeping": StartKeeping}
BARE = ("iterated", "list", "pair")
DATASETS = (*MAPPED, *ITERABLE, *BARE)


class Pair:
    """Two loaders, zipped."""

    def __init__(self, one: Any, other: Any) -> None:
        self.one, self.other = one, other

    def __iter__(self) -> Iterator[Any]:
        for (x, y), (more, _) in zip(self.one, self.other, strict=False):
            count = min(len(x), len(more))
            yield x[:count] + 0.01 * more[:count], y[:count]

    def __len__(self) -> int:
        return min(len(self.one), len(self.other))


class Collate:
    """Stacks samples, with noise from what it draws from."""

    def __init__(self, how: str, choose: random.Random) -> None:
        self.draw = drawing(self, how, choose)

    def __call__(self, samples: list[Any]) -> Any:
        xs, ys = zip(*samples, strict=True)
        return torch.stack(xs) + 0.1 * self.draw(), torch.stack(ys)


class CountingLoader(DataLoader[Any]):
    """Counts its passes."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


class ScalingLoader(CountingLoader):
    """Makes something else of each batch, by its pass."""

    def __iter__(self) -> Any:
        return self._scaled(super().__iter__())

    def _scaled(self, batches: Any) -> Iterator[Any]:
        for x, y in batches:
            yield x * (1 + self.passes / 8), y


class GeneratingLoader(CountingLoader):
    """Is a generator itself: what it does when a pass begins is done with the first batch."""

    def __iter__(self) -> Any:
        self.passes += 1
        for x, y in DataLoader.__iter__(self):
            yield x * (1 + self.passes / 8), y


class DrawingLoader(DataLoader[Any]):
    """Draws from the global generators when a pass begins."""

    def __iter__(self) -> Any:
        self.offset = float(torch.rand(())) + random.random()
        return super().__iter__()


LOADERS: dict[str, Any] = {
    "plain": DataLoader,
    "counting": CountingLoader,
    "scaling": ScalingLoader,
    "generating": GeneratingLoader,
    "drawing": DrawingLoader,
}


def make_data(
    dataset: str,
    sampler: str,
    collate: str,
    loader: str,
    draws: tuple[str, str, str],
    workers: int,
    persistent: bool,
    choose: random.Random,
) -> tuple[Any, Any]:
    """Returns what a run is given, and the dataset in it.

    Args:
        dataset: of `DATASETS`.
        sampler: of `SAMPLERS`.
        collate: `default` or `own`.
        loader: of `LOADERS`.
        draws: what sampler, dataset and collator draw from.
        workers: how many workers a loader has.
        persistent: whether they live on.
        choose: decides the rest.
    """
    if dataset == "iterated":
        return Iterated(draws[1], choose), None
    if dataset == "list":
        return batch_list(), None
    more: dict[str, Any] = {
        "num_workers": workers,
        "persistent_workers": persistent and workers > 0,
    }
    if collate == "own":
        more["collate_fn"] = Collate(draws[2], choose)
    if dataset == "pair":
        one = DataLoader(Mapped(draws[1], choose), batch_size=BATCH, shuffle=True)
        return Pair(one, DataLoader(Mapped("nothing", choose), batch_size=5, shuffle=True)), None
    if dataset in ITERABLE:
        stream = ITERABLE[dataset](draws[1], choose)
        return LOADERS[loader](stream, batch_size=BATCH, **more), stream
    mapped = MAPPED[dataset](draws[1], choose)
    arguments = sampler_arguments(sampler, draws[0], choose)
    return LOADERS[loader](mapped, **arguments, **more), mapped


# ------------------------------------------------------------------------- models, optimizers


class Net(nn.Module):
    """A network with dropout; kinds of it keep more than their state_dict has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(FEATURES, 6)
        self.norm = nn.BatchNorm1d(6) if kind == "norm" else nn.Identity()
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(6, 1)
        self.tail = nn.Identity()
        self.steps = 0
        self.average: torch.Tensor
        self.register_buffer("average", torch.zeros(6), persistent=kind == "saved buffer")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        if self.kind in ("buffer", "saved buffer") and self.training:
            self.average.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        if self.kind == "counts" and self.training:
            self.steps += 1
        found = self.tail(self.last(self.drop(hidden.relu() + self.average)))
        return found / (1 + 0.1 * self.steps)


NETS = ("plain", "norm", "buffer", "saved buffer", "counts")


class Counting(torch.optim.SGD):
    """Keeps a number beside its state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.05)
        self.count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.05 / self.count
        return super().step(closure)


class CountingInState(Counting):
    """Keeps it in its state."""

    def state_dict(self) -> Any:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        state = dict(state)
        self.count = state.pop("count")
        super().load_state_dict(state)


class Langevin(torch.optim.SGD):
    """Adds noise of the global generator."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        return super().step(closure)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
    "counting": Counting,
    "counting in state": CountingInState,
    "langevin": lambda parameters: Langevin(parameters, 0.05),
}
