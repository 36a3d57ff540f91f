"""Data that a run cannot go on with exactly is refused, or warned of, by name."""

from __future__ import annotations

import itertools
import queue
import threading
import warnings
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import pytest
import torch
from dataflow_objects import BATCH, Images, Stream, loader
from resume_harness import IMAGES, digest
from torch.utils.data import DataLoader, SequentialSampler, Subset

from crosstrain.engine import DeterministicEngine, Events, ResumeWarning


def state_after(data: Any, iterations: int, **options: Any) -> dict[str, Any]:
    engine = DeterministicEngine(lambda _, batch: None, seed=4)
    states: list[Any] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=iterations), lambda: states.append(engine.state_dict())
    )
    engine.run(data, **options)
    return states[0]


def resume(state: dict[str, Any], data: Any) -> None:
    engine = DeterministicEngine(lambda _, batch: None)
    engine.load_state_dict(state)
    engine.run(data)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: loader(shuffle=True, batch_size=4), "batch size: 8 then, 4 now"),
        (lambda: loader(Images(50), shuffle=True), "samples: 44 then, 50 now"),
        (lambda: loader(), "sampler: 'RandomSampler' then, 'SequentialSampler' now"),
        (lambda: [IMAGES[:8]] * 6, "kind: 'a DataLoader over a map-style dataset' then, 'a seq"),
        (lambda: loader(shuffle=True, drop_last=True), "batches: 6 then, 5 now"),
    ],
)
def test_other_data_is_refused_by_what_differs(change: Callable[[], Any], named: str) -> None:
    state = state_after(loader(shuffle=True), 2)
    with pytest.raises(ValueError, match=named):
        resume(state, change())


def test_after_a_refusal_the_right_data_goes_on() -> None:
    batches: list[str] = []
    engine = DeterministicEngine(lambda _, batch: batches.append(digest(batch)), seed=4)
    engine.run(loader(shuffle=True), max_epochs=2)
    resumed: list[str] = []
    engine = DeterministicEngine(lambda _, batch: resumed.append(digest(batch)))
    engine.load_state_dict(state_after(loader(shuffle=True), 8, max_epochs=2))
    for _ in range(2):
        with pytest.raises(ValueError, match="batch size"):
            engine.run(loader(shuffle=True, batch_size=4))
    engine.run(loader(shuffle=True))
    assert resumed == batches[8:]


def test_another_number_of_workers_is_refused_where_each_has_its_own_data() -> None:
    state = state_after(loader(Stream(), 2), 2)
    with pytest.raises(ValueError, match="workers: 2 then, 1 now"):
        resume(state, loader(Stream(), 1))


def test_a_missing_generator_is_refused_by_name() -> None:
    state = state_after(loader(shuffle=True, generator=torch.Generator()), 2)
    with pytest.raises(ValueError, match=r"generators of the data named \['generator'\]"):
        resume(state, loader(shuffle=True))


def test_data_that_ends_before_the_position_is_refused() -> None:
    state = state_after(iter([1, 2, 3, 4]), 3, epoch_length=4)
    with (
        pytest.warns(ResumeWarning, match="its first 3 batches are fetched and thrown away"),
        pytest.raises(RuntimeError, match="gave 2 batches, but the run to go on with had taken 3"),
    ):
        resume(state, iter([1, 2]))


class OwnOrder(DataLoader[Any]):
    """As some libraries have it: a loader that keeps an iterator over a sampler of its own."""

    def __iter__(self) -> Any:
        sampler = SequentialSampler(range(len(IMAGES)))
        return iter(DataLoader(self.dataset, self.batch_size, sampler=sampler))


def test_a_loader_that_does_not_ask_its_batch_sampler_is_refused() -> None:
    engine = DeterministicEngine(lambda _, batch: None)
    with pytest.raises(RuntimeError, match="OwnOrder does not take its batches from its batch_sam"):
        engine.run(OwnOrder(IMAGES, BATCH))


class LooksForItsSampler(DataLoader[Any]):
    """As timm's for several epochs: it asks a batch sampler of its own class how long it is."""

    def __iter__(self) -> Any:
        sampler: Any = self.batch_sampler
        yield from itertools.islice(super().__iter__(), len(sampler.own))


def test_a_loader_that_stumbles_over_what_was_put_into_it_is_told_why() -> None:
    engine = DeterministicEngine(lambda _, batch: None)
    with pytest.raises(AttributeError) as caught:
        engine.run(LooksForItsSampler(IMAGES, BATCH))
    assert "LooksForItsSampler iterates in a way of its own" in caught.value.__notes__[0]


class InAThread(DataLoader[Any]):
    """Fetches ahead in a thread of this process."""

    def __iter__(self) -> Any:
        fetched: queue.Queue[Any] = queue.Queue(1)
        batches = super().__iter__()

        def fetch() -> None:
            for batch in batches:
                fetched.put(batch)
            fetched.put(None)

        threading.Thread(target=fetch, daemon=True).start()
        return iter(fetched.get, None)


def test_a_loader_that_fetches_in_a_thread_is_told() -> None:
    """It draws from what the step draws from; with workers it does not."""
    engine = DeterministicEngine(lambda _, batch: None)
    with pytest.warns(ResumeWarning, match="InAThread fetches in a thread of its own") as caught:
        engine.run(InAThread(IMAGES, BATCH), max_epochs=1)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        DeterministicEngine(lambda _, batch: None).run(InAThread(IMAGES, BATCH, num_workers=1))


class Closed(MutableMapping[str, Any]):
    """A file of another package's that is a mapping as long as it is open."""

    def __len__(self) -> int:
        raise ValueError("it is closed")

    __getitem__ = __setitem__ = __delitem__ = __iter__ = __len__  # type: ignore[assignment]


closed = Closed()


class Reads(Images):
    def __getitem__(self, index: int) -> Any:
        assert closed is not None
        return super().__getitem__(index)


def test_a_mapping_that_cannot_be_measured_is_passed_over() -> None:
    DeterministicEngine(lambda _, batch: None).run(loader(Reads()))


class OwnNoise(Images):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)


def test_a_dataset_with_a_generator_of_its_own_is_warned_of() -> None:
    engine = DeterministicEngine(lambda _, batch: None)
    own = r"holds random generators of its own: dataset\.rng\."
    with pytest.warns(ResumeWarning, match=own) as warned:
        engine.run(loader(OwnNoise()))
    # Where the user can do something about it.
    assert [one.filename for one in warned] == [__file__]
    with pytest.warns(ResumeWarning, match=r"dataset\.dataset\.rng"):
        engine.run(loader(Subset(OwnNoise(), range(9))))
