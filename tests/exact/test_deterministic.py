"""DeterministicEngine and its helpers: pytorch-ignite's documented behaviour, and its state."""

from __future__ import annotations

import gc
import io
import multiprocessing
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ignite.engine
import ignite.engine.deterministic
import ignite.utils
import numpy as np
import pytest
import torch
from resume_harness import IMAGES, digest
from torch.utils.data import DataLoader, Dataset

from crosstrain import backends
from crosstrain.backends import random_state
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    current_sample,
    keep_random_state,
    manual_seed,
)

# ---------------------------------------------------------------------- the documented traces

# What torch 2.9 to 2.13 sample under manual_seed(56).
TRACE = [
    [[2, 17, 35, 32], [30, 13, 38, 11], [21, 16, 25, 29], [22, 3, 18, 31], [28, 39, 36, 14]],
    [[5, 15, 6, 1], [27, 9, 8, 23], [20, 24, 12, 0], [37, 7, 4, 19], [33, 10, 26, 34]],
]


def numbers(size: int, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(torch.arange(0, size), batch_size=4, shuffle=True, num_workers=workers)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_trace_of_the_documentation(workers: int) -> None:
    rows: list[Any] = []

    def step(engine: Any, batch: Any) -> None:
        rows.append((engine.state.epoch, engine.state.iteration, batch.tolist()))

    trainer = DeterministicEngine(step)
    manual_seed(56)
    trainer.run(numbers(40, workers), max_epochs=2, epoch_length=5)
    wanted = [(1, 1 + i, batch) for i, batch in enumerate(TRACE[0])]
    wanted += [(2, 6 + i, batch) for i, batch in enumerate(TRACE[1])]
    assert rows == wanted

    rows.clear()
    trainer.load_state_dict({"epoch": 1, "epoch_length": 5, "max_epochs": 2, "rng_states": None})
    manual_seed(56)
    trainer.run(numbers(40, workers))
    assert rows == wanted[5:]


def draws_of(*handlers: Callable[[], Any]) -> list[int]:
    def data() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(0, 100, size=(1,))

    rows: list[int] = []
    trainer = DeterministicEngine(lambda engine, batch: rows.append(batch.item()))
    for handler in handlers:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
    manual_seed(9)
    trainer.run(data(), max_epochs=3, epoch_length=5)
    return rows


def disturb() -> None:
    torch.manual_seed(12)
    torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    np.random.normal()


def test_the_second_trace_of_the_documentation() -> None:
    rows = draws_of(disturb)
    assert rows[3:] == [3, 22, 77] * 4
    assert rows[:3] == draws_of()[:3]


def test_keep_random_state_leaves_no_mark() -> None:
    assert draws_of(keep_random_state(disturb)) == draws_of()
    assert len(set(draws_of())) > 10


def test_keep_random_state_keeps_what_the_function_is() -> None:
    @keep_random_state
    def halve(value: int, by: int = 2) -> float:
        """Halves."""
        random.random()
        np.random.normal()
        torch.rand(1)
        if value < 0:
            raise ValueError("negative")
        return value / by

    np.random.normal()
    before = digest(random_state.capture())
    assert halve(3) == 1.5
    assert halve(3, by=3) == 1.0
    with pytest.raises(ValueError, match="negative"):
        halve(-1)
    assert digest(random_state.capture()) == before
    assert (halve.__name__, halve.__doc__) == ("halve", "Halves.")


def test_manual_seed_seeds_all_three() -> None:
    manual_seed(3)
    first = (random.random(), np.random.rand(), torch.rand(1).item())
    manual_seed(3)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    with pytest.raises(ValueError, match="from 0 to"):
        manual_seed(-1)


# ---------------------------------------------------------------------- pytorch-ignite's states


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iteration", [7, 10, 13])
def test_a_checkpoint_of_ignite_goes_on_with_its_batches(iteration: int, workers: int) -> None:
    """At any iteration; pytorch-ignite itself does so within an epoch only with workers."""
    theirs: list[Any] = []
    engine = ignite.engine.deterministic.DeterministicEngine(
        lambda engine, batch: theirs.append(batch.tolist())
    )
    file = io.BytesIO()

    @engine.on(ignite.engine.Events.ITERATION_COMPLETED(once=iteration))
    def save() -> None:
        torch.save({"trainer": engine.state_dict()}, file)

    ignite.utils.manual_seed(8)
    engine.run(numbers(40, workers), max_epochs=2)
    file.seek(0)
    # Their states hold NumPy's arrays, so they need pickle.
    state = torch.load(file, weights_only=False)["trainer"]

    ours: list[Any] = []
    resumed = DeterministicEngine(lambda engine, batch: ours.append(batch.tolist()))
    words: list[int] = []
    resumed.add_event_handler(
        Events.ITERATION_COMPLETED(once=iteration + 1), lambda: words.extend(random.getstate()[1])
    )
    resumed.load_state_dict(state)
    manual_seed(8)
    resumed.run(numbers(40, workers))
    assert ours == theirs[iteration:]
    assert (resumed.state.iteration, resumed.state.epoch) == (20, 2)
    # Restored within an epoch; at its beginning they follow from the seed.
    assert (words == list(state["rng_states"][0][1])) == (iteration != 10)


# ---------------------------------------------------------------------- the arithmetic


def without_deterministic_kernel(engine: Any, batch: Any) -> torch.Tensor:
    return torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def test_an_operation_without_a_deterministic_kernel_is_named() -> None:
    backend = backends.get("cpu").open()
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        DeterministicEngine(without_deterministic_kernel, backend).run(numbers(8))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        DeterministicEngine(without_deterministic_kernel, backend, warn_only=True).run(numbers(8))
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_flags_are_set_during_the_run_and_restored_after_it() -> None:
    seen: list[bool] = []

    def step(engine: Any, batch: Any) -> None:
        seen.append(torch.are_deterministic_algorithms_enabled())
        if engine.state.iteration == 2:
            engine.interrupt()
        if engine.state.iteration == 4:
            raise OSError

    engine = DeterministicEngine(step, backends.get("cpu").open())
    engine.run(numbers(20), max_epochs=2)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(OSError):
        engine.run()
    assert not torch.are_deterministic_algorithms_enabled()
    assert seen == [True] * 4


# ---------------------------------------------------------------------- one sample's streams


class Drawing(Dataset[Any]):
    """Draws from a sample's own streams, and not from the global ones."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        own = current_sample()
        drawn = [own.torch(0), own.torch(1), own.numpy(), own.numpy(1), own.python(), own.python(1)]
        values = [float(torch.rand(1, generator=g)) for g in drawn[:2]]
        values += [float(g.random()) for g in drawn[2:]]
        return torch.tensor([index, *values], dtype=torch.float64)


@pytest.mark.parametrize("streams", [("python", "numpy", "torch"), ("torch",), ()])
def test_current_sample_gives_streams_that_follow_from_the_sample(streams: Any) -> None:
    runs: list[torch.Tensor] = []
    for workers in (0, 2):
        rows: list[torch.Tensor] = []
        engine = DeterministicEngine(
            lambda engine, batch, rows=rows: rows.append(batch), seed=1, streams=streams
        )
        engine.run(DataLoader(Drawing(), 5, num_workers=workers), max_epochs=2)
        runs.append(torch.cat(rows))
    assert torch.equal(*runs)
    # Every one of them is another: each sample's, each purpose's, each epoch's.
    assert len(runs[0][:, 1:].unique()) == runs[0][:, 1:].numel() == 24 * 6


def test_current_sample_is_refused_where_no_sample_is_fetched() -> None:
    seen: list[str] = []

    def step(engine: Any, batch: Any) -> None:
        with pytest.raises(RuntimeError, match="where no DeterministicEngine fetches a sample"):
            current_sample()
        seen.append("refused")

    DeterministicEngine(step).run(DataLoader(Drawing(), 4))
    assert seen == ["refused"] * 3
    with pytest.raises(RuntimeError, match="where no DeterministicEngine fetches a sample"):
        Drawing()[0]


def test_only_the_streams_that_were_asked_for_are_keyed() -> None:
    """The others are the main process's own, which fetching then moves."""
    values: list[Any] = []

    class Global(Drawing):
        def __getitem__(self, index: int) -> torch.Tensor:
            values.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return torch.zeros(1)

    for streams in (("torch",), ("torch", "numpy"), ("torch", "numpy", "python")):
        DeterministicEngine(lambda *_: None, seed=1, streams=streams).run(DataLoader(Global(), 4))
    python, numpy_, torch_ = ([row[i] for row in values] for i in range(3))
    assert torch_[:12] == torch_[12:24] == torch_[24:]
    assert numpy_[:12] != numpy_[12:24] == numpy_[24:]
    assert python[:12] == python[12:24] != python[24:]
    with pytest.raises(ValueError, match=r"streams has \['cuda'\]; legal values: python, numpy"):
        DeterministicEngine(lambda *_: None, streams=["cuda"])
    with pytest.raises(ValueError, match="seed is an integer from 0 to"):
        DeterministicEngine(lambda *_: None, seed=-5)


# ---------------------------------------------------------------------- letting go


def leave_by_exception(engine: Any) -> None:
    raise OSError("enough")


LEAVE: dict[str, Callable[[Any], None]] = {
    "terminate": lambda engine: engine.terminate(),
    "exception": leave_by_exception,
    "end": lambda engine: None,
}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("how", LEAVE)
def test_workers_stop_with_the_run(how: str, persistent: bool) -> None:
    data = DataLoader(
        IMAGES,  # type: ignore[arg-type]
        8,
        shuffle=True,
        num_workers=2,
        persistent_workers=persistent,
    )
    before = set(multiprocessing.active_children())
    during: list[int] = []

    def step(engine: Any, batch: Any) -> None:
        during.append(len(set(multiprocessing.active_children()) - before))
        if engine.state.iteration == 3:
            LEAVE[how](engine)

    engine = DeterministicEngine(step)
    if how == "exception":
        with pytest.raises(OSError, match="enough"):
            engine.run(data, max_epochs=2, epoch_length=4)
    else:
        engine.run(data, max_epochs=2, epoch_length=4)
    assert set(during) == {2}
    assert set(multiprocessing.active_children()) == before


def test_nothing_keeps_an_engine_or_its_data() -> None:
    """Workers that inherit a cycle would run finalizers that are not theirs."""
    gc.collect()
    gc.disable()
    try:
        data = numbers(20)
        engine = DeterministicEngine(lambda engine, batch: None, backends.get("cpu").open())
        engine.run(data, max_epochs=2)
        state = engine.state_dict()
        left = [weakref.ref(engine), weakref.ref(data), weakref.ref(data.batch_sampler)]
        del engine, data
        assert [reference() for reference in left] == [None] * 3
        assert state["iteration"] == 10
    finally:
        gc.enable()
