"""Samplers with a state of any kind, whatever handlers do to them: a run resumes, or says not.

Runs are composed of samplers that count, shuffle in place, draw late, never end or change their
length, and of handlers that evaluate on the same loader, draw from its generators, or set weights.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from crosstrain.engine import DeterministicEngine, Events, ResumeError, ResumeWarning

SIZE, BATCH = 20, 4


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, torch.rand(())


class Counting(Sampler[int]):
    """Shuffles by a counter of its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(np.random.default_rng(self.passes).permutation(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class Advancing(RandomSampler):
    """Shuffles by its epoch, which it sets to another at its end: not to the number it is given."""

    def __init__(self) -> None:
        super().__init__(range(SIZE), generator=torch.Generator())
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 3 * epoch + 1

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(7 + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)


class InPlace(Counting):
    """Shuffles a list of its own, on and on."""

    def __init__(self) -> None:
        self.order = list(range(SIZE))
        self.rng = np.random.RandomState(3)

    def __iter__(self) -> Iterator[int]:
        self.rng.shuffle(self.order)
        return iter(self.order)


class Late(Counting):
    """Draws each index when it is asked for, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            yield int(torch.randint(SIZE, (), generator=self.generator))


class LongLate(Late):
    """Is drawn in several goes."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(100 * BATCH):
            yield int(torch.randint(SIZE, (), generator=self.generator))


class Endless(Counting):
    """Has a length, and no end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from super().__iter__()


class Growing(Counting):
    """Has another length in each pass, which its own iteration sets: a curriculum."""

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(i * 3 + self.passes) % SIZE for i in range(len(self))])

    def __len__(self) -> int:
        return 8 + 4 * self.passes


class Budget(Sampler[list[int]]):
    """Batches of as many samples as fit a budget; how many batches that makes is not told right."""

    def __init__(self) -> None:
        self.rounds = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.rounds += 1
        rng = np.random.default_rng(self.rounds)
        left = rng.permutation(SIZE).tolist()
        while left:
            many = int(rng.integers(1, 6))
            yield left[:many]
            left = left[many:]

    def __len__(self) -> int:
        return 5


def weighted() -> Any:
    return WeightedRandomSampler(torch.ones(SIZE), SIZE, generator=torch.Generator().manual_seed(2))


SAMPLERS: dict[str, Callable[[], Any]] = {
    "counting": Counting,
    "advancing": Advancing,
    "in place": InPlace,
    "late": Late,
    "long late": LongLate,
    "endless": Endless,
    "growing": Growing,
    "weighted": weighted,
    "replacement": lambda: RandomSampler(range(SIZE), True, 90, torch.Generator().manual_seed(8)),
    "budget": Budget,
    "batches of counting": lambda: BatchSampler(Counting(), 3, drop_last=True),
}


def make(name: str, workers: int, shared: bool) -> Any:
    sampler = SAMPLERS[name]()
    generator = torch.Generator().manual_seed(1) if shared else None
    options: dict[str, Any] = {"num_workers": workers, "generator": generator}
    if isinstance(sampler, (Budget, BatchSampler)):
        return DataLoader(Rows(), batch_sampler=sampler, **options)
    return DataLoader(Rows(), BATCH, sampler=sampler, **options)


def sampler_of(loader: Any) -> Any:
    own = loader.batch_sampler
    return own if isinstance(own, Budget) else own.sampler


def evaluates(engine: Any, loader: Any) -> None:
    def evaluate() -> None:
        for _, _batch in zip(range(3), loader, strict=False):
            pass

    engine.add_event_handler(Events.EPOCH_COMPLETED, evaluate)


def draws(engine: Any, loader: Any) -> None:
    @engine.on(Events.ITERATION_COMPLETED)
    def draw() -> None:
        sampler = sampler_of(loader)
        for generator in (loader.generator, getattr(sampler, "generator", None)):
            if generator is not None:
                engine.state.drawn.append(float(torch.rand((), generator=generator)))


def sets_weights(engine: Any, loader: Any) -> None:
    @engine.on(Events.ITERATION_COMPLETED(every=3))
    def set_weights() -> None:
        sampler = sampler_of(loader)
        if hasattr(sampler, "weights"):
            sampler.weights[engine.state.iteration % SIZE] += 5


def sets_epochs(engine: Any, loader: Any) -> None:
    @engine.on(Events.EPOCH_STARTED)
    def set_epoch() -> None:
        if hasattr(sampler_of(loader), "set_epoch"):
            sampler_of(loader).set_epoch(10 * engine.state.epoch)


def ends_epochs(engine: Any, loader: Any) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=4), lambda: engine.terminate_epoch())


HANDLERS = (evaluates, draws, sets_weights, sets_epochs, ends_epochs)


class Run:
    """Runs, from a state on if there is one, and keeps its first states."""

    def __init__(self, loader: Any, handlers: Any, state: Any = None, states: int = 3) -> None:
        self.many = states
        self.rows: dict[int, Any] = {}
        self.states: dict[str, Any] = {}
        engine = DeterministicEngine(self.step, seed=6)
        engine.state.drawn = []
        for handler in handlers:
            handler(engine, loader)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: self.keep(f"{engine.state.iteration}")
        )
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: self.keep(f"epoch {engine.state.epoch}")
        )
        self.engine = engine
        if state is not None:
            engine.load_state_dict(state)
        engine.run(loader, max_epochs=3)

    def step(self, engine: Any, batch: Any) -> None:
        index, drawn = batch
        own = float(torch.rand(())), float(np.random.random()), list(engine.state.drawn)
        engine.state.drawn = []
        self.rows[engine.state.iteration] = index.tolist(), drawn.tolist(), own

    def keep(self, name: str) -> None:
        if len(self.states) == self.many:
            return
        file = io.BytesIO()
        torch.save(self.engine.state_dict(), file)
        file.seek(0)
        self.states[name] = torch.load(file, weights_only=True)


def check(name: str, handlers: Any, workers: tuple[int, int], shared: bool, *places: int) -> Any:
    """Runs, resumes at places, and returns how that went; fails if it went wrong silently."""
    straight = Run(make(name, workers[0], shared), handlers, states=1 + max(places))
    assert len(straight.rows) >= 6
    return {resume(straight, name, handlers, workers[1], shared, place) for place in places}


def resume(straight: Run, name: str, handlers: Any, workers: int, shared: bool, place: int) -> str:
    names = list(straight.states)
    at = names[place % len(names)]
    # What the step is told by a handler of the iteration before is the handlers' own, not the
    # data's: it is in no state, so the first iteration is compared without it.
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = Run(make(name, workers, shared), handlers, straight.states[at])
    except ResumeError:
        return "refused"
    first = min(resumed.rows, default=0)
    for iteration, row in resumed.rows.items():
        index, drawn, own = straight.rows[iteration]
        if iteration == first:
            own, row = own[:2], (*row[:2], row[2][:2])
        if (index, drawn, own) != row:
            assert any(issubclass(w.category, ResumeWarning) for w in caught), (
                f"resumed at {at}, iteration {iteration}: {row}, not {(index, drawn, own)}"
            )
            return "warned"
    assert max(resumed.rows, default=len(straight.rows)) == len(straight.rows)
    return "exact"


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_resumes_at_every_place(name: str) -> None:
    for handlers in ((), HANDLERS[:3]):
        assert check(name, handlers, (0, 0), False, 1, 5, 8) == {"exact"}


@pytest.mark.parametrize(
    "name", ["counting", "advancing", "in place", "late", "batches of counting"]
)
def test_orders_of_three_passes_are_those_of_the_plain_loader(name: str) -> None:
    """A sampler that counts its own epochs gives another order in each, whoever runs over it."""
    plain = make(name, 0, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = [[batch[0].tolist() for batch in plain] for _ in range(3)]
    seen: list[list[Any]] = []
    engine = DeterministicEngine(lambda engine, batch: seen[-1].append(batch[0].tolist()), seed=1)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append([]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.run(make(name, 0, False), max_epochs=3)
    assert seen == wanted
    assert seen[0] != seen[1] != seen[2]


@settings(
    deadline=None,
    max_examples=12,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.sampled_from(sorted(SAMPLERS)),
    st.lists(st.sampled_from(HANDLERS), unique=True, max_size=4),
    st.booleans(),
    st.integers(0, 40),
)
def test_composed_runs_resume_or_say_that_they_do_not(
    name: str, handlers: Any, shared: bool, place: int
) -> None:
    assert check(name, handlers, (0, 0), shared, place) <= {"exact", "refused", "warned"}


@pytest.mark.parametrize("name", ["late", "in place", "budget", "endless"])
def test_workers_draw_ahead_and_change_nothing(name: str) -> None:
    # An evaluation on this loader would draw ahead in its own workers.
    handlers = HANDLERS[1:3]
    rows = [Run(make(name, workers, True), handlers).rows for workers in (0, 2)]
    assert rows[0] == rows[1]
    assert check(name, handlers, (2, 0), True, 4) == {"exact"}
