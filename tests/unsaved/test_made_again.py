"""What a run makes where it is missing is told only where a resumed one makes another.

One file, although it is long: each way of making something has its neighbour that looks like it and
has to be told, and both are resumed in one way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_runs import SELDOM, Parts, resumed, rows, run
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Events,
)

KINDS = ("tensor", "large tensor", "array", "list", "tuple", "mapping", "number")


def _made(kind: str, seed: float) -> Any:
    """Makes a value that multiplies; of the same seed it is the same."""
    numbers = [seed + index / 8 for index in range(3)]
    if kind == "large tensor":
        # Larger than what a signature reads of a tensor as a whole.
        return torch.full((3, 100_000), seed).add_(torch.tensor(numbers)[:, None])
    made: dict[str, Callable[[list[float]], Any]] = {
        "tensor": torch.tensor,
        "array": numpy.array,
        "list": list,
        "tuple": tuple,
        "mapping": lambda many: dict(enumerate(many)),
        "number": sum,
    }
    return made[kind](numbers)


def _factor(value: Any) -> float:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, torch.Tensor):
        return float(value.double().mean())
    return float(numpy.mean(value))


class Keeps:
    """Makes something where it is missing: the same each time, or of what it is called with."""

    def __init__(self, kind: str, same: bool) -> None:
        self.kind, self.same = kind, same
        self.table: Any = None
        self.cache: dict[str, Any] = {}


class IsNone(Keeps):
    def take(self, seen: float) -> float:
        if self.table is None:
            self.table = _made(self.kind, 1.0 if self.same else seen)
        return _factor(self.table)


class IsNoAttribute(Keeps):
    def take(self, seen: float) -> float:
        if not hasattr(self, "window"):
            self.window = _made(self.kind, 1.0 if self.same else seen)
        return _factor(self.window)


class ReturnsEarly(Keeps):
    def _get(self, seen: float) -> Any:
        if self.table is not None:
            return self.table
        table = _made(self.kind, 1.0 if self.same else seen)
        self.table = table
        return table

    def take(self, seen: float) -> float:
        return _factor(self._get(seen))


class ByKey(Keeps):
    def take(self, seen: float) -> float:
        if self.kind not in self.cache:
            self.cache[self.kind] = _made(self.kind, 1.0 if self.same else seen)
        return _factor(self.cache[self.kind])


class GetsFirst(Keeps):
    def take(self, seen: float) -> float:
        found = self.cache.get(self.kind)
        if found is None:
            found = self.cache[self.kind] = _made(self.kind, 1.0 if self.same else seen)
        return _factor(found)


class TriesFirst(Keeps):
    def _get(self, seen: float) -> Any:
        try:
            return self.cache[self.kind]
        except KeyError:
            made = _made(self.kind, 1.0 if self.same else seen)
            self.cache[self.kind] = made
            return made

    def take(self, seen: float) -> float:
        return _factor(self._get(seen))


class ByMethod(Keeps):
    def _prepare(self, seen: float) -> None:
        self.table = _made(self.kind, 1.0 if self.same else seen)

    def take(self, seen: float) -> float:
        if self.table is None:
            self._prepare(seen)
        return _factor(self.table)


class Once(Keeps):
    """A property that is computed once; it is of what was seen last."""

    seen = 1.0

    @functools.cached_property
    def table_once(self) -> Any:
        return _made(self.kind, 1.0 if self.same else self.seen)

    def take(self, seen: float) -> float:
        if not self.same:
            self.seen = seen
        return _factor(self.table_once)


class ByFlag(Keeps):
    """Makes two things where a flag says that they are missing."""

    is_built = False

    def _build(self, seen: float) -> None:
        self.table = _made(self.kind, 1.0 if self.same else seen)
        self.cos = _made(self.kind, 2.0)
        self.is_built = True

    def take(self, seen: float) -> float:
        if not self.is_built:
            self._build(seen)
        return _factor(self.table) + _factor(self.cos)


class BySize(Keeps):
    """Makes it where there is none that is long enough."""

    length = 0

    def take(self, seen: float) -> float:
        if self.length < 3:
            self.table = _made(self.kind, 1.0 if self.same else seen)
            self.length = 3
        return _factor(self.table)


def _are_there(*both: Any) -> bool:
    """Is given them as a whole: any of their methods may be called."""
    return None not in both


@dataclasses.dataclass
class Settings:
    """A data class: Python has written what compares it."""

    table: Any = None
    old: Any = None


class InSettings(Keeps):
    """Makes it in an object beside, of which other methods take attributes away."""

    def __init__(self, kind: str, same: bool) -> None:
        super().__init__(kind, same)
        self.settings = Settings()

    def forget(self) -> None:
        if hasattr(self.settings, "old"):
            delattr(self.settings, "old")

    def take(self, seen: float) -> float:
        if self.settings.table is None:
            if seen > 100:
                self.settings.table = _made(self.kind, 3.0)
            else:
                self.settings.table = _made(self.kind, 1.0 if self.same else seen)
        assert _are_there(self, self.settings)
        return _factor(self.settings.table)


IDIOMS = {
    each.__name__: (each, name)
    for each, name in (
        (IsNone, "table"),
        (IsNoAttribute, "window"),
        (ReturnsEarly, "table"),
        (ByKey, "cache"),
        (GetsFirst, "cache"),
        (TriesFirst, "cache"),
        (ByMethod, "table"),
        (Once, "table_once"),
        (ByFlag, "table"),
        (BySize, "table"),
        (InSettings, "settings.table"),
    )
}
PLACES = ("forward", "step", "handler", "collate")


class Net(nn.Module):
    def __init__(self, keeps: Any) -> None:
        super().__init__()
        self.linear, self.keeps = nn.Linear(3, 1), keeps

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        scale = 1.0 if self.keeps is None else self.keeps.take(float(batch[0, 0].detach()))
        return self.linear(batch * scale)


def _trainer(keeps: Any, place: str) -> Parts:
    model = Net(keeps if place == "forward" else None)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def step(engine: Any, batch: Any) -> float:
        given, wanted = batch
        scale = keeps.take(float(given[0, 0])) if place == "step" else 1.0
        loss = ((model(given) - wanted) * scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def collate(samples: Any) -> Any:
        given = torch.stack([one for one, _ in samples])
        scale = keeps.take(float(given[0, 0])) if place == "collate" else 1.0
        return given * scale, torch.stack([one for _, one in samples])

    trainer = DeterministicEngine(step, checks=Checks(batch_before="off"), seed=1)
    if place == "handler":

        @trainer.on(Events.ITERATION_STARTED)
        def decay(engine: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * keeps.take(float(engine.state.batch[0][0, 0]))

    loader = DataLoader(rows(12), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    return trainer, {"model": model, "optimizer": optimizer}, loader


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    idiom=st.sampled_from(sorted(IDIOMS)),
    kind=st.sampled_from(KINDS),
    place=st.sampled_from(PLACES),
    same=st.booleans(),
    dies=st.integers(1, 12),
    every=st.sampled_from((1, 2)),
)
def test_what_is_made_equal_is_not_told_and_anything_else_is(
    idiom: str, kind: str, place: str, same: bool, dies: int, every: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("made")
    keeps, name = IDIOMS[idiom]

    def make() -> Parts:
        return _trainer(keeps(kind, same), place)

    before, after, identical = resumed(folder, make, dies, every)
    if same:
        assert identical
        assert before == after == []
    elif not identical:
        assert any(name in one for one in before + after), (before, after)


def _halved(module: nn.Module, given: Any, found: Any) -> Any:
    return found * 0.5


class Hooked(Net):
    """Registers a hook in its first forward, unless it is told that it did before."""

    def __init__(self, hooks: bool) -> None:
        super().__init__(None)
        self.hooks = hooks
        self.handle: Any = None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.handle is None and self.hooks:
            self.handle = self.linear.register_forward_hook(_halved)
        return self.linear(batch)


class Grows(Net):
    """Makes a module without parameters in its first forward."""

    def __init__(self, grows: bool) -> None:
        super().__init__(None)
        self.grows = grows

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "squash"):
            self.squash = nn.Tanh() if self.grows else nn.Sigmoid()
        return self.squash(self.linear(batch))


def _hooked(model: nn.Module) -> Parts:
    trainer, to_save, loader = _trainer(None, "nowhere")
    to_save["model"].forward = model.forward
    to_save["model"].inner = model
    return trainer, to_save, loader


@pytest.mark.parametrize("model", [Hooked, Grows])
def test_a_hook_or_a_module_that_each_first_step_makes_is_not_told(
    model: Callable[[bool], nn.Module], tmp_path: Path
) -> None:
    def make() -> Parts:
        return _hooked(model(True))

    assert resumed(tmp_path, make, 4) == ([], [], True)


@pytest.mark.parametrize(
    ("model", "what"),
    [(Hooked, "a forward hook of model.inner.linear"), (Grows, "model.inner.squash (a Tanh)")],
)
def test_one_that_a_resumed_first_step_does_not_make_is_told(
    model: Callable[[bool], nn.Module], what: str, tmp_path: Path
) -> None:
    before, _, _ = run(tmp_path, lambda: _hooked(model(True)), 4)
    after, _, _ = run(tmp_path, lambda: _hooked(model(False)))
    assert before == []
    assert any(what in one for one in after)


def test_the_proof_says_what_was_made_again(tmp_path: Path) -> None:
    def make() -> Parts:
        return _trainer(IsNone("tensor", True), "forward")

    run(tmp_path, make, 4)
    _, _, trainer = run(tmp_path, make)
    (said,) = (one for one in trainer.proof.checked if "made again" in one)
    assert "table" in said


class Counts(Keeps):
    """Makes a number where it is missing, and counts it up: that is not made again."""

    def take(self, seen: float) -> float:
        if self.table is None:
            self.table = [0]
        self.table[0] += 1
        return float(self.table[0])


class MakesMore(Keeps):
    """Does more than to make something where it is missing."""

    def take(self, seen: float) -> float:
        if self.table is None:
            torch.manual_seed(int(abs(seen) * 1000))
            self.table = torch.ones(3)
        return _factor(self.table) + float(torch.rand(1))


class UsesFirst(Keeps):
    """Uses it before it is made."""

    def take(self, seen: float) -> float:
        factor = 0.5 if self.table is None else 1.0
        if self.table is None:
            self.table = torch.ones(3)
        return factor


class ResetsBeside(Keeps):
    """Sets something back that goes on, where it makes another."""

    count = 0

    def take(self, seen: float) -> float:
        if self.table is None:
            self.table = torch.ones(3)
            self.count = 0
        self.count += 1
        return _factor(self.table) / self.count


@pytest.mark.parametrize("keeps", [ResetsBeside, Counts, MakesMore, UsesFirst])
@pytest.mark.parametrize("place", PLACES)
def test_what_does_more_than_to_make_it_is_told_when_it_is_saved(
    keeps: Callable[[str, bool], Keeps], place: str, tmp_path: Path
) -> None:
    (said,) = run(tmp_path, lambda: _trainer(keeps("tensor", True), place), 4)[0]
    assert "begin without what has changed of" in said
    assert "table" in said


class Built(Net):
    """Builds a table in its first forward, and notes that in a flag."""

    def __init__(self, factor: float) -> None:
        super().__init__(None)
        self.factor, self.is_built = factor, False

    def _build(self) -> None:
        self.table = torch.full((3,), self.factor)
        self.is_built = True

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if not self.is_built:
            self._build()
        return self.linear(batch * self.table)


class Lengthened(Net):
    """Makes a table that is long enough, and notes its length."""

    def __init__(self, factor: float) -> None:
        super().__init__(None)
        self.factor, self.length = factor, 0
        self.table: Any = None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        length = batch.shape[-1]
        if self.length < length:
            self.table = torch.full((length,), self.factor)
            self.length = length
        return self.linear(batch * self.table[:length])


class Registers(Net):
    """Registers a buffer that is not saved in its first forward."""

    def __init__(self, factor: float) -> None:
        super().__init__(None)
        self.factor = factor

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.full((3,), self.factor), persistent=False)
        return self.linear(batch * self.table)


BUILT: dict[str, Callable[[float], nn.Module]] = {
    "by a flag": Built,
    "by a length": Lengthened,
    "a buffer": Registers,
}


@pytest.mark.parametrize("how", BUILT)
def test_a_flag_is_not_put_back_without_what_was_made_with_it(how: str, tmp_path: Path) -> None:
    def make() -> Parts:
        return _hooked(BUILT[how](2.0))

    assert resumed(tmp_path, make, 4) == ([], [], True)


@pytest.mark.parametrize("how", BUILT)
def test_what_was_made_with_it_is_told_if_it_is_other(how: str, tmp_path: Path) -> None:
    run(tmp_path, lambda: _hooked(BUILT[how](2.0)), 4)
    after, _, trainer = run(tmp_path, lambda: _hooked(BUILT[how](3.0)))
    (said,) = (one for one in after if "made it again with other contents" in one)
    assert said in trainer.proof.differences
    assert "table" in said


class Indexed(Dataset[Any]):
    """Makes an index that is too large to save when the first sample is fetched."""

    def __init__(self, shift: int) -> None:
        self.index: Any = None
        self.shift, self.samples = shift, rows(12)

    def _load(self) -> None:
        self.index = {place: (place + self.shift) % 12 for place in range(5000)}

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> Any:
        if self.index is None:
            self._load()
        return self.samples[self.index[place]]


@pytest.mark.parametrize("shift", [0, 1])
def test_an_index_of_the_dataset_is_told_only_if_it_is_made_other(
    shift: int, tmp_path: Path
) -> None:
    def make(shift: int) -> Parts:
        trainer, to_save, _ = _trainer(None, "nowhere")
        return trainer, to_save, DataLoader(Indexed(shift), batch_size=2)

    before, _, _ = run(tmp_path, lambda: make(0), 4)
    after, _, _ = run(tmp_path, lambda: make(shift))
    assert before == []
    assert any("dataset.index" in one for one in after) == bool(shift)


class Slots:
    """Keeps what is made for each place of an epoch."""

    def __init__(self) -> None:
        self.rows: list[Any] = [None] * 8

    def at(self, place: int, factor: float) -> torch.Tensor:
        if self.rows[place] is None:
            self.rows[place] = torch.full((3,), factor)
        return self.rows[place]


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_a_list_that_is_filled_place_by_place_is_made_again(factor: float, tmp_path: Path) -> None:
    def make(factor: float = 0.5) -> Parts:
        _, to_save, loader = _trainer(None, "nowhere")
        model, optimizer, slots = to_save["model"], to_save["optimizer"], Slots()

        def step(engine: Any, batch: Any) -> None:
            optimizer.zero_grad()
            scale = slots.at(engine.state.iteration % 8, factor)
            (model(batch[0] * scale) - batch[1]).square().mean().backward()
            optimizer.step()

        return DeterministicEngine(step, seed=1), to_save, loader

    before, _, _ = run(tmp_path, make, 5, every=2)
    after, _, _ = run(tmp_path, functools.partial(make, factor), every=2)
    assert before == []
    assert any("other contents" in one for one in after) == (factor != 0.5), after


def test_what_a_plain_variable_keeps_is_made_again(tmp_path: Path) -> None:
    def make() -> Parts:
        _, to_save, loader = _trainer(None, "nowhere")
        model, optimizer = to_save["model"], to_save["optimizer"]
        cache: dict[str, Any] = {}

        def step(engine: Any, batch: Any) -> None:
            if "scale" not in cache:
                cache["scale"] = torch.full((3,), 0.5)
            optimizer.zero_grad()
            (model(batch[0] * cache["scale"]) - batch[1]).square().mean().backward()
            optimizer.step()

        return DeterministicEngine(step, seed=1), to_save, loader

    _, straight, _ = run(tmp_path / "straight", make, None, SELDOM)
    before, _, _ = run(tmp_path, make, 4)
    after, resumed, trainer = run(tmp_path, make)
    assert before == after == []
    assert straight == resumed
    assert "its 'cache'" in str(trainer.proof.checked)


class Calibrates(Net):
    """Sets a buffer, which is saved, where it makes a table."""

    def __init__(self) -> None:
        super().__init__(None)
        self.register_buffer("scale", torch.ones(3))
        self.table: Any = None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.ones(3)
            self.scale = 1 + batch.abs().mean(0)
        return self.linear(batch * self.scale * self.table)


def test_what_writes_over_a_buffer_is_told(tmp_path: Path) -> None:
    (said,) = run(tmp_path, lambda: _hooked(Calibrates()), 4)[0]
    assert "table" in said


def _with_features(counts: bool) -> Parts:
    """Returns a training whose step reads what a hook of the model keeps, or how many there are."""
    _, to_save, loader = _trainer(None, "nowhere")
    model, optimizer = to_save["model"], to_save["optimizer"]
    features: dict[str, Any] = {}

    def keep(module: nn.Module, given: Any, found: Any) -> None:
        features["last"] = found

    def step(engine: Any, batch: Any) -> float:
        optimizer.zero_grad()
        loss = (model(batch[0]) - batch[1]).square().mean() + features["last"].square().mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    def counting(engine: Any, batch: Any) -> float:
        return step(engine, batch) * len(features)

    model.linear.register_forward_hook(keep)
    return DeterministicEngine(counting if counts else step, seed=1), to_save, loader


def test_what_a_hook_keeps_for_the_step_is_not_told(tmp_path: Path) -> None:
    def make() -> Parts:
        return _with_features(counts=False)

    assert resumed(tmp_path, make, 4) == ([], [], True)
    assert "features" in run(tmp_path / "counts", lambda: _with_features(counts=True), 4)[0][0]
