"""Every kind of data: the same batches whatever fetches them, and from wherever a run goes on."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dataflow_runs
import numpy as np
import pytest
import torch
from dataflow_cases import CASES
from dataflow_objects import (
    BATCH,
    SIZE,
    EagerSampler,
    GrowingBatches,
    Images,
    LazySampler,
    OwnGeneratorSampler,
    Stream,
    loader,
)
from fork_server import ForkServer
from resume_harness import IMAGES, Record, digest
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from crosstrain.backends import random_state
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    PermutationSampler,
    ResumeWarning,
    manual_seed,
)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    # torch imports the latter when the first optimizer is made, which takes seconds.
    with ForkServer("dataflow_runs", "torch._dynamo", "crosstrain.backends.cpu") as server:
        yield server


def sample(names: list[str], turn: int) -> list[str]:
    """The snapshots to resume from: within an epoch; at its last iteration, or after its end."""
    end = names.index("epoch 1") if "epoch 1" in names else len(names) // 2
    return [names[end // 2], names[end - turn % 2]]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in CASES.items()],
)
def test_a_resumed_run_has_the_same_bits(server: ForkServer, name: str, tmp_path: Path) -> None:
    case, file, report = CASES[name], tmp_path / "straight.pt", tmp_path / "report.json"
    assert server.run(dataflow_runs.run_straight, str(file), name, case.workers[0], 3) == 0
    names, turn = list(torch.load(file)["snapshots"]), list(CASES).index(name)
    snapshots = names[2:3] if case.slow else sample(names, turn)
    for number, snapshot in enumerate(snapshots, 1 + turn // 2):
        workers = case.workers[number % len(case.workers)]
        arguments = (str(file), name, snapshot, workers, 1000 + number, str(report))
        assert server.run(dataflow_runs.run_on, *arguments) == 0
        found = json.loads(report.read_text())["differences"]
        assert found == [], f"resumed at {snapshot} with {workers} workers"


@pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="torch pins no memory without an accelerator"
)
def test_pinned_memory_changes_no_bit() -> None:
    runs = [rows_of(loader(workers=2, shuffle=True, pin_memory=pins)) for pins in (False, True)]
    assert runs[0] == runs[1]


# ---------------------------------------------------------------------- the order is torch's


class Indices(Dataset[int]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> int:
        return index


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sequential": dict,
    "random": lambda: {"shuffle": True},
    "drop_last": lambda: {"shuffle": True, "drop_last": True},
    "replacement": lambda: {"sampler": RandomSampler(Indices(), True)},
    "replacement, 64": lambda: {"sampler": RandomSampler(Indices(), True, 64)},
    "more": lambda: {"sampler": RandomSampler(Indices(), False, 3 * SIZE)},
    "more, uneven": lambda: {"sampler": RandomSampler(Indices(), False, SIZE + 9)},
    "fewer": lambda: {"sampler": RandomSampler(Indices(), False, 9)},
    "subset": lambda: {"sampler": SubsetRandomSampler([5, 1, 8, 9, 30, 31])},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * SIZE, 30)},
    "weighted, once": lambda: {"sampler": WeightedRandomSampler([1.0] * SIZE, 30, False)},
    "distributed": lambda: {"sampler": DistributedSampler(Indices(), 3, 1)},
    "distributed, uneven": lambda: {"sampler": DistributedSampler(Indices(), 7, 6, seed=4)},
    "distributed, drop": lambda: {
        "sampler": DistributedSampler(Indices(), 7, 6, drop_last=True, shuffle=False)
    },
    "more ranks than data": lambda: {"sampler": DistributedSampler([1, 2, 3], 8, 7)},
    "user's": lambda: {"sampler": EagerSampler(SIZE)},
    "user's, lazy": lambda: {"sampler": LazySampler(SIZE)},
    "user's batches": lambda: {"batch_sampler": GrowingBatches()},
    "no batches": lambda: {"shuffle": True, "batch_size": None},
    "generator": lambda: {"shuffle": True, "generator": generator()},
    "sampler's generator": lambda: {"sampler": RandomSampler(Indices(), True, 70, generator())},
    "sampler's generator, more": lambda: {
        "sampler": RandomSampler(Indices(), False, 2 * SIZE, generator())
    },
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ORDERS)
def test_the_order_is_that_of_torch(kind: str, workers: int) -> None:
    """For two epochs, and the global generators are left as torch's own loader leaves them."""
    theirs, ours = ([], []), ([], [])
    options = ORDERS[kind]()
    data = loader(Indices(), workers, **options)
    for epoch in range(2):
        manual_seed(90 + epoch)
        theirs[0].extend([digest(batch) for batch in data])
        theirs[1].append(digest(random_state.capture()))
    theirs[1].append(state_of_generators(data))

    data = loader(Indices(), workers, **ORDERS[kind]())
    engine = DeterministicEngine(lambda _, batch: ours[0].append(digest(batch)), seed=90)
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: ours[1].append(digest(random_state.capture()))
    )
    engine.run(data, max_epochs=2)
    ours[1].append(state_of_generators(data))
    assert ours[0] == theirs[0]
    if kind == "user's, lazy" and workers == 0:
        # torch draws such an order between the draws of the training; ours are those of a loader
        # with workers, which draws it ahead.
        assert len(set(ours[0])) > 10
    else:
        assert ours[1] == theirs[1]


def state_of_generators(data: DataLoader[Any]) -> str:
    sampler = getattr(data.batch_sampler, "sampler", None)
    return digest([g and g.get_state() for g in (data.generator, getattr(sampler, "generator", 0))])


def test_a_permutation_sampler_is_told_the_pass() -> None:
    sampler, seen = PermutationSampler(SIZE, seed=6), []
    engine = DeterministicEngine(lambda _, batch: seen.extend(batch.tolist()))
    engine.run(loader(Indices(), sampler=sampler), max_epochs=3)
    wanted = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        wanted.extend(sampler)
    assert seen == wanted
    assert seen[:SIZE] != seen[SIZE : 2 * SIZE]


# ---------------------------------------------------------------------- who fetches


def rows_of(data: Any, **limits: Any) -> dict[int, list[Any]]:
    engine = DeterministicEngine(lambda _, batch: float(torch.rand(1)), seed=4)
    record = Record(engine)
    engine.run(data, **{"max_epochs": 2, **limits})
    return record.rows


@pytest.fixture(scope="module")
def rows() -> dict[int, list[Any]]:
    return rows_of(loader(shuffle=True))


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 2},
        {"workers": 3},
        {"workers": 2, "persistent_workers": True},
        {"workers": 2, "prefetch_factor": 1},
        {"workers": 2, "prefetch_factor": 5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_bytes_do_not_depend_on_who_fetches(
    rows: dict[int, list[Any]], options: dict[str, Any]
) -> None:
    assert rows_of(loader(shuffle=True, **options)) == rows
    assert len({row[1] for row in rows.values()}) == len(rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_fetching_leaves_the_main_process_its_own_streams(workers: int) -> None:
    """Also where NumPy's generator holds the second of a pair of normal variates."""
    before: list[str] = []

    def step(engine: Any, batch: Any) -> None:
        assert digest(random_state.capture()) == before.pop()
        # An odd number of them, now and then.
        np.random.normal(size=engine.state.iteration % 3)
        random.gauss(0, 1)
        torch.randn(3)

    engine = DeterministicEngine(step, seed=1)

    @engine.on(Events.GET_BATCH_STARTED)
    def look() -> None:
        before[:] = [digest(random_state.capture())]

    # One pass: the next one begins with a seeding.
    engine.run(loader(workers=workers), max_epochs=1)
    assert before == []


def test_a_subset_has_the_samples_of_the_whole() -> None:
    whole = rows_of(loader(), max_epochs=1)
    part = rows_of(loader(Subset(Images(60), range(SIZE))), max_epochs=1)
    assert [row[1] for row in part.values()] == [row[1] for row in whole.values()]


def test_datasets_that_are_stacked_have_streams_of_their_own() -> None:
    stacked: list[Any] = []
    both = StackDataset(Images(), Images())
    DeterministicEngine(lambda _, batch: stacked.append(batch), seed=4).run(loader(both))
    for left, right in stacked:
        assert not torch.equal(left, right)


def test_of_what_was_fetched_only_the_batch_before_is_fetched_once_more() -> None:
    fetched: list[int] = []

    class Noting(Images):
        def __getitem__(self, index: int) -> torch.Tensor:
            fetched.append(index)
            return super().__getitem__(index)

    states: dict[int, Any] = {}
    engine = DeterministicEngine(lambda engine, batch: None, seed=4)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: states.update({len(fetched): engine.state_dict()})
    )
    engine.run(loader(Noting(), shuffle=True))
    whole = list(fetched)
    for before, state in zip([0, *states], states.values(), strict=False):
        fetched.clear()
        resumed = DeterministicEngine(lambda engine, batch: None)
        resumed.load_state_dict(state)
        resumed.run(loader(Noting(), shuffle=True))
        assert fetched == whole[before:]


# ---------------------------------------------------------------------- in one process


PAUSES = (Events.ITERATION_COMPLETED, Events.GET_BATCH_STARTED, Events.ITERATION_STARTED)


DATA: dict[str, Any] = {
    "loader": loader(shuffle=True),
    "stream": loader(Stream()),
    "list": [IMAGES[:8], IMAGES[8:16], IMAGES[16:20]],
}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("event", PAUSES)
def test_an_interrupted_run_goes_on(event: Any, kind: str) -> None:
    data = DATA[kind]
    wanted = rows_of(data)
    engine = DeterministicEngine(lambda _, batch: float(torch.rand(1)), seed=4)
    record = Record(engine)
    engine.add_event_handler(event(every=3), lambda: engine.interrupt())
    ended: list[bool] = []
    engine.add_event_handler(Events.COMPLETED, lambda: ended.append(True))
    engine.run(data, max_epochs=2)
    pauses = 0
    while not ended:
        pauses += 1
        engine.run(data)
    assert pauses > 1
    assert record.rows == wanted


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("new_loader", [False, True])
def test_a_run_left_by_an_exception_goes_on_with_the_next_batch(
    workers: int, new_loader: bool
) -> None:
    """The batches are those of the whole run; the failed one comes again."""
    wanted = [row[1] for row in rows_of(loader(workers=workers, shuffle=True)).values()]
    seen: list[str] = []
    failed: list[int] = []

    def step(engine: Any, batch: Any) -> None:
        if engine.state.iteration in (3, 6, 7) and engine.state.iteration not in failed:
            failed.append(engine.state.iteration)
            raise KeyError(engine.state.iteration)
        seen.append(digest(batch))

    engine = DeterministicEngine(step, seed=4)
    data = loader(workers=workers, shuffle=True)
    for _ in range(4):
        try:
            engine.run(data, max_epochs=2)
        except KeyError:
            data = loader(workers=workers, shuffle=True) if new_loader else data
    assert seen == wanted
    assert failed == [3, 6, 7]


@pytest.mark.parametrize("kind", ["loader", "loader, workers", "stream", "list", "iterator"])
def test_after_terminate_the_data_goes_on_where_it_was(kind: str) -> None:
    """The next run begins another epoch, and takes the next batches of the same passes."""

    def make() -> Any:
        if kind == "iterator":
            return iter(list(IMAGES[:256].split(BATCH)))
        return loader(workers=2, shuffle=True) if kind == "loader, workers" else DATA[kind]

    def run(*stops: int) -> list[str]:
        seen: list[str] = []
        engine = DeterministicEngine(lambda _, batch: seen.append(digest(batch)), seed=4)
        data = make()
        for stop in stops:
            engine.add_event_handler(
                Events.ITERATION_COMPLETED(once=stop), lambda: engine.terminate()
            )
            engine.run(data, max_epochs=20, epoch_length=4)
        return seen

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResumeWarning)
        assert run(2, 7, 9, 16) == run(16)


def test_a_longer_limit_goes_on_as_one_run() -> None:
    wanted = rows_of(loader(shuffle=True), max_epochs=4)
    engine = DeterministicEngine(lambda _, batch: float(torch.rand(1)), seed=4)
    record = Record(engine)
    for limit in (1, 2, 4):
        # The engine's own rule: a run that has reached its limit begins anew, unless it is loaded.
        engine.load_state_dict(engine.state_dict()) if record.rows else None
        engine.run(loader(shuffle=True), max_epochs=limit)
    assert record.rows == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_own_generators_are_left_where_the_batches_taken_leave_them(workers: int) -> None:
    """However far workers have drawn ahead when an epoch, or the run, is ended."""

    def run(workers: int) -> tuple[Any, Any]:
        sampler = OwnGeneratorSampler(SIZE)
        engine = DeterministicEngine(lambda _, batch: None, seed=4)
        record = Record(engine)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(every=3), lambda: engine.terminate_epoch()
        )
        engine.run(loader(workers=workers, sampler=sampler), max_epochs=3)
        return record.rows, [str(g.__getstate__()) for g in sampler.generators]

    assert run(workers) == run(1)


class Wrapping(DataLoader[Any]):
    """Wraps a loader, and is one by name only: its constructor does not call the other's."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.loader)


def test_a_loader_that_only_wraps_another_resumes_exactly() -> None:
    def run(state: Any = None, stop: int = 0) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        engine = DeterministicEngine(lambda engine, batch: seen.append(batch.tolist()))
        if state is not None:
            engine.load_state_dict(state)
        if stop:
            engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), engine.terminate)
        torch.manual_seed(3)
        engine.run(Wrapping(DataLoader(range(20), 4, shuffle=True)), max_epochs=2)  # type: ignore[arg-type]
        return engine.state_dict(), seen

    _, straight = run()
    state, before = run(stop=7)
    with pytest.warns(ResumeWarning, match="Wrapping offers no state_dict"):
        _, after = run(state)
    assert before + after == straight
