"""What changes of data beside the training's own is in the state of its source, or is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from killed_runs import Parts, resumed, rows
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, Subset

from crosstrain.engine import DeterministicEngine, Engine, Events, ResumableSource

KINDS: dict[str, Any] = {
    "number": float,
    "tensor": lambda value: torch.full((3,), float(value)),
    "array": lambda value: numpy.full(3, float(value)),
    "list": lambda value: [float(value), float(value)],
}


def _factor(value: Any) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64).mean())


class Scales(Dataset[Any]):
    """Gives rows that it scales by an attribute, or has scaled by a transform."""

    def __init__(self, level: Any, transform: Any = None) -> None:
        self.level, self.transform, self.rows = level, transform, [one for one, _ in rows(8)]
        self.asked = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if self.transform is not None:
            return self.transform(self.rows[index])
        return self.rows[index] * _factor(self.level)


class Transform:
    def __init__(self, level: Any) -> None:
        self.level = level

    def __call__(self, row: torch.Tensor) -> torch.Tensor:
        return row * _factor(self.level)


class Rotates(Sampler[int]):
    """Begins with another sample, as an attribute says."""

    def __init__(self, level: Any) -> None:
        self.level = level

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter([(index + int(_factor(self.level))) % 8 for index in range(8)])


def _made(owner: str, level: Any) -> tuple[Any, Any]:
    """Returns a loader, and the object in it whose level it fetches by."""
    if owner == "transform":
        own: Any = Transform(level)
        return DataLoader(Scales(1.0, own), 4), own
    if owner == "sampler":
        own = Rotates(level)
        return DataLoader(Scales(1.0), 4, sampler=own), own
    own = Scales(level)
    nested = {"subset": lambda: Subset(own, range(6)), "joined": lambda: ConcatDataset([own, own])}
    return DataLoader(nested.get(owner, lambda: own)(), 4), own


def _training(owner: str, kind: str, place: str, change: str, every: int) -> Parts:
    """Returns a training that fetches from a second loader, of which something changes."""
    loader, own = _made(owner, KINDS[kind](1))
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    source = ResumableSource(loader, seed=4)
    evaluator = Engine(lambda engine, batch: float(model(batch).detach().mean()))

    def train(batch: Any, more: Any = None) -> None:
        optimizer.zero_grad()
        loss = (model(batch[0]) - batch[1]).square().mean()
        (loss if more is None else loss + model(more).square().mean()).backward()
        optimizer.step()

    def fetches(engine: Any, batch: Any) -> None:
        train(batch, next(iter(loader)))

    def draws(engine: Any, batch: Any) -> None:
        train(batch, next(source))

    steps: dict[str, Any] = {"step": fetches, "source": draws}
    trainer = DeterministicEngine(steps.get(place, lambda _, batch: train(batch)), seed=1)
    if place == "evaluation":

        @trainer.on(Events.EPOCH_COMPLETED)
        def validate() -> None:
            evaluator.run(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (1 + abs(evaluator.state.output))

    if change in ("epoch", "iteration"):
        event = Events.EPOCH_COMPLETED if change == "epoch" else Events.ITERATION_COMPLETED

        @trainer.on(event(every=every))
        def harder() -> None:
            own.level = KINDS[kind](_factor(own.level) + 1)

    elif change == "set anew":

        @trainer.on(Events.EPOCH_STARTED)
        def follow(engine: Any) -> None:
            own.level = KINDS[kind](engine.state.epoch)

    named = {"source": source} if place == "source" else {}
    data: Any = rows(8)
    return trainer, {"model": model, "optimizer": optimizer, **named}, DataLoader(data, 2)


OWNERS = ("dataset", "joined", "sampler", "subset", "transform")


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    owner=st.sampled_from(OWNERS),
    kind=st.sampled_from(sorted(KINDS)),
    place=st.sampled_from(("evaluation", "source", "step")),
    change=st.sampled_from(("epoch", "iteration", "never", "set anew")),
    every=st.integers(1, 3),
    dies=st.integers(4, 15),
)
def test_what_changes_of_other_data_is_told_unless_it_goes_on(
    owner: str,
    kind: str,
    place: str,
    change: str,
    every: int,
    dies: int,
    tmp_path_factory: Any,
) -> None:
    folder = tmp_path_factory.mktemp("other")
    before, after, identical = resumed(
        folder, lambda: _training(owner, kind, place, change, every), dies, 2
    )
    if place == "source" or change in ("never", "set anew"):
        assert (before, after, identical) == ([], [], True)
    else:
        assert identical or any("level" in one for one in before)


@pytest.mark.parametrize("owner", OWNERS)
def test_it_is_told_where_the_step_fetches(owner: str, tmp_path: Path) -> None:
    def make() -> Parts:
        return _training(owner, "number", "step", "epoch", 1)

    before, _, identical = resumed(tmp_path, make, 6)
    assert not identical
    assert ["level" in one for one in before] == [True]


class Caches(Scales):
    """Keeps what it has made of each row."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.kept: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index) * 2
        return self.kept[index]


class Makes(Scales):
    """Makes what reads a row with the first sample, as workers have to."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.reads: Any = None

    def __getitem__(self, index: int) -> Any:
        if self.reads is None:
            self.reads = Transform(2.0)
        return self.reads(self.rows[index])


class Opens(Scales):
    """Opens its file with the first sample, and reads it where the index says."""

    def __init__(self, path: Path) -> None:
        super().__init__(1.0)
        self.path, self.file = path, None

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = self.path.open("rb")
        self.file.seek(index)
        return self.rows[index] * self.file.read(1)[0]


@pytest.mark.parametrize("kind", [Caches, Makes, Opens])
def test_what_data_makes_of_its_samples_is_not_told(kind: Any, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(bytes(range(1, 9)))

    def make() -> Parts:
        trainer, to_save, loader = _training("dataset", "number", "evaluation", "never", 1)
        kept = DataLoader(Opens(path) if kind is Opens else kind(), 2, shuffle=True)

        @trainer.on(Events.ITERATION_STARTED)
        def rate() -> None:
            for group in to_save["optimizer"].param_groups:
                group["lr"] = 0.01 * float(next(iter(kept)).abs().mean())

        return trainer, to_save, loader

    assert resumed(tmp_path, make, 6) == ([], [], True)


def test_what_handlers_change_before_a_source_is_drawn_from_goes_on(tmp_path: Path) -> None:
    def make() -> Parts:
        # At the end of the epoch after whose last iteration it was saved.
        trainer, to_save, loader = _training("dataset", "number", "source", "epoch", 1)
        levels = to_save["source"].source.dataset

        @trainer.on(Events.EPOCH_COMPLETED)
        def rate() -> None:
            for group in to_save["optimizer"].param_groups:
                group["lr"] = 0.05 / levels.level

        return trainer, to_save, loader

    assert resumed(tmp_path, make, 8) == ([], [], True)
