"""A program for torchrun: runs that end on one rank, in many ways, and what all ranks then do."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from crosstrain.backends import get
from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    DeterministicEngine,
    Engine,
    Events,
    RankCheck,
    RankFailed,
    agree,
    resume_or_start,
)

BACKEND = get("cpu").open()
RANK, SIZE = BACKEND.world.rank, BACKEND.world.size


def uneven(engine: Engine, batch: Any) -> None:
    """A step of uneven length that waits for nobody."""
    time.sleep(random.uniform(0, 0.004) * (1 + RANK))


def made(step: Callable[[Any, Any], Any] = uneven) -> Engine:
    """Returns an engine whose runs are agreed upon."""
    engine = Engine(step, BACKEND)
    agree(engine)
    return engine


def traced(engine: Engine) -> list[str]:
    """Returns a list of the engine's events, as they will come."""
    trace: list[str] = []
    for event in (
        *(Events.ITERATION_COMPLETED, Events.TERMINATE_SINGLE_EPOCH, Events.EPOCH_COMPLETED),
        *(Events.TERMINATE, Events.COMPLETED),
    ):
        engine.add_event_handler(
            event, lambda *a, n=event.name, **k: trace.append(f"{n} {engine.state.iteration}")
        )
    return trace


def ended(event: Any, call: str, ranks: list[int]) -> list[str]:
    """Has some ranks end the run, or an epoch, at an event; returns the end of the trace."""
    engine = made()
    trace = traced(engine)
    if RANK in ranks:
        engine.add_event_handler(event, lambda: getattr(engine, call)())
    # Ranks that wait for nobody part: those that are asked need time to hear of it.
    engine.run(max_epochs=3 if len(ranks) == SIZE else 300, epoch_length=8)
    return [line for line in trace if not line.startswith("ITERATION")]


def ended_while_one_begins() -> list[str]:
    """As above, at the start; rank 1's thread runs before the rank goes on."""
    start = threading.Thread.start

    def started_slowly(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.3)

    with mock.patch.object(threading.Thread, "start", started_slowly if RANK else start):
        return ended(Events.STARTED, "terminate", [0, 1])


def raised(function: Callable[[], Any]) -> str:
    """Returns what a function raises, as text."""
    try:
        function()
    except (RankFailed, ValueError, OSError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing() -> list[str]:
    """One rank fails: what is raised on each, and what a handler sees."""
    engine = made()
    seen: list[str] = []

    @engine.on(Events.ITERATION_COMPLETED(once=4))
    def fail() -> None:
        if RANK == SIZE - 1:
            raise ValueError("boom")

    @engine.on(Events.EXCEPTION_RAISED)
    def look(error: BaseException) -> None:
        seen.append(type(error).__name__)
        raise error

    return [raised(lambda: engine.run(max_epochs=1, epoch_length=4000)), *seen]


def lengths(known: bool) -> str:
    """Ranks whose data gives other numbers of batches, told before or found out."""
    data: Any = [0] * (5 + RANK)
    engine = made()
    if known:
        # Nothing in the steps waits: rank 0 is still at it when the other one says why it is not.
        return raised(lambda: engine.run(data, max_epochs=200))
    return raised(lambda: engine.run(iter(data), max_epochs=1))


def learned() -> str:
    """Ranks whose data is found out to have other lengths at the end of the first epoch."""

    class Data:
        def __iter__(self) -> Any:
            return iter(range(5 + RANK))

    return raised(lambda: made().run(Data(), max_epochs=200))


def alone() -> list[str]:
    """Taking the state on one rank only, and saving where another does something else."""
    engine = DeterministicEngine(uneven, BACKEND)
    ranks = agree(engine)
    assert ranks is not None
    ranks.line.timeout = 1.0
    told = [raised(engine.state_dict) if RANK == 0 else str(time.sleep(3))]
    ranks.line.timeout = 60.0
    ranks.line.meet("waiting for the test")
    engine.state.iteration = RANK
    told.append(raised(engine.state_dict))
    return told


def parted() -> list[str]:
    """A parameter of one rank differs in one bit; then in nothing."""
    told: list[str] = []
    for change in (0.0, 1e-7):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        engine = made()
        RankCheck(model, every=4).attach(engine)

        @engine.on(Events.ITERATION_COMPLETED(once=6))
        def part(_: Engine, weight: Any = model[1].weight, change: float = change) -> None:
            if RANK == 1:
                with torch.no_grad():
                    weight[0, 1] += change

        told.append(raised(lambda e=engine: e.run(max_epochs=1, epoch_length=16)))
    return told


def signalled(folder: Path, times: int, seed: int, evaluates: bool = False) -> list[Any]:
    """Signals arrive on one rank at random moments; returns where each run was saved."""
    moments = random.Random(seed)
    told: list[Any] = []
    for number in range(times):
        rank, after = moments.randrange(SIZE), moments.uniform(0.0, 0.05)
        engine = DeterministicEngine(uneven, BACKEND)
        place = folder / f"{seed}-{number}"
        run = resume_or_start(engine, {}, place, every=10**6, background=bool(number % 2))
        evaluator = Engine(uneven)
        looked: list[int] = []

        @engine.on(Events.ITERATION_COMPLETED(every=5))
        def evaluate(_: Engine, evaluator: Engine = evaluator, looked: Any = looked) -> None:
            if evaluates:
                evaluator.run(max_epochs=1, epoch_length=8)
                looked.append(evaluator.state.iteration)

        if rank == RANK:
            engine.add_event_handler(
                Events.ITERATION_STARTED(once=1),
                lambda _, s=0.001 + after: signal.setitimer(signal.ITIMER_REAL, s),
            )
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        engine.run(max_epochs=1, epoch_length=4000)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert all(count == 8 for count in looked), "no evaluation is cut short"
        agreement = engine.ranks
        assert agreement is not None
        agreement.line.meet("looking for what was saved")
        saved = Checkpoint.latest(place).manifest
        assert saved is not None
        told.append([run.exit_code, engine.state.iteration, saved.iteration])
        if run.checkpoint.save_handler is not None:
            run.checkpoint.save_handler.close()  # type: ignore[union-attr]
    return told


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    """No file can be opened inside, also where a thread closes one meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def unread(folder: Path, rank: int) -> list[str]:
    """One rank cannot read the checkpoint that all are to go on from; a moment later it can."""
    told: list[str] = []
    for hindrance in (None, no_more_files(), None):
        engine = DeterministicEngine(uneven, BACKEND, seed=3)
        agree(engine)
        epochs = 1 if not told else 2

        def resume(engine: Engine = engine, epochs: int = epochs) -> None:
            run = resume_or_start(engine, {}, folder / f"unread-{rank}", every=2)
            told.append(f"resumed from {run.resumed_from and run.resumed_from.name}")
            engine.run(max_epochs=epochs, epoch_length=4)
            run.checkpoint.save_handler.close()  # type: ignore[union-attr]

        with hindrance if hindrance is not None and rank == RANK else contextlib.nullcontext():
            failed = raised(resume)
        if failed != "nothing":
            told.append(failed)
    return told


def states() -> list[Any]:
    """Random states of the ranks, gathered, and given back in this world."""
    told: list[Any] = []
    drawn: list[Any] = []
    engine = DeterministicEngine(lambda e, b: drawn.append(torch.rand(1).item()), BACKEND, seed=5)
    kept: dict[str, Any] = {}

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def keep(engine: Engine) -> None:
        kept.update(engine.state_dict())

    engine.run(max_epochs=1, epoch_length=6)
    told.append(drawn)
    group: Any = torch.distributed
    whole = [kept]
    group.broadcast_object_list(whole, src=0)
    again: list[float] = []
    other = DeterministicEngine(lambda e, b: again.append(torch.rand(1).item()), BACKEND)
    other.load_state_dict(whole[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.run()
    told += [again, len(caught)]
    if RANK == 0:
        torch.save(whole[0], sys.argv[1] + "/state.pt")
    return told


def main(folder: Path, part: str, times: int, seed: int) -> None:
    """Runs a part and writes what came of it on this rank."""
    told: dict[str, Any] = {}
    if part == "signals":
        told["signals"] = signalled(folder, times, seed)
    else:
        both, one = [0, 1], [1]
        at = Events.ITERATION_COMPLETED(once=5)
        told = {
            "all at an iteration": ended(at, "terminate", both),
            "all at an epoch": ended(Events.EPOCH_COMPLETED(once=2), "terminate", both),
            "all at the start": ended(Events.STARTED, "terminate", both),
            "all while one begins": ended_while_one_begins(),
            "one at an iteration": ended(at, "terminate", one),
            "one in an iteration": ended(Events.ITERATION_STARTED(once=5), "terminate", one),
            "one at an epoch": ended(Events.EPOCH_COMPLETED(once=1), "terminate", one),
            "all an epoch": ended(at, "terminate_epoch", both),
            "one an epoch": ended(at, "terminate_epoch", one),
            "failing": failing(),
            "known lengths": lengths(known=True),
            "unknown lengths": lengths(known=False),
            "learned lengths": learned(),
            "alone": alone(),
            "parted": parted(),
            "unread by 0": unread(folder, 0),
            "unread by 1": unread(folder, 1),
            "states": states(),
            "signals": signalled(folder, times, seed),
            "evaluating": signalled(folder, 3, seed + 1, evaluates=True),
        }
    (folder / f"{RANK}-of-{SIZE}.json").write_text(json.dumps(told))
    BACKEND.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
