"""Data keeps more than its position: what handlers change, odd states, hidden draws.

One file, although it is long: all of it is resumed, and compared, in one way.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)
from torchdata import nodes
from torchdata.stateful_dataloader import StatefulDataLoader

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
    ResumeError,
    ResumeWarning,
    manual_seed,
)

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
    data: Any,
    attach: Attach = lambda engine, data: None,
    state: Any = None,
    epoch_length: int | None = None,
    **options: Any,
) -> tuple[dict[int, Any], dict[int, Any], DeterministicEngine]:
    seen: dict[int, Any] = {}
    states: dict[int, Any] = {}
    # What handlers of the first beginning draw is the same in each run, but for one that goes on.
    manual_seed(1 if state is None else 2)

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
    engine.run(data, max_epochs=EPOCHS, epoch_length=epoch_length)
    return seen, states, engine


def _resumes(make: Callable[[], Any], attach: Attach = lambda engine, data: None) -> None:
    straight, states, _ = _play(make(), attach)
    for iteration in (2, 3, 7):
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


class Shuffled(IterableDataset[Any]):
    """Its order follows from what a handler sets."""

    shift = 0.0

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng(int(self.shift)).permutation(SIZE)
        return iter(torch.tensor([at, self.shift, torch.rand(())]) for at in order)


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
@pytest.mark.parametrize(("make", "workers"), [(Rows, 0), (Rows, 2), (Shuffled, 0), (Shuffled, 2)])
def test_a_pass_longer_than_an_epoch_goes_on_as_it_was_opened(make: Any, workers: int) -> None:
    """What a handler of the next epoch's beginning sets is for the pass after it."""

    def attach(engine: DeterministicEngine, data: Any) -> None:
        @engine.on(Events.EPOCH_STARTED)
        def shift() -> None:
            data.dataset.shift = float(engine.state.epoch)

    def play(state: Any = None) -> Any:
        data = _loader(make(), num_workers=workers)
        return _play(data, attach, state, epoch_length=2)

    straight, states, _ = play()
    for iteration in (1, 2, 4):
        assert play(states[iteration])[0] == {k: v for k, v in straight.items() if k > iteration}


# ------------------------------------------------------------- states that tell something else


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
@pytest.mark.parametrize("batched", [False, True])
def test_a_state_that_keeps_its_start_is_entered_there(batched: bool) -> None:
    _resumes(lambda: _loader(Stream("start")) if batched else Stream("start"))
    _, states, _ = _play(_loader(Stream("start")))
    with pytest.warns(ResumeWarning, match="tells no position"):
        _, _, engine = _play(_loader(Stream("start")), state=states[2])
    assert "batch 2 of pass 1 fetched once more" in engine.proof.checked[0]


def _nodes() -> Any:
    rows = nodes.Mapper(nodes.IterableWrapper(range(SIZE)), lambda row: row * 2)
    return nodes.Loader(nodes.Mapper(nodes.Batcher(rows, BATCH), torch.tensor))


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
def test_a_pipeline_of_nodes_goes_on_from_a_pass_s_last_batch_and_end() -> None:
    """Its state of an end begins the next pass when it is loaded."""
    _resumes(_nodes)
    states: dict[int, Any] = {}

    def keep(engine: Any, data: Any) -> None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda: states.update({engine.state.iteration: engine.state_dict()}),
        )

    straight, _, _ = _play(_nodes(), keep)
    for iteration, state in dict(states).items():
        rest, _, _ = _play(_nodes(), state=state)
        assert rest == {at: row for at, row in straight.items() if at > iteration}


class Pairs:
    """Zips two loaders, of which the shorter begins anew when it ends."""

    def __init__(self) -> None:
        self.longer = DataLoader(range(SIZE), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]
        self.shorter = DataLoader(range(100, 104), batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.longer)

    def __iter__(self) -> Iterator[Any]:
        for one, other in zip(self.longer, self._cycle(), strict=False):
            yield torch.cat([one, other])

    def _cycle(self) -> Iterator[Any]:
        while True:
            yield from self.shorter


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
def test_two_loaders_in_one_iterable_go_on_together() -> None:
    _resumes(Pairs)


def test_a_state_that_takes_arguments_is_none_of_ours() -> None:
    _, states, _ = _play(_loader(Counted()))
    with pytest.warns(ResumeWarning, match="take no further arguments.* fetched and thrown away"):
        _play(_loader(Counted()), state=states[2])


class Wrapping:
    """Wraps a loader, and has methods for a state that it has not got, as its loader has none."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> Any:
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.loader.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
def test_a_state_that_cannot_be_asked_for_is_none() -> None:
    def make() -> Any:
        return Wrapping(DataLoader(Rows(), BATCH, shuffle=True))

    _resumes(make)
    _, states, _ = _play(make())
    with pytest.warns(ResumeWarning, match="a state_dict that raises an error, so its first 2 "):
        _play(make(), state=states[2])


class Following(IterableDataset[Any]):
    """Loaded where a pass has given all, it goes on with the next pass at once."""

    def __init__(self) -> None:
        self.number = self.place = 0

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[Any]:
        if self.place == SIZE:
            self._end()
        while self.place < SIZE:
            self.place += 1
            yield torch.tensor([self.place, self.number, 0.0, torch.rand(())])
        self._end()

    def _end(self) -> None:
        self.number, self.place = self.number + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.place = state["number"], state["place"]


class Numbered(Following):
    """Is told which epoch it is, and goes on where it was loaded in that epoch only."""

    loaded: dict[str, Any] | None = None
    began = 0

    def __iter__(self) -> Iterator[Any]:
        then, self.began = self.loaded, self.number
        self.place = then["place"] if then is not None and then["number"] == self.number else 0
        while self.place < SIZE:
            self.place += 1
            yield torch.tensor([self.place, self.number, 0.0, torch.rand(())])

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.began, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = dict(state)


def _tells_the_epoch(engine: DeterministicEngine, data: Any) -> None:
    def tell() -> None:
        data.dataset.number = engine.state.epoch

    engine.add_event_handler(Events.EPOCH_STARTED, tell)


def test_a_pass_whose_end_nobody_had_asked_for_ends_all_the_same() -> None:
    _resumes(lambda: _loader(Following()))
    _resumes(lambda: _loader(Numbered()), _tells_the_epoch)
    _resumes(lambda: _loader(Stream()), _tells_the_epoch)


class Coarse(Stream):
    """Has a state that moves with every eighth sample only."""

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.place // 8 * 8}


class Shuffled(Stream):
    """Has a buffer from which samples are drawn, and a state of what was read into it."""

    def __iter__(self) -> Iterator[Any]:
        self.place, buffer, draw = self.start, [], random.Random(0)
        while self.place < 4 * SIZE:
            buffer.append(self.place)
            self.place += 1
            if len(buffer) > 5:
                yield torch.tensor([buffer.pop(draw.randrange(len(buffer))), 0.0, 0.0, 0.0])
        self.start = self.place = 0


class Filled(Stream):
    """Gives half of a buffer whenever it is full; its state leaves out what that holds then.

    So do Hugging Face's `datasets`: as long as the first half is given, nothing is lost.
    """

    given = skip = 0

    def __iter__(self) -> Iterator[Any]:
        self.place, self.given, left = self.start, 0, self.skip
        buffer: list[int] = []
        draw = random.Random(0)
        for place in range(self.start, 4 * SIZE):
            buffer.append(place)
            if len(buffer) == 4 * BATCH:
                draw.shuffle(buffer)
                for _ in range(2 * BATCH):
                    self.given += 1
                    row = torch.tensor([buffer.pop(), 0.0, 0.0, 0.0])
                    if self.given > left:
                        yield row
                self.place, self.given, left = place + 1, 0, 0
        for row in buffer:
            yield torch.tensor([row, 0.0, 0.0, 0.0])
        self.start = self.place = self.skip = self.given = 0

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.place, "skip": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.skip = state["start"], state["skip"]


class Lasting(Stream):
    """Begins each pass where it was loaded once, as Hugging Face's `datasets` 5.2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = 0

    def __iter__(self) -> Iterator[Any]:
        self.start = self.loaded
        return super().__iter__()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["start"]


class Drawn(Shuffled):
    """Draws from its buffer what no state holds, and no other process draws again."""

    def __iter__(self) -> Iterator[Any]:
        return (row + random.SystemRandom().random() for row in super().__iter__())


@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
@pytest.mark.parametrize("kind", [Coarse, Shuffled, Filled])
def test_a_state_that_tells_not_what_comes_next_is_recognised(kind: type[Stream]) -> None:
    """It moves now and then only, or loses a shuffle buffer, from its beginning or later on."""
    _resumes(lambda: _loader(kind()))


def test_a_pass_after_one_that_was_entered_begins_at_its_beginning() -> None:
    _resumes(lambda: _loader(Lasting()))


def test_a_stream_that_no_state_leads_to_is_told() -> None:
    _, states, _ = _play(_loader(Drawn()))
    for iteration in (2, 3, 7):
        with pytest.raises(ResumeError, match="a shuffle buffer or what was read ahead"):
            _play(_loader(Drawn()), state=states[iteration])


# --------------------------------------------------------------------- what is set, and kept


def test_data_that_a_run_had_exchanged_is_named_where_another_is_given() -> None:
    def make() -> Any:
        return [torch.full((2,), float(number)) for number in range(SIZE)]

    def sets(engine: DeterministicEngine, data: Any) -> None:
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=5), lambda: engine.set_data([-one for one in data])
        )

    straight, states, _ = _play(make(), sets)
    with pytest.raises(ResumeError, match=r"had exchanged its data, 1 time"):
        _play(make(), sets, states[7])
    rest, _, _ = _play([-one for one in make()], sets, states[7])
    assert rest == {at: row for at, row in straight.items() if at > 7}

    def sets_again(engine: DeterministicEngine, data: Any) -> None:
        def again() -> None:
            if engine.state.iteration >= 5:
                engine.set_data([-one for one in data])

        engine.add_event_handler(Events.STARTED, again)

    rest, _, _ = _play(make(), sets_again, states[7])
    assert rest == {at: row for at, row in straight.items() if at > 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epochs_end_that_is_still_to_fire_has_its_last_batch(workers: int) -> None:
    def shows(engine: DeterministicEngine, data: Any) -> None:
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: shown.append(engine.state.batch.tolist())
        )

    def make() -> Any:
        return DataLoader(Rows(), BATCH, shuffle=True, num_workers=workers)

    def saves(engine: DeterministicEngine, data: Any) -> None:
        shows(engine, data)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: states.append(engine.state_dict())
        )

    shown: list[Any] = []
    states: list[Any] = []
    _play(make(), saves)
    straight, shown[:] = [*shown], []
    for epoch, iteration in enumerate((3, 6, 9)):
        _play(make(), shows, states[iteration - 1])
        assert shown == straight[epoch:]
        shown.clear()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("other", [False, True])
def test_data_that_is_set_as_an_epoch_ends(other: bool, workers: int) -> None:
    """The run that goes on is given what was set: the same, or something else."""

    def sets(engine: DeterministicEngine, data: Any) -> None:
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: engine.set_data(_loader(Rows(), num_workers=workers))
        )

    def make() -> Any:
        return _loader(Rows(), num_workers=workers)

    straight, states, _ = _play(make(), sets)
    data = make()
    if other:
        data.dataset.shift = 9.0
    if workers:
        # Nothing of it is fetched in this process.
        with pytest.warns(ResumeWarning, match="no batch of it could be compared"):
            _play(data, sets, states[3])
    elif other:
        with pytest.raises(ResumeError, match=r"what set_data.. had given the run"):
            _play(data, sets, states[3])
    else:
        for iteration in (2, 3, 4, 6):
            rest, _, _ = _play(make(), sets, states[iteration])
            assert rest == {at: row for at, row in straight.items() if at > iteration}


@pytest.mark.parametrize("seed", range(12))
def test_data_that_handlers_exchange_is_told_and_goes_on_where_it_is_set_at_the_start(
    seed: int,
) -> None:
    """Such as a data set that grows: other data, of other or of the same length."""
    rng = random.Random(seed)
    grows, loads = rng.random() < 0.7, rng.random() < 0.5
    at_end = rng.random() < 0.5
    event: Any = Events.EPOCH_COMPLETED if at_end else Events.ITERATION_COMPLETED(every=4)

    def of(number: int) -> Any:
        rows = [torch.full((2,), 10.0 * number + row) for row in range(6 + grows * number)]
        return DataLoader(rows, 2, shuffle=True) if loads else rows  # type: ignore[arg-type]

    def sets(at: Any) -> Any:
        def attach(engine: DeterministicEngine, data: Any) -> None:
            def grow() -> None:
                state = engine.state
                number = state.epoch if at_end else state.iteration // 4
                if number:
                    engine.set_data(of(number))

            engine.add_event_handler(at, grow)

        return attach

    straight, states, _ = _play(of(0), sets(Events.STARTED | event))
    exchanged = [at for at, state in states.items() if state["position"]["exchanges"]]
    for at in rng.sample([*states], 3):
        rest, _, _ = _play(of(0), sets(Events.STARTED | event), states[at])
        assert rest == {when: row for when, row in straight.items() if when > at}
    _, states, _ = _play(of(0), sets(event))
    with warnings.catch_warnings(record=True) as warned:
        error: ResumeError | None = None
        try:
            _play(of(0), sets(event), states[rng.choice(exchanged[:-1])])
        except ResumeError as raised:
            error = raised
    # Where no batch could be compared, it is a warning.
    told = " ".join([str(error), *(str(one.message) for one in warned)])
    assert re.search(r"by set_data\(\).*Events\.STARTED|after set_data\(\) had exchanged", told)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_of_each_epoch_that_is_set_as_it_begins(workers: int) -> None:
    """Such as larger pictures from epoch to epoch: exact, and no word; told if it is not set."""

    def of_epoch(number: int) -> Any:
        rows = Rows()
        rows.shift = 10.0 * number
        return _loader(rows, num_workers=workers)

    def sets(engine: DeterministicEngine, data: Any) -> None:
        engine.add_event_handler(
            Events.EPOCH_STARTED, lambda: engine.set_data(of_epoch(engine.state.epoch))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        straight, states, _ = _play(of_epoch(0), sets)
        for iteration in (2, 3, 6):
            rest, _, _ = _play(of_epoch(0), sets, states[iteration])
            assert rest == {at: row for at, row in straight.items() if at > iteration}
    with pytest.warns(ResumeWarning, match="had exchanged its data, 2 time"):
        _play(of_epoch(0), _listens, states[6])


class Remembering(Rows):
    """Keeps what it has drawn where no attribute shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.of = lru_cache(maxsize=None)(lambda index: torch.rand(()))

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + self.of(index)


@pytest.mark.parametrize("make", [Caching, Remembering])
@pytest.mark.parametrize("workers", [(2, 0), (0, 2), (2, 2)])
def test_what_is_kept_of_draws_is_told_where_workers_come_or_go(
    make: Callable[[], Any], workers: tuple[int, int]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, states, _ = _play(_loader(make(), num_workers=workers[0]))
    # Where this process fetches, a hidden cache is named when a state is taken.
    told = r"the dataset keeps what it has drawn|without what has changed of dataset\.of"
    with pytest.warns(ResumeWarning, match=told):
        _play(_loader(make(), num_workers=workers[1]), state=states[2])
    plain = _loader(Rows(), num_workers=workers[1])
    _, states, _ = _play(_loader(Rows(), num_workers=workers[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _play(plain, state=states[2])


class SlowInTheSecond(Remembering):
    def __getitem__(self, index: int) -> Any:
        worker = torch.utils.data.get_worker_info()
        time.sleep(0.15 if worker is not None and worker.id else 0.0)
        return super().__getitem__(index)


def _second_begins(worker: int) -> None:
    time.sleep(0.0 if worker else 0.2)


def test_what_is_kept_is_told_whichever_worker_begins() -> None:
    """The first one gives the batch that is compared, while the second is still asking."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, states, _ = _play(_loader(Remembering(), num_workers=2))
    slow = _loader(SlowInTheSecond(), num_workers=2, worker_init_fn=_second_begins)
    with pytest.warns(ResumeWarning, match="the dataset keeps what it has drawn"):
        _play(slow, state=states[2])


def test_a_cache_that_no_state_has_is_told_when_it_is_saved() -> None:
    with pytest.warns(ResumeWarning, match=r"without what has changed of dataset\.of"):
        _play(_loader(Remembering()))


class Curriculum:
    level = 0.0


class Helped(Rows):
    """Takes a number from an object that handlers change."""

    def __init__(self) -> None:
        super().__init__()
        self.curriculum = Curriculum()

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + self.curriculum.level


def test_what_handlers_change_of_an_object_in_a_dataset_is_as_it_was() -> None:
    def raises(engine: DeterministicEngine, data: Any) -> None:
        def more() -> None:
            data.dataset.curriculum.level += 1.0

        engine.add_event_handler(Events.EPOCH_COMPLETED, more)

    _resumes(lambda: _loader(Helped()), raises)


class Windowed(Rows):
    """Has a number and tensors in one list: two of these are not compared by `==`."""

    def __init__(self) -> None:
        super().__init__()
        self.window: list[Any] = [0, torch.zeros(2), torch.full((2,), float("nan"))]

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index) + self.window[1].sum() + self.window[0]


def test_what_handlers_change_of_a_list_with_tensors_is_as_it_was() -> None:
    def moves(engine: DeterministicEngine, data: Any) -> None:
        def move() -> None:
            count, ones, rest = data.dataset.window
            data.dataset.window = [count + 1, ones + 0.5, rest]

        engine.add_event_handler(Events.EPOCH_COMPLETED, move)

    _resumes(lambda: _loader(Windowed()), moves)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without data": lambda: torch.ones(2, device="meta"),
    "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
def test_data_and_handlers_may_hold_tensors_of_any_layout(odd: str) -> None:
    def make() -> Any:
        data = Rows()
        data.edges = ODD[odd]()  # type: ignore[attr-defined]
        return _loader(data)

    def looks(engine: DeterministicEngine, data: Any) -> None:
        edges = ODD[odd]()
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: edges.is_sparse)

    _resumes(make, looks)


def test_a_large_array_that_is_written_into_is_told() -> None:
    def writes(engine: DeterministicEngine, data: Any) -> None:
        data.dataset.negatives = np.zeros((SIZE, 50_000))
        engine.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: data.dataset.negatives.__setitem__(0, 1.0)
        )

    class Large(Rows):
        def __getitem__(self, index: int) -> Any:
            return torch.tensor([index, self.negatives[index, 0]])

    with pytest.warns(ResumeWarning, match=r"without what has changed of dataset\.negatives"):
        _play(_loader(Large()), writes)


SHARED: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda path: torch.zeros(SIZE, 50_000).share_memory_(),
    "its rows": lambda path: torch.zeros(SIZE, 100_000).share_memory_()[:, ::2],
    "array": lambda path: torch.zeros(SIZE, 50_000).share_memory_().numpy(),
    "in a file": lambda path: np.memmap(path / "kept", "float32", "w+", shape=(SIZE, 50_000)),
    "tensor in a file": lambda path: torch.from_file(str(path / "kept"), True, SIZE * 50_000).view(
        SIZE, 50_000
    ),
    "numbers": lambda path: multiprocessing.Array("f", SIZE * 50_000),
}


class Writing(Rows):
    """Workers write what they have drawn into large memory that they share."""

    def __init__(self, kept: Any, writes: bool) -> None:
        super().__init__()
        self.kept, self.writes = kept, writes

    def __getitem__(self, index: int) -> Any:
        drawn = torch.rand(1).item() if self.writes else 0.0
        if hasattr(self.kept, "get_obj"):
            self.kept[index * 50_000 : (index + 1) * 50_000] = [drawn] * 50_000
        elif self.writes:
            self.kept[index] = drawn
        return torch.tensor([index, drawn])


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("kind", SHARED)
def test_large_shared_memory_that_workers_write_into_is_told(
    tmp_path: Path, kind: str, writes: bool
) -> None:
    told = pytest.warns(ResumeWarning, match=r"without what has changed of dataset\.kept")
    with told if writes else warnings.catch_warnings():
        if not writes:
            warnings.simplefilter("error", ResumeWarning)
        _play(_loader(Writing(SHARED[kind](tmp_path), writes), num_workers=2))


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
    with pytest.raises(
        ResumeError, match=r"fetched (twice from the same states|once more), and in"
    ):
        _play(_loader(Stream(draw=_hidden())), state=states[iteration])
    _, states, _ = _play(_loader(Stream()))
    _, _, engine = _play(_loader(Stream()), state=states[iteration])
    assert "fetched twice from the same states" in "; ".join(engine.proof.checked)


def test_hidden_draws_are_found_where_data_is_set_anew_as_an_epoch_begins() -> None:
    _, states, _ = _play(_loader(Hidden()), _sets_anew)
    with pytest.raises(ResumeError, match="batch 1 of pass 2 was fetched twice"):
        _play(_loader(Hidden()), _sets_anew, states[3])
    _resumes(lambda: _loader(Rows()), _sets_anew)


class Drawing(Sampler[int]):
    """Draws its order from a generator of its own."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.permutation(SIZE).tolist())


def _own_order(kind: str, workers: int) -> Any:
    """Returns a loader whose order is drawn from its own generator, which passes move on."""
    generator = torch.Generator().manual_seed(7)
    if kind == "loader":
        return _loader(Rows(), generator=generator, num_workers=workers)
    samplers = {
        "random": lambda: RandomSampler(range(SIZE), generator=generator),
        "replacement": lambda: RandomSampler(range(SIZE), True, SIZE, generator),
        "weighted": lambda: WeightedRandomSampler([1.0] * SIZE, SIZE, generator=generator),
        "own": Drawing,
    }
    return DataLoader(Rows(), BATCH, sampler=samplers[kind](), num_workers=workers)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("kind", ["loader", "random", "replacement", "weighted", "own"])
def test_the_order_of_data_that_is_set_anew_goes_on(kind: str, anew: bool) -> None:
    """The same loader, or another over the same sampler: what a pass's end draws is drawn."""

    def sets(engine: DeterministicEngine, data: Any) -> None:
        def set_it() -> None:
            options = {"num_workers": data.num_workers, "generator": data.generator}
            again = DataLoader(data.dataset, BATCH, sampler=data.sampler, **options)
            engine.set_data(again if anew else data)

        engine.add_event_handler(Events.EPOCH_STARTED, set_it)

    with warnings.catch_warnings():
        # Of the generators that this handler comes to.
        warnings.simplefilter("ignore", ResumeWarning)
        _resumes(lambda: _own_order(kind, 0), sets)


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


class Bare(IterableDataset[Any]):
    """Has no state: whoever goes on throws away what was fetched before."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(self.size))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [(2, 5, 8), (5, 11, 16)])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*tells no position")
def test_a_loader_that_counts_what_it_threw_away_twice_goes_on_where_it_was(
    workers: int, stops: tuple[int, ...]
) -> None:
    """torchdata's, with workers and a dataset without a state, is beside itself the second time."""

    def loader() -> Any:
        return StatefulDataLoader(Bare(40), 2, num_workers=workers)

    seen = _stopped_at(stops, loader)
    assert seen == [batch.tolist() for batch in loader()][: stops[-1]]


def _stopped_at(stops: Iterable[int], data: Callable[[], Any]) -> list[Any]:
    """Returns the batches of a run that ends after these iterations, each time resumed."""
    state: dict[str, Any] = {}
    seen: list[Any] = []
    for stop in stops:
        engine = DeterministicEngine(lambda _, batch: seen.append(batch.tolist()))
        if state:
            engine.load_state_dict(state)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=stop),
            lambda e: (state.update(e.state_dict()), e.terminate()),
        )
        engine.run(data())
    return seen


class Stale(IterableDataset[Any]):
    """Goes on rightly where it is loaded, but its state tells a place that is none from then on.

    It stays what was loaded, or the beginning (Hugging Face's `datasets` 5.0.0), or counts anew. An
    honest one goes on with the very dictionary that it is given.
    """

    def __init__(self, tells: str) -> None:
        self.tells = tells
        self.live = self.told = {"at": 0}

    def __iter__(self) -> Iterator[Any]:
        for at in range(self.live["at"], 80):
            self.live["at"] = at + 1
            if self.tells == "anew" and self.told is not self.live:
                self.told["at"] += 1
            yield torch.tensor(at)

    def state_dict(self) -> dict[str, int]:
        return dict(self.told)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.live = state
        self.told = state if self.tells == "honest" else {"at": 0}
        if self.tells == "what was loaded":
            self.told = dict(state)


STALE: dict[str, Callable[[Any], Any]] = {
    "itself": lambda data: data,
    "loader": lambda data: DataLoader(data, 2),
    "torchdata's workers": lambda data: StatefulDataLoader(data, 2, num_workers=1),
}


@pytest.mark.parametrize("wrap", list(STALE))
@pytest.mark.parametrize("tells", ["the beginning", "what was loaded", "anew", "honest"])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_state_that_tells_no_place_once_it_was_loaded_is_entered_where_it_was(
    tells: str, wrap: str
) -> None:
    """Resumed four times, also after one batch; torchtitan's runs began anew at the second."""
    draw = random.Random(f"{tells} {wrap}")
    stops = list(itertools.accumulate([*draw.sample((1, 2, 5, 7), 4), 2]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResumeWarning)
        seen = _stopped_at(stops, lambda: STALE[wrap](Stale(tells)))
    assert seen == [batch.tolist() for batch in STALE[wrap](Stale("honest"))][: stops[-1]]
    assert bool([one for one in told if "thrown away" in str(one.message)]) == (tells != "honest")
