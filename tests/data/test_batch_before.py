"""A resume fetches the batch before once more: what differs from the saved run is named."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
    Proof,
    ResumeError,
    ResumeWarning,
)

Step = Callable[[Any, Any], Any]
# What another process would have: entropy that no seed of ours reaches.
ENTROPY = random.SystemRandom()


class Rows(Dataset[Any]):
    def __init__(self, size: int = 20, offset: float = 0.0) -> None:
        self.rows = torch.arange(float(size)).view(-1, 1) + offset

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return {"x": self.rows[index] + torch.rand(1), "y": index}


def nothing(engine: Any, batch: Any) -> None:
    """A step that leaves its batch as it is."""


def states_of(data: Any, step: Step = nothing, **limits: Any) -> dict[int, dict[str, Any]]:
    """Runs over data; returns the state of each iteration and, negative, of each epoch's end."""
    engine = DeterministicEngine(step, seed=4)
    states: dict[int, dict[str, Any]] = {}

    def keep(key: int) -> None:
        file = io.BytesIO()
        torch.save(engine.state_dict(), file)
        file.seek(0)
        states[key] = torch.load(file, weights_only=True)

    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: keep(engine.state.iteration))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: keep(-engine.state.epoch))
    engine.run(data, **{"max_epochs": 2, **limits})
    return states


def resume(
    state: dict[str, Any], data: Any, step: Step = nothing, checks: Checks | None = None
) -> Proof:
    engine = DeterministicEngine(step, checks=checks)
    engine.load_state_dict(state)
    engine.run(data)
    return engine.proof


def loader(dataset: Any = None, workers: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        Rows() if dataset is None else dataset,
        **{"batch_size": 4, "shuffle": True, "num_workers": workers, **options},
    )


# ---------------------------------------------------------------------- what is the same


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batch_before_is_checked_at_every_iteration(workers: int) -> None:
    states = states_of(loader(workers=workers))
    places = {3: "batch 3 of pass 1", -1: "batch 5 of pass 1", 6: "batch 1 of pass 2"}
    for key, place in places.items():
        proof = resume(states[key], loader(workers=2 - workers))
        assert proof.checked == [f"{place} fetched once more: its 2 parts and 4 indices"]
        assert not proof.unchecked
        assert not proof.differences


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (torch.rand(2) for _ in range(5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [torch.arange(3.0) + i for i in range(5)],
        lambda: torch.arange(10.0).view(5, 2),
        lambda: DataLoader(Unsized(), batch_size=None),
        lambda: Unsized(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fetched and thrown away")
def test_data_without_indices_is_checked_by_its_content(make: Callable[[], Any]) -> None:
    states = states_of(make())
    for key in (1, 3, -1, 7):
        assert "fetched once more: its 1 parts" in resume(states[key], make()).checked[0]


def test_the_run_goes_on_as_if_nothing_had_been_fetched() -> None:
    straight: list[Any] = []

    def note(seen: list[Any]) -> Step:
        def step(engine: Any, batch: Any) -> None:
            drawn = random.random(), float(np.random.random()), float(torch.rand(()))
            seen.append((batch["y"].tolist(), batch["x"].tolist(), drawn))

        return step

    states = states_of(loader(), note(straight))
    for key in range(1, 10):
        resumed: list[Any] = []
        resume(states[key], loader(), note(resumed))
        assert resumed == straight[key:]


class Counting(DataLoader[Any]):
    """Counts its passes, which is a state of its own beside the order that torch draws."""

    passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return super().__iter__()


ORDERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffled": lambda rows: {"shuffle": True},
    "with replacement": lambda rows: {"sampler": RandomSampler(rows, True)},
    "a subset": lambda rows: {"sampler": SubsetRandomSampler(range(3, 19))},
    "weighted": lambda rows: {"sampler": WeightedRandomSampler([1.0, 2.0] * 10, 18)},
    "in batches": lambda rows: {
        "batch_sampler": BatchSampler(RandomSampler(rows), 4, True),
        "batch_size": 1,
    },
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_loader_with_a_state_of_its_own_keeps_its_order(order: str) -> None:
    def make() -> Any:
        rows = Rows()
        return Counting(rows, **{"batch_size": 4, **ORDERS[order](rows)})

    straight: list[Any] = []
    states = states_of(make(), lambda _, batch: straight.append(batch["y"].tolist()))
    for key in range(1, len(straight)):
        resumed: list[Any] = []
        resume(states[key], make(), lambda _, batch, to=resumed: to.append(batch["y"].tolist()))  # type: ignore[misc]
        assert resumed == straight[key:]


# ---------------------------------------------------------------------- what differs


class HiddenNoise(Rows):
    """Draws from a generator that is found nowhere: a closure's, made where it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        generator = np.random.default_rng(ENTROPY.getrandbits(64))
        self.draw = lambda: float(generator.random())

    def __getitem__(self, index: int) -> Any:
        return {"x": self.rows[index] + self.draw(), "y": index}


class OwnNoise(Rows):
    """Draws from a generator of its own, as is warned of."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(ENTROPY.getrandbits(64))

    def __getitem__(self, index: int) -> Any:
        return {"x": self.rows[index] + self.generator.random(), "y": index}


class Unseeded(Sampler[int]):
    def __iter__(self) -> Any:
        order = list(range(20))
        ENTROPY.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 20


def seed_worker(_: int) -> None:
    torch.utils.data.get_worker_info().dataset.generator = ENTROPY  # type: ignore[union-attr]


class LazyNoise(Rows):
    generator: Any = None

    def __getitem__(self, index: int) -> Any:
        self.generator = self.generator or random.Random(ENTROPY.getrandbits(64))
        return {"x": self.rows[index] + self.generator.random(), "y": index}


def noisy_collate(samples: list[Any]) -> Any:
    return {"x": torch.tensor(ENTROPY.random()), "y": torch.tensor([s["y"] for s in samples])}


ENDINGS: dict[str, tuple[Callable[[int], Any], str]] = {
    "a split": (
        lambda turn: loader(
            random_split(Rows(40), [20, 20], torch.Generator().manual_seed(turn))[0],
            shuffle=False,
        ),
        r"in it \['x'\] \(float32 \(4, 1\)\) has other contents.* class Subset.* unseeded split",
    ),
    "a sampler": (
        lambda turn: loader(sampler=Unseeded(), shuffle=False),
        "its indices began.* class Unseeded",
    ),
    "a sampler in a batch sampler": (
        lambda turn: DataLoader(Rows(), batch_sampler=BatchSampler(Unseeded(), 4, False)),
        "its indices began.* class Unseeded",
    ),
    "a generator in a closure": (
        lambda turn: loader(HiddenNoise()),
        r"in it \['x'\] .* has other contents.*class HiddenNoise",
    ),
    "a generator of the dataset's": (
        lambda turn: loader(OwnNoise()),
        r"in it \['x'\] .* has other contents.*class OwnNoise",
    ),
    "a generator made when it is needed": (
        lambda turn: loader(LazyNoise(), 2),
        r"in it \['x'\] .* has other contents",
    ),
    "a generator of the workers": (
        lambda turn: loader(LazyNoise(), 1, worker_init_fn=seed_worker),
        r"in it \['x'\] .* has other contents",
    ),
    "collate_fn": (
        lambda turn: loader(collate_fn=noisy_collate),
        r"in it \['x'\] .* has other contents.* class Rows, the collate_fn noisy_collate",
    ),
    "other content": (
        lambda turn: loader(Rows(offset=turn)),
        r"in it \['x'\] .* has other contents",
    ),
    "another type": (
        lambda turn: loader(
            collate_fn=None
            if turn
            else lambda samples: {
                "x": torch.stack([s["x"] for s in samples]).double(),
                "y": torch.tensor([s["y"] for s in samples]),
            }
        ),
        r"in it \['x'\] was float64 \(4, 1\) and is float32 \(4, 1\)",
    ),
    "a list": (
        lambda turn: [torch.zeros(2) + turn] * 5,
        "in it it .float32 .2,.. has .*class list",
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.filterwarnings("ignore:The dataset holds random generators")
def test_what_differs_is_an_error_before_a_step_is_done(name: str) -> None:
    make, message = ENDINGS[name]
    states = states_of(make(0))
    steps: list[Any] = []
    for key in (3, -1, 7):
        with pytest.raises(ResumeError, match=rf"(?s)was fetched once more, and {message}"):
            resume(states[key], make(1), lambda _, batch: steps.append(batch))
    assert not steps


def test_what_a_handler_changes_of_the_dataset_is_named() -> None:
    def run(state: dict[str, Any] | None = None) -> dict[str, Any]:
        data = loader(Rows())
        engine = DeterministicEngine(nothing, seed=4)

        @engine.on(Events.GET_BATCH_COMPLETED)
        def shift() -> None:
            data.dataset.rows = data.dataset.rows + 1

        if state is not None:
            engine.load_state_dict(state)
        kept: dict[str, Any] = {}
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=3), lambda: kept.update(engine.state_dict())
        )
        engine.run(data)
        return kept

    with pytest.raises(
        ResumeError, match=r"class Rows.*course of the run: dataset\.rows\..*handler"
    ):
        run(run())


def test_the_check_can_warn_or_be_left_out() -> None:
    state = states_of(loader(Rows()))[3]
    with pytest.warns(ResumeWarning, match="has other contents"):
        proof = resume(state, loader(Rows(offset=1)), checks=Checks(batch_before="warn"))
    assert len(proof.differences) == 1
    proof = resume(state, loader(Rows(offset=1)), checks=Checks(batch_before="off"))
    assert proof == Proof()


def test_the_right_data_goes_on_after_a_refusal() -> None:
    seen: list[Any] = []
    states = states_of(loader(Rows()), lambda _, batch: seen.append(batch["x"].tolist()))
    resumed: list[Any] = []
    engine = DeterministicEngine(lambda _, batch: resumed.append(batch["x"].tolist()))
    engine.load_state_dict(states[3])
    with pytest.raises(ResumeError):
        engine.run(loader(Rows(offset=1)))
    engine.run(loader(Rows()))
    assert resumed == seen[3:]


# ---------------------------------------------------------------------- what the step changes


def pops(_: Any, batch: Any) -> None:
    del batch["y"]


def replaces(_: Any, batch: Any) -> None:
    batch["x"] = batch["x"].double() / 2
    batch["new"] = 1


def writes(_: Any, batch: Any) -> None:
    batch["x"].mul_(2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [pops, replaces, writes])
def test_a_batch_that_the_step_changes_is_no_false_alarm(step: Step, workers: int) -> None:
    state = states_of(loader(workers=workers), step)[3]
    proof = resume(state, loader(), step)
    if step is writes:
        assert proof.unchecked == [
            "['x'] of batch 3 of pass 1, which the step had changed in place"
        ]
        assert proof.checked == ["batch 3 of pass 1 fetched once more: its 1 parts and 4 indices"]
    else:
        assert not proof.unchecked
        assert proof.checked == ["batch 3 of pass 1 fetched once more: its 2 parts and 4 indices"]


class Batch:
    """As graph libraries have it: an object with its tensors in attributes, and a method `to`."""

    def __init__(self, samples: list[Any]) -> None:
        self.store = {"x": torch.stack([sample["x"] for sample in samples])}
        self.names = [str(sample["y"]) for sample in samples]


def test_objects_are_held_and_named_by_their_attributes() -> None:
    def step(_: Any, batch: Any) -> None:
        batch.store["x"] = batch.store.pop("x") * 2
        batch.names = []

    def make(offset: float = 0) -> Any:
        return loader(Rows(offset=offset), collate_fn=Batch)

    state = states_of(make(), step)[3]
    assert "its 2 parts and 4 indices" in resume(state, make(), step).checked[0]
    with pytest.raises(ResumeError, match=r"in it \.store\['x'\] \(float32 \(4, 1\)\) has other"):
        resume(state, make(1), step)


# ---------------------------------------------------------------------- what cannot be checked


class WithState:
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < 6:
            self.at += 1
            yield torch.tensor(self.at)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithState, "data with a state of its own goes on behind it"),
        (lambda: None, "a run without data has none"),
    ],
)
def test_what_cannot_be_fetched_again_is_said(make: Callable[[], Any], reason: str) -> None:
    state = states_of(make(), epoch_length=6)[3]
    assert state["position"]["before"] == {"reason": reason}
    assert resume(state, make()).unchecked == [f"the batch before: {reason}"]


def test_a_state_of_an_older_version_says_that_it_has_none() -> None:
    state = states_of(loader())[3]
    del state["position"]["before"]
    assert resume(state, loader()).unchecked == [
        "the batch before: the state is an older version's"
    ]


def test_a_batch_of_many_parts_is_kept_in_few_words() -> None:
    def collate(samples: list[Any]) -> Any:
        return [{"x": torch.full((2,), float(i)), "i": i} for i in range(1000)]

    state = states_of(loader(collate_fn=collate))[3]
    assert len(state["position"]["before"]["parts"]) == 257
    assert resume(state, loader(collate_fn=collate)).checked

    def other(samples: list[Any]) -> Any:
        return [*collate(samples)[:-1], {"x": torch.zeros(2), "i": 999}]

    with pytest.raises(ResumeError, match="after its first 256 parts"):
        resume(state, loader(collate_fn=other))
