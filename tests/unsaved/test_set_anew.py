"""What is set before it is read, wherever a run goes on, is not told; what looks like it is.

One file, although it is long: each program has its neighbour that differs in one line and has to be
told, and all are run straight, stopped and resumed in one way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from killed_runs import SELDOM, Parts, resumed, rows, run
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    Engine,
    Events,
)

KINDS: dict[str, Callable[[float], Any]] = {
    "number": float,
    "NumPy's": numpy.float32,
    "tensor": lambda drawn: torch.full((3,), drawn),
    "array": lambda drawn: numpy.full(3, drawn),
    "list": lambda drawn: [drawn, 1.0],
}


def _factor(value: Any) -> float:
    return float(torch.as_tensor(value, dtype=torch.float64).mean())


class Mixes:
    """Holds what a handler sets, as settings of mixup are held."""

    def __init__(self) -> None:
        self.lam: Any = 1.0

    def draw(self, kind: str) -> None:
        self.lam = KINDS[kind](0.5 + float(torch.rand(())))


class Net(nn.Module):
    """Multiplies by what it holds, or by what an object holds."""

    def __init__(self, mixes: Any = None) -> None:
        super().__init__()
        self.linear, self.mixes, self.lam = nn.Linear(3, 1), mixes, numpy.float32(1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        scale = _factor(self.lam) if self.mixes is None else _factor(self.mixes.lam)
        return self.linear(batch * scale)


def _loader(data: Any = None, **options: Any) -> Any:
    return DataLoader(data or rows(8), batch_size=2, **options)  # type: ignore[arg-type]


class Program:
    """A training whose model, step or handler reads what an object holds."""

    def __init__(self, kind: str, place: str) -> None:
        self.kind, self.mixes = kind, Mixes()
        self.model = model = Net({"forward": self.mixes}.get(place))
        if place == "module":
            self.mixes = model  # type: ignore[assignment]
        mixes = self.mixes
        self.optimizer = optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

        def step(engine: Any, batch: Any) -> float:
            scale = _factor(mixes.lam) if place == "step" else 1.0
            loss = ((model(batch[0]) - batch[1]) * scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        self.trainer = DeterministicEngine(step, checks=Checks(batch_before="off"), seed=1)
        if place == "handler":

            @self.trainer.on(Events.ITERATION_COMPLETED)
            def rate() -> None:
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 * _factor(mixes.lam)

    @property
    def parts(self) -> Parts:
        return self.trainer, {"model": self.model, "optimizer": self.optimizer}, _loader()


PLACES = ("step", "forward", "handler", "module")
Attach = Callable[[Program], None]
SURE: dict[str, Attach] = {}
ELSE: dict[str, Attach] = {}


def _sure(function: Attach) -> Attach:
    SURE[function.__name__.strip("_")] = function
    return function


def _else(function: Attach) -> Attach:
    ELSE[function.__name__.strip("_")] = function
    return function


@_sure
def _directly(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw() -> None:
        drawn = 0.5 + float(torch.rand(()))
        mixes.lam = KINDS[kind](drawn)


@_sure
def _each_iteration(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.ITERATION_STARTED)
    def follow(engine: Any) -> None:
        mixes.lam = KINDS[kind](1 / engine.state.iteration)


@_sure
def _by_a_method(program: Program) -> None:
    mixes, kind = program.mixes, program.kind
    program.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: mixes.draw(kind))


def _draw(mixes: Any, kind: str) -> None:
    mixes.lam = KINDS[kind](0.5 + float(torch.rand(())))


@_sure
def _by_a_function(program: Program) -> None:
    mixes, kind = program.mixes, program.kind
    program.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: _draw(mixes, kind))


@_sure
def _by_an_argument(program: Program) -> None:
    def draw(mixes: Any, kind: str) -> None:
        _draw(mixes, kind=kind)

    program.trainer.add_event_handler(Events.EPOCH_STARTED, draw, program.mixes, program.kind)


@_sure
def _read_when_the_epoch_ends(program: Program) -> None:
    _directly(program)
    mixes, optimizer = program.mixes, program.optimizer

    @program.trainer.on(Events.EPOCH_COMPLETED)
    def rate() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * _factor(mixes.lam)


@_else
def _once(program: Program) -> None:
    mixes, kind = program.mixes, program.kind
    program.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: _draw(mixes, kind))


@_else
def _every_second(program: Program) -> None:
    mixes, kind = program.mixes, program.kind
    program.trainer.add_event_handler(Events.EPOCH_STARTED(every=2), lambda: _draw(mixes, kind))


@_else
def _if_it_is_due(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw(engine: Any) -> None:
        if engine.state.epoch == 2:
            mixes.lam = KINDS[kind](2)


@_else
def _unless_it_returns(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw(engine: Any) -> None:
        if engine.state.epoch != 2:
            return
        mixes.lam = KINDS[kind](2)


@_else
def _of_what_it_was(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw() -> None:
        mixes.lam = KINDS[kind](_factor(mixes.lam) * 0.7)


@_else
def _changed_within_the_epoch(program: Program) -> None:
    _directly(program)
    mixes, kind = program.mixes, program.kind

    @program.trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        mixes.lam = KINDS[kind](_factor(mixes.lam) * 0.9)


@_else
def _read_before_it_is_set(program: Program) -> None:
    mixes, optimizer = program.mixes, program.optimizer

    @program.trainer.on(Events.EPOCH_STARTED)
    def rate() -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * _factor(mixes.lam)

    _directly(program)


@_else
def _read_by_an_evaluator(program: Program) -> None:
    mixes, optimizer = program.mixes, program.optimizer
    evaluator = Engine(lambda engine, batch: _factor(mixes.lam))

    @program.trainer.on(Events.EPOCH_STARTED)
    def rate() -> None:
        evaluator.run([0])
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * evaluator.state.output

    _directly(program)


@_else
def _read_by_the_model(program: Program) -> None:
    model, optimizer = program.model, program.optimizer
    model.mixes = None if program.mixes is model else program.mixes

    @program.trainer.on(Events.EPOCH_STARTED)
    def rate() -> None:
        with torch.no_grad():
            found = float(model.eval()(torch.ones(1, 3)).abs().mean())
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * found

    _directly(program)


@_else
def _one_of_two(program: Program) -> None:
    both, kind = (program.mixes, Mixes()), program.kind

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw(engine: Any) -> None:
        one = both[engine.state.epoch % 2]
        one.lam = KINDS[kind](1 + engine.state.epoch)


@_else
def _another_than_the_default(program: Program) -> None:
    mixes, kind = program.mixes, program.kind

    def draw(engine: Any, mixes: Any = mixes) -> None:
        mixes.lam = KINDS[kind](1 + engine.state.epoch)

    program.trainer.add_event_handler(Events.EPOCH_STARTED, draw, mixes=Mixes())

    @program.trainer.on(Events.EPOCH_COMPLETED(once=1))
    def change() -> None:
        mixes.lam = KINDS[kind](2)


@_else
def _of_the_weights(program: Program) -> None:
    mixes, kind, model = program.mixes, program.kind, program.model

    @program.trainer.on(Events.EPOCH_STARTED)
    def draw() -> None:
        mixes.lam = KINDS[kind](float(model.linear.weight.detach().abs().mean()))


_drawn = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@_drawn
@given(
    how=st.sampled_from(sorted(SURE)),
    kind=st.sampled_from(sorted(KINDS)),
    place=st.sampled_from(PLACES),
    dies=st.integers(1, 15),
    every=st.sampled_from((1, 2)),
)
def test_what_is_set_each_time_is_not_told(
    how: str, kind: str, place: str, dies: int, every: int, tmp_path_factory: Any
) -> None:
    def make() -> Parts:
        program = Program(kind, place)
        # A model that is passed on may be called.
        SURE["directly" if place == "module" and how.startswith("by") else how](program)
        return program.parts

    found = resumed(tmp_path_factory.mktemp("set"), make, dies, every)
    assert found == ([], [], True)


@_drawn
@given(
    how=st.sampled_from(sorted(ELSE)),
    kind=st.sampled_from(sorted(KINDS)),
    place=st.sampled_from(PLACES),
    dies=st.integers(1, 15),
    every=st.sampled_from((1, 2)),
)
def test_what_is_set_in_another_way_is_identical_or_told(
    how: str, kind: str, place: str, dies: int, every: int, tmp_path_factory: Any
) -> None:
    def make() -> Parts:
        program = Program(kind, place)
        ELSE[how](program)
        return program.parts

    before, after, identical = resumed(tmp_path_factory.mktemp("set"), make, dies, every)
    assert identical or any("lam" in one for one in before + after)


@pytest.mark.parametrize("how", ELSE)
def test_each_other_way_is_told(how: str, tmp_path: Path) -> None:
    def make() -> Parts:
        program = Program("number", "step")
        ELSE[how](program)
        return program.parts

    _, straight, _ = run(tmp_path / "straight", make, None, SELDOM)
    differ = []
    for dies in (8, 11):
        before, _, _ = run(tmp_path / str(dies), make, dies)
        after, resumed, _ = run(tmp_path / str(dies), make)
        differ.append(straight != resumed)
        assert straight == resumed or any("lam" in one for one in before + after)
    assert any(differ)


class Keeps(nn.Module):
    """Keeps what it has drawn for what it calls, as augmentations that can be played again do."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: Any = None

    def draw(self) -> Any:
        return {"factor": torch.rand(2, 1)}

    def forward(self, batch: torch.Tensor, drawn: Any = None) -> torch.Tensor:
        if drawn is None:
            drawn = self.draw()
        self._drawn = drawn
        return batch * self._drawn["factor"]


class KeepsAverage(Keeps):
    """Reads what it has kept before it keeps another."""

    def forward(self, batch: torch.Tensor, drawn: Any = None) -> torch.Tensor:
        drawn = self.draw()
        if self._drawn is not None:
            drawn["factor"] = (drawn["factor"] + self._drawn["factor"]) / 2
        self._drawn = drawn
        return batch * self._drawn["factor"]


class KeepsSome(Keeps):
    """Keeps another only now and then."""

    def forward(self, batch: torch.Tensor, drawn: Any = None) -> torch.Tensor:
        if self._drawn is not None and float(torch.rand(())) < 0.5:
            return batch * self._drawn["factor"]
        self._drawn = self.draw()
        return batch * self._drawn["factor"]


class KeepsBlended(Keeps):
    """Calls what reads it before it keeps another."""

    def blend(self, drawn: Any) -> Any:
        return drawn if self._drawn is None else {"factor": drawn["factor"] * self._drawn["factor"]}

    def forward(self, batch: torch.Tensor, drawn: Any = None) -> torch.Tensor:
        drawn = self.blend(self.draw())
        self._drawn = drawn
        return batch * self._drawn["factor"]


@pytest.mark.parametrize("kind", [Keeps, KeepsAverage, KeepsSome, KeepsBlended])
def test_what_a_forward_keeps_before_it_reads_is_not_told(
    kind: type[Keeps], tmp_path: Path
) -> None:
    def make() -> Parts:
        model = nn.Sequential(kind(), nn.Linear(3, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)

        def step(engine: Any, batch: Any) -> None:
            optimizer.zero_grad()
            (model(batch[0]) - batch[1]).square().mean().backward()
            optimizer.step()

        trainer = DeterministicEngine(step, seed=1)
        return trainer, {"model": model, "optimizer": optimizer}, _loader()

    before, after, identical = resumed(tmp_path, make, 5, 1)
    assert identical == (kind is Keeps)
    assert ["_drawn" in one for one in before + after] == [True] * 2 * (not identical)


class Scales:
    """Is told by the step how to scale."""

    def __init__(self) -> None:
        self.scale = 1.0

    def follow(self, iteration: int) -> None:
        self.scale = 1.0 / iteration

    def follow_some(self, iteration: int) -> None:
        if iteration % 3 == 0:
            self.scale = 1.0 / iteration


@pytest.mark.parametrize("how", ["first", "sometimes", "after it was read"])
def test_what_the_step_sets_before_it_reads_is_not_told(how: str, tmp_path: Path) -> None:
    def make() -> Parts:
        program, scales = Program("number", "nowhere"), Scales()
        model, optimizer = program.model, program.optimizer

        def train(scale: float, batch: Any) -> None:
            optimizer.zero_grad()
            ((model(batch[0]) - batch[1]) * scale).square().mean().backward()
            optimizer.step()

        def first(engine: Any, batch: Any) -> None:
            scales.follow(engine.state.iteration)
            train(scales.scale, batch)

        def sometimes(engine: Any, batch: Any) -> None:
            scales.follow_some(engine.state.iteration)
            train(scales.scale, batch)

        def late(engine: Any, batch: Any) -> None:
            train(scales.scale, batch)
            scales.follow(engine.state.iteration)

        step = {"first": first, "sometimes": sometimes}.get(how, late)
        return DeterministicEngine(step, seed=1), *program.parts[1:]

    before, after, identical = resumed(tmp_path, make, 7, 1)
    assert identical == (how == "first")
    assert ["scale" in one for one in before + after] == [True] * (len(before) + len(after))
    assert bool(before) != identical


class Averages(nn.Module):
    """An average of the weights, beside a module that is named; or a count of its own."""

    def __init__(self, model: nn.Module, counts: bool, swaps: bool) -> None:
        super().__init__()
        self.module, self.counts, self.swaps = copy.deepcopy(model), counts, swaps
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if self.counts:
            self.seen += 1
        for own, other in zip(self.module.parameters(), model.parameters(), strict=True):
            own.lerp_(other, 0.1 / (1 + float(self.seen)))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.module(batch)


@pytest.mark.parametrize("which", ["named", "counts", "swaps", "unnamed"])
def test_a_wrapper_of_what_is_named_is_told_for_what_else_it_has(
    which: str, tmp_path: Path
) -> None:
    def make() -> Parts:
        program = Program("number", "nowhere")
        model, trainer = program.model, program.trainer
        average = Averages(model, which == "counts", which == "swaps")
        others = [average.module, copy.deepcopy(average.module)]

        @trainer.on(Events.ITERATION_COMPLETED)
        def update() -> None:
            average.update(model)
            for own, other in zip(model.parameters(), average.parameters(), strict=True):
                own.data.lerp_(other, 0.1)

        if which == "swaps":

            @trainer.on(Events.EPOCH_COMPLETED(once=1))
            def swap() -> None:
                average.module = others[1]

        _, to_save, loader = program.parts
        named = {} if which == "unnamed" else {"first": others[0], "second": others[1]}
        return trainer, {**to_save, **named}, loader

    before, _, identical = resumed(tmp_path, make, 6, 1)
    assert identical == (which == "named")
    assert any("average" in one for one in before) == (which != "named")


class Outer(torch.optim.SGD):
    """Steps by an inner optimizer that shares its groups, as SAM and others do."""

    def __init__(self, parameters: Any, momentum: float = 0.0) -> None:
        super().__init__(parameters, 0.05)
        self.inner = torch.optim.SGD(self.param_groups, 0.05, momentum=momentum)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


class LoadsItself(Outer):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)


class Joins(Outer):
    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.inner.param_groups = self.param_groups


@pytest.mark.parametrize("schedules", [False, True])
@pytest.mark.parametrize("kind", [Outer, LoadsItself, Joins])
def test_an_inner_optimizer_is_told_only_if_it_does_not_go_on_with_its_groups(
    kind: type[Outer], schedules: bool, tmp_path: Path
) -> None:
    def make() -> Parts:
        program = Program("number", "nowhere")
        model, optimizer = program.model, kind(program.model.parameters())

        def step(engine: Any, batch: Any) -> None:
            optimizer.zero_grad()
            (model(batch[0]) - batch[1]).square().mean().backward()
            optimizer.step()

        trainer = DeterministicEngine(step, seed=1)
        if schedules:

            @trainer.on(Events.EPOCH_COMPLETED)
            def decay(engine: Any) -> None:
                for group in optimizer.param_groups:
                    group["lr"] = 0.05 / engine.state.epoch

        return trainer, {"model": model, "optimizer": optimizer}, _loader()

    # Before the rate has changed for the first time, and after.
    before, _, identical = resumed(tmp_path / "before", make, 2, 1)
    if kind is Outer:
        assert resumed(tmp_path / "after", make, 6, 1) == ([], [], True)
    assert identical == (not schedules or kind is not LoadsItself)
    assert any("inner" in one for one in before) == (kind is LoadsItself)


@pytest.mark.parametrize("which", ["plain", "momentum", "another rate"])
def test_an_optimizer_that_keeps_nothing_is_told_for_what_it_is_set_to(
    which: str, tmp_path: Path
) -> None:
    def make() -> Parts:
        program = Program("number", "nowhere")
        other = torch.optim.SGD(
            [program.model.linear.weight], 0.01, momentum=0.9 * (which == "momentum")
        )
        program.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: other.step())
        if which == "another rate":

            @program.trainer.on(Events.ITERATION_COMPLETED)
            def decay() -> None:
                for group in other.param_groups:
                    group["lr"] *= 0.9

        return program.parts

    before, _, identical = resumed(tmp_path, make, 5, 1)
    assert identical == (which == "plain")
    assert any("'other'" in one for one in before) == (which != "plain")


class Table(MutableMapping[str, Any]):
    """A file of another library's that is read by names."""

    __slots__ = ("_columns",)

    def __init__(self, names: str) -> None:
        self._columns = {name: [one for one, _ in rows(8)] for name in names}

    def __getitem__(self, name: str) -> Any:
        return self._columns[name]

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError("It is open for reading.")

    def __delitem__(self, name: str) -> None:
        raise TypeError("It is open for reading.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class Opens(Dataset[Any]):
    """Opens its file when the first sample is fetched."""

    def __init__(self, names: str) -> None:
        self.names, self.file = names, None

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = Table(self.names)
        return self.file["x"][index], torch.ones(1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("then", ["xy", "xyz"])
def test_a_file_that_is_opened_at_first_use_is_told_only_if_it_is_another(
    then: str, nested: bool, tmp_path: Path
) -> None:
    def make(names: str) -> Parts:
        program = Program("number", "nowhere")
        data: Any = Opens(names)
        data = torch.utils.data.Subset(data, range(8)) if nested else data
        return program.trainer, program.parts[1], _loader(data)

    before, _, _ = run(tmp_path, lambda: make("xy"), 5)
    after, _, trainer = run(tmp_path, lambda: make(then))
    assert before == []
    assert ["file" in one for one in after] == [True] * (then != "xy")
    assert ("file" in str(trainer.proof.checked)) == (then == "xy")


class Tokenizer:
    """Warns once of each thing, and remembers it."""

    def __init__(self) -> None:
        self.warned: dict[str, bool] = {}

    def pad(self, samples: Any) -> Any:
        if not self.warned.get("slow"):
            self.warned["slow"] = True
        return [torch.stack(part) for part in zip(*samples, strict=True)]


class Collates:
    """Holds a tokenizer, as those of Hugging Face do."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: Any) -> Any:
        return self.tokenizer.pad(samples)


class Numbers(Tokenizer):
    """Keeps what it has drawn for each thing in a mapping that no state holds."""

    def pad(self, samples: Any) -> Any:
        more = self.__dict__.setdefault("drawn", Drawn())
        given, wanted = super().pad(samples)
        return given + more.setdefault("noise", torch.rand(3)), wanted


class Drawn(dict[str, Any]):
    """A mapping of one's own kind."""


@pytest.mark.parametrize("kind", [Tokenizer, Numbers])
def test_what_a_collators_tokenizer_keeps_is_a_part_of_the_state(
    kind: type[Tokenizer], tmp_path: Path
) -> None:
    def make() -> Parts:
        program = Program("number", "nowhere")
        loader = _loader(collate_fn=Collates(kind()))
        return program.trainer, program.parts[1], loader

    before, _, identical = resumed(tmp_path, make, 5, 1)
    assert identical == (kind is Tokenizer)
    assert [("drawn" in one, "large" in one) for one in before] == [(True, False)] * (not identical)
