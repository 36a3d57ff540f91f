"""Every kind of data that a run may be given, each as a small training to record and resume."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from dataflow_objects import (
    BATCH,
    SIZE,
    ArrayBatches,
    ArrayBatchSampler,
    EagerSampler,
    EndlessSampler,
    GrowingBatches,
    Images,
    LazySampler,
    OwnBatches,
    OwnGeneratorSampler,
    StatefulBatches,
    StatefulSampler,
    StatefulStream,
    Stream,
    Walks,
    WholeBatches,
    batches,
    loader,
    random_collate,
    seed_worker,
)
from resume_harness import IMAGES
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    StackDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from crosstrain.engine import Engine, Events, PermutationSampler


def shuffled(**options: Any) -> Callable[[int, int], DataLoader[Any]]:
    return lambda workers, start: loader(workers=workers, shuffle=True, **options)


def sampled(make: Callable[[], Any], **options: Any) -> Callable[[int, int], DataLoader[Any]]:
    return lambda workers, start: loader(workers=workers, sampler=make(), **options)


def no_handlers(engine: Engine) -> None:
    """Nothing but the recording."""


@dataclass
class Case:
    """A run to record and to resume.

    Args:
        make: called with a number of workers and the iteration after which the run goes on (0: at
            its beginning), returns the data.
        attach: attaches what the run does besides.
        limits: what `run` is given besides.
        workers: of the straight run, and of the resumed ones in turn.
        slow: whether its workers are new interpreters, which take seconds to start.
    """

    make: Callable[[int, int], Any]
    attach: Callable[[Engine], None] = no_handlers
    limits: dict[str, Any] = field(default_factory=lambda: {"max_epochs": 2})
    workers: tuple[int, ...] = (0, 2, 1)
    slow: bool = False


def set_epochs(engine: Engine) -> None:
    @engine.on(Events.EPOCH_STARTED)
    def set_epoch() -> None:
        engine.state.dataloader.sampler.set_epoch(engine.state.epoch - 1)  # type: ignore[union-attr]


def end_epochs(engine: Engine) -> None:
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=4), lambda: engine.terminate_epoch())


def end_epochs_quietly(engine: Engine) -> None:
    @engine.on(Events.ITERATION_COMPLETED(every=4))
    def end() -> None:
        engine.terminate_epoch(skip_epoch_completed=True)


def exchange(engine: Engine) -> None:
    @engine.on(Events.ITERATION_COMPLETED(once=4))
    def set_data() -> None:
        engine.set_data(second_data(0))


def second_data(workers: int) -> DataLoader[Any]:
    return loader(Images(30), workers, shuffle=True)


def exchange_each_epoch(engine: Engine) -> None:
    @engine.on(Events.EPOCH_STARTED)
    def set_data() -> None:
        size = 20 + 4 * engine.state.epoch
        engine.set_data(loader(Images(size), engine.state.epoch % 3, shuffle=True))


def exchange_at_end(engine: Engine) -> None:
    @engine.on(Events.DATALOADER_STOP_ITERATION)
    def set_data() -> None:
        engine.set_data(loader(Images(24), 0, shuffle=True))


def evaluate(engine: Engine) -> None:
    """Evaluates in a handler, on data that draws from the global generators."""
    evaluator = Engine(lambda _, batch: float(batch.sum()))

    @engine.on(Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_STARTED)
    def run() -> None:
        random.random()
        np.random.normal()
        torch.rand(1)
        evaluator.run(loader(Stream(), 0))


def draw_everywhere(engine: Engine) -> None:
    """Handlers of every event that draw from the global generators."""
    for event in Events:
        if event is Events.EXCEPTION_RAISED:
            continue

        def draw(*_: Any, **__: Any) -> None:
            random.random()
            np.random.standard_normal()
            torch.rand(1)

        engine.add_event_handler(event, draw)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def weights() -> torch.Tensor:
    return torch.linspace(1, 2, SIZE)


def split() -> Any:
    return random_split(Images(60), [SIZE, 16], torch.Generator().manual_seed(2))[0]


TWO = {"max_epochs": 2}
CASES: dict[str, Case] = {
    "sequential": Case(lambda w, s: loader(workers=w)),
    "random": Case(shuffled()),
    "replacement": Case(sampled(lambda: RandomSampler(Images(), replacement=True))),
    "more samples": Case(sampled(lambda: RandomSampler(Images(), num_samples=SIZE + 7))),
    "fewer samples": Case(sampled(lambda: RandomSampler(Images(), num_samples=SIZE - 9))),
    "subset": Case(
        sampled(lambda: SubsetRandomSampler(range(3, SIZE, 2))), limits={"max_epochs": 4}
    ),
    "weighted": Case(sampled(lambda: WeightedRandomSampler(weights(), SIZE))),
    "distributed": Case(sampled(lambda: DistributedSampler(Images(), 3, 1)), set_epochs),
    "distributed, in order": Case(sampled(lambda: DistributedSampler(Images(), 3, 2, False))),
    "permutation": Case(sampled(lambda: PermutationSampler(SIZE, seed=3))),
    "eager sampler": Case(sampled(lambda: EagerSampler(SIZE))),
    "lazy sampler": Case(sampled(lambda: LazySampler(SIZE), batch_size=2)),
    "long lazy sampler": Case(
        sampled(lambda: LazySampler(200), batch_size=1),
        limits={"max_epochs": 2, "epoch_length": 90},
    ),
    "endless sampler": Case(
        sampled(lambda: EndlessSampler()), limits={"max_epochs": 2, "epoch_length": 7}
    ),
    "own generators": Case(sampled(lambda: OwnGeneratorSampler(SIZE))),
    "own generators, epochs ended": Case(sampled(lambda: OwnGeneratorSampler(SIZE)), end_epochs),
    "stateful sampler": Case(sampled(lambda: StatefulSampler(SIZE))),
    "batch sampler": Case(lambda w, s: loader(workers=w, batch_sampler=GrowingBatches())),
    "batch sampler of arrays": Case(
        lambda w, s: loader(workers=w, batch_sampler=ArrayBatchSampler())
    ),
    "torch's batch sampler": Case(
        lambda w, s: loader(
            workers=w, batch_sampler=BatchSampler(LazySampler(SIZE), BATCH, drop_last=True)
        )
    ),
    "no batches": Case(shuffled(batch_size=None), limits={"max_epochs": 2, "epoch_length": 50}),
    "no batches, lazy sampler": Case(
        sampled(lambda: LazySampler(9), batch_size=None), limits={"max_epochs": 2}
    ),
    "drop last": Case(shuffled(drop_last=True)),
    "persistent workers": Case(shuffled(persistent_workers=True), workers=(2, 1)),
    "persistent workers, epochs ended": Case(
        shuffled(persistent_workers=True), end_epochs, workers=(2, 1)
    ),
    "prefetch 1": Case(shuffled(prefetch_factor=1), workers=(2, 1)),
    "prefetch 5": Case(shuffled(prefetch_factor=5), workers=(3, 2, 1)),
    **{
        method: Case(
            shuffled(multiprocessing_context=method),
            limits={"max_epochs": 1},
            workers=(1, 1),
            slow=True,
        )
        for method in ("spawn", "forkserver")
    },
    "worker_init_fn": Case(shuffled(worker_init_fn=seed_worker)),
    "random collate": Case(shuffled(collate_fn=random_collate)),
    "__getitems__": Case(lambda w, s: loader(WholeBatches(), w, shuffle=True)),
    "__getitems__ of arrays": Case(
        lambda w, s: loader(ArrayBatches(), w, batch_sampler=ArrayBatchSampler())
    ),
    "__getitems__ without batches": Case(
        lambda w, s: loader(WholeBatches(), w, batch_size=None, shuffle=True)
    ),
    "random_split": Case(lambda w, s: loader(split(), w, shuffle=True)),
    "stack": Case(
        lambda w, s: loader(
            StackDataset(Images(), Images()),
            w,
            shuffle=True,
            collate_fn=lambda pairs: torch.stack([a + b for a, b in pairs]),
        )
    ),
    "loader's generator": Case(lambda w, s: loader(workers=w, shuffle=True, generator=generator())),
    "sampler's generator": Case(
        sampled(lambda: RandomSampler(Images(), replacement=True, generator=generator()))
    ),
    "sampler's generator, epochs ended": Case(
        sampled(lambda: RandomSampler(Images(), replacement=True, generator=generator())),
        end_epochs,
    ),
    "loader's generator, epochs ended": Case(
        lambda w, s: loader(workers=w, shuffle=True, generator=generator()), end_epochs
    ),
    "StatefulDataLoader": Case(shuffled(kind=StatefulDataLoader)),
    "StatefulDataLoader, persistent": Case(
        shuffled(kind=StatefulDataLoader, persistent_workers=True), workers=(2, 1)
    ),
    "StatefulDataLoader, iterable": Case(
        lambda w, s: loader(StatefulStream(), w, kind=StatefulDataLoader), workers=(0, 0)
    ),
    "StatefulDataLoader, iterable, workers": Case(
        lambda w, s: loader(Walks(), w, kind=StatefulDataLoader),
        limits={"max_epochs": 3, "epoch_length": 5},
        workers=(2, 2),
    ),
    "iterable dataset": Case(lambda w, s: loader(Stream(), w), workers=(0, 0)),
    "iterable dataset, workers": Case(lambda w, s: loader(Stream(), w), workers=(2, 2)),
    "iterable dataset, persistent": Case(
        lambda w, s: loader(Stream(), w, persistent_workers=True), workers=(2, 2)
    ),
    "iterable dataset with state": Case(lambda w, s: loader(StatefulStream(), w), workers=(0, 0)),
    "stateful batches": Case(lambda w, s: StatefulBatches()),
    "list": Case(lambda w, s: [IMAGES[i * BATCH : (i + 1) * BATCH] for i in range(6)]),
    "tensor": Case(lambda w, s: IMAGES[:48].view(6, BATCH, 64)),
    "generator": Case(lambda w, s: batches(True), limits={"max_epochs": 2, "epoch_length": 6}),
    "iterator": Case(
        lambda w, s: iter(list(IMAGES[:96].split(BATCH))),
        limits={"max_epochs": 2, "epoch_length": 6},
    ),
    "iterable with a generator of its own": Case(lambda w, s: OwnBatches()),
    "unknown length, short epochs": Case(
        lambda w, s: OwnBatches(), limits={"max_epochs": 4, "epoch_length": 4}
    ),
    "short epochs": Case(shuffled(), limits={"max_epochs": 4, "epoch_length": 4}),
    "long epochs": Case(shuffled(), limits={"max_epochs": 2, "epoch_length": 8}),
    "max_iters": Case(shuffled(), limits={"max_iters": 11}),
    "epochs ended": Case(shuffled(), end_epochs, limits={"max_epochs": 3}),
    "epochs ended quietly": Case(shuffled(), end_epochs_quietly, limits={"max_epochs": 3}),
    "set_data": Case(
        lambda w, s: second_data(w) if s >= 4 else loader(workers=w, shuffle=True), exchange
    ),
    "set_data each epoch": Case(
        shuffled(), exchange_each_epoch, limits={"max_epochs": 3, "epoch_length": 4}
    ),
    "set_data at the data's end": Case(
        lambda w, s: (
            loader(Images(24), w, shuffle=True) if s > 6 else loader(workers=w, shuffle=True)
        ),
        exchange_at_end,
        limits={"max_epochs": 3, "epoch_length": 5},
    ),
    "no data": Case(
        lambda w, s: None, draw_everywhere, limits={"max_epochs": 2, "epoch_length": 5}
    ),
    "evaluation": Case(shuffled(), evaluate),
    "draws everywhere": Case(shuffled(), draw_everywhere),
    "draws everywhere, epochs ended": Case(
        shuffled(), lambda e: (draw_everywhere(e), end_epochs(e))[0]
    ),
}
