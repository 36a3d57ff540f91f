"""Data keeps more than its position: what handlers change, odd states, hidden draws."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from crosstrain.engine import Checks, DeterministicEngine, Events, ResumeError, ResumeWarning

SIZE, BATCH, EPOCHS = 12, 4, 3
Attach = Callable[[DeterministicEngine, Any], None]


class Rows(Dataset[Any]):
    """Samples that follow from attributes, which handlers change."""

    def __init__(self, size: int = SIZE) -> None:
        self.shift, self.size = 0.0, size
        self.negatives: Any = np.zeros(size)
        self.cache: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, self.shift, self.negatives[index]], dtype=torch.float64)


class Caching(Rows):
    """Keeps the noise that it has drawn once."""

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = torch.rand(())
        return super().__getitem__(index) + self.cache[index]


class Stream(IterableDataset[Any]):
    """Has a state, which tells its position or something else."""

    def __init__(self, how: str = "position", draw: Callable[[], float] = lambda: 0.0) -> None:
        self.how, self.draw = how, draw
        self.start = self.place = 0
        self.shift = 0.0

    def __iter__(self) -> Iterator[Any]:
        self.place = self.start
        while self.place < SIZE:
            self.place += 1
            yield torch.tensor([self.place, self.shift, self.draw(), torch.rand(())])
        self.start = self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.place if self.how == "position" else self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


class Counted(Stream):
    """Has a state for whoever counts its samples, as streaming libraries have it."""

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:  # type: ignore[override]
        return {"start": num_samples}


def _play(
    data: Any, attach: Attach = lambda engine, data: None, state: Any = None, **options: Any
) -> tuple[dict[int, Any], dict[int, Any], DeterministicEngine]:
    seen: dict[int, Any] = {}
    states: dict[int, Any] = {}

    def step(engine: Any, batch: Any) -> None:
        seen[engine.state.iteration] = batch.tolist(), float(torch.rand(()))

    engine = DeterministicEngine(step, seed=4, **options)
    attach(engine, data)
    for event in (Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED):
        engine.add_event_handler(
            event, lambda: states.update({engine.state.iteration: engine.state_dict()})
        )
    if state is not None:
        engine.load_state_dict(state)
    engine.run(data, max_epochs=EPOCHS)
    return seen, states, engine


def _resumes(make: Callable[[], Any], attach: Attach = lambda engine, data: None) -> None:
    straight, states, _ = _play(make(), attach)
    for iteration in (1, 2, 3, 4, 6, 7):
        rest, _, _ = _play(make(), attach, states[iteration])
        assert rest == {at: row for at, row in straight.items() if at > iteration}


def _loader(data: Any, **options: Any) -> Any:
    return DataLoader(data, BATCH, shuffle=not isinstance(data, IterableDataset), **options)


# ------------------------------------------------------------------- what handlers change


def _of(data: Any) -> Any:
    found = data.dataset
    while not hasattr(found, "shift"):
        found = found.datasets[0] if isinstance(found, ConcatDataset) else found.dataset
    return found


def _shifts(event: Any) -> Attach:
    def attach(engine: DeterministicEngine, data: Any) -> None:
        def shift() -> None:
            _of(data).shift += float(torch.rand(()))

        engine.add_event_handler(event, shift)

    return attach


def _draws(engine: DeterministicEngine, data: Any) -> None:
    def draw() -> None:
        _of(data).negatives = np.random.rand(SIZE)

    engine.add_event_handler(Events.EPOCH_STARTED, draw)


WRAPPED: dict[str, Callable[[], Any]] = {
    "itself": Rows,
    "subset": lambda: Subset(Rows(), range(SIZE)),
    "concat": lambda: ConcatDataset([Rows(6), Rows(6)]),
}


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.GET_BATCH_STARTED(once=2)])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_what_handlers_change_of_a_dataset_is_as_it_was(event: Any, wrapped: str) -> None:
    _resumes(lambda: _loader(WRAPPED[wrapped]()), _shifts(event))


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
def test_what_handlers_change_of_a_stream_is_as_it_was() -> None:
    for how in ("position", "start"):
        _resumes(lambda how=how: _loader(Stream(how)), _shifts(Events.EPOCH_STARTED))


@pytest.mark.parametrize("workers", [0, 2])
def test_negatives_of_each_epoch_are_compared_before_others_are_drawn(workers: int) -> None:
    straight, states, _ = _play(_loader(Rows(), num_workers=workers), _draws)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest, _, engine = _play(_loader(Rows(), num_workers=workers), _draws, states[3])
    assert rest == {at: row for at, row in straight.items() if at > 3}
    assert "batch 3 of pass 1 fetched once more" in engine.proof.checked[0]


def test_a_cache_goes_on_or_is_told() -> None:
    _resumes(lambda: _loader(Caching()))

    def many(engine: DeterministicEngine, data: Any) -> None:
        data.dataset.cache = {}
        engine.add_event_handler(
            Events.STARTED, lambda: data.dataset.cache.update(zip(range(5000), itertools.repeat(0)))
        )

    with pytest.warns(ResumeWarning, match=r"without what has changed of dataset\.cache"):
        _play(_loader(Rows()), many)
    with pytest.raises(ResumeError, match=r"dataset\.cache"):
        _play(_loader(Rows()), many, checks=Checks(unnamed="error"))


class Opening(Rows):
    """Opens a file when it is first needed, and notes that it has."""

    file: Any = None
    opened = False

    def __getitem__(self, index: int) -> Any:
        if not self.opened:
            self.file, self.opened = object(), True
        assert self.file is not None
        return super().__getitem__(index)


def test_what_goes_with_an_open_file_is_left_alone() -> None:
    _resumes(lambda: _loader(Opening()))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_have_what_a_handler_of_the_epochs_beginning_has_changed(persistent: bool) -> None:
    many = {"num_workers": 2, "persistent_workers": persistent}
    plain, _, _ = _play(_loader(Rows()), _draws)
    rows, states, _ = _play(_loader(Rows(), **many), _draws)
    assert rows == plain
    rest, _, _ = _play(_loader(Rows(), **many), _draws, states[4])
    assert rest == {at: row for at, row in plain.items() if at > 4}


# ------------------------------------------------------------- states that tell something else


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
@pytest.mark.parametrize("batched", [False, True])
def test_a_state_that_keeps_its_start_is_entered_there(batched: bool) -> None:
    _resumes(lambda: _loader(Stream("start")) if batched else Stream("start"))
    _, states, _ = _play(_loader(Stream("start")))
    with pytest.warns(ResumeWarning, match="does not tell its position"):
        _, _, engine = _play(_loader(Stream("start")), state=states[2])
    assert "batch 2 of pass 1 fetched once more" in engine.proof.checked[0]


def test_a_state_that_takes_arguments_is_none_of_ours() -> None:
    _, states, _ = _play(_loader(Counted()))
    with pytest.warns(ResumeWarning, match="take no further arguments.* fetched and thrown away"):
        _play(_loader(Counted()), state=states[2])


# -------------------------------------------------------------------------------- hidden draws


def _hidden() -> Callable[[], float]:
    generator = random.Random(3)
    return lambda: generator.random()


class Hidden(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.draw = _hidden()

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + self.draw()


def _sets_anew(engine: DeterministicEngine, data: Any) -> None:
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: engine.set_data(data))


def _listens(engine: DeterministicEngine, data: Any) -> None:
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: None)


@pytest.mark.parametrize("iteration", [2, 3])
def test_a_state_that_does_not_tell_all_is_found_by_fetching_twice(iteration: int) -> None:
    _, states, _ = _play(_loader(Stream(draw=_hidden())))
    with pytest.raises(ResumeError, match="fetched twice from the same states, and in it"):
        _play(_loader(Stream(draw=_hidden())), state=states[iteration])
    _, states, _ = _play(_loader(Stream()))
    _, _, engine = _play(_loader(Stream()), state=states[iteration])
    assert "fetched twice from the same states" in engine.proof.checked[0]


def test_hidden_draws_are_found_where_data_is_set_anew_as_an_epoch_begins() -> None:
    _, states, _ = _play(_loader(Hidden()), _sets_anew)
    with pytest.raises(ResumeError, match="batch 1 of pass 2 was fetched twice"):
        _play(_loader(Hidden()), _sets_anew, states[3])
    _resumes(lambda: _loader(Rows()), _sets_anew)


def test_hidden_draws_are_told_where_handlers_begin_an_epoch() -> None:
    _, states, _ = _play(_loader(Hidden()), _listens)
    with pytest.warns(ResumeWarning, match="if they change the data for their epoch"):
        _play(_loader(Hidden()), _listens, states[3])


# ------------------------------------------------------------------------ ends that are asked for


def test_an_epochs_end_is_kept_although_other_events_fire_between() -> None:
    """The checkpoint before has been written meanwhile, of which an event tells."""

    def ends(engine: DeterministicEngine, data: Any) -> None:
        engine.register_events("told")
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(event_filter=lambda _, at: at in (2, 4)),
            lambda: (engine.terminate_epoch(), engine.fire_event("told")),
        )

    _resumes(lambda: _loader(Rows()), ends)


class Batches:
    """A batch sampler of no class of torch's, which counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        self.passes += 1
        for number in range(3):
            yield [(number * 3 + self.passes + index) % SIZE for index in range(4)]


def test_a_batch_sampler_of_any_class_keeps_its_attributes() -> None:
    _resumes(lambda: DataLoader(Rows(), batch_sampler=Batches()))  # type: ignore[arg-type]


def test_a_pass_that_has_ended_is_entered_at_its_end_without_a_comparison() -> None:
    make = lambda: DataLoader(Rows(), batch_sampler=Batches())  # type: ignore[arg-type]  # noqa: E731
    straight, states, _ = _play(make())
    rest, _, _ = _play(make(), state=states[3], checks=Checks(batch_before="off"))
    assert rest == {at: row for at, row in straight.items() if at > 3}
