"""What the step and handlers change and read, and no checkpoint holds, is told; logs are not.

The programs are one file although it is long: each differs from the next by where a value is kept,
and what is told of one must be left unsaid of its neighbour.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import enum
import io
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from ignite.metrics import Average, RunningAverage
from torch import nn
from torch.utils.data import DataLoader

from crosstrain.engine import (
    Checks,
    DeterministicEngine,
    EarlyStopping,
    EventEnum,
    Events,
    ModelCheckpoint,
    ResumeError,
    ResumeWarning,
    create_supervised_evaluator,
    create_supervised_trainer,
    resume_or_start,
)

Case = Callable[[Any, nn.Module, Any], None]
CASES: dict[str, tuple[str, Case]] = {}


def _case(told: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[function.__name__.strip("_")] = (told, function)
        return function

    return add


def _set_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@_case("its 'scheduler'")
def _scheduler(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())


class _Answering:
    """Answers for what it keeps under other names, as those do that hold a program's settings."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.__dict__["_kept"] = {
            name: _Answering(value) if isinstance(value, dict) else _Setting(value)
            for name, value in content.items()
        }

    def __getattr__(self, name: str) -> Any:
        try:
            found = self.__dict__["_kept"][name]
        except KeyError:
            raise AttributeError(name) from None
        return found.value if isinstance(found, _Setting) else found

    def __setattr__(self, name: str, value: Any) -> None:
        self._kept[name] = _Setting(value)


class _Setting:
    def __init__(self, value: Any) -> None:
        self.value = value


@_case("its \"settings._kept\\['train'\\]._kept\\['rate'\\].value\"")
def _answered_by_the_object_itself(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    settings = _Answering({"train": {"rate": 0.1, "size": 3}, "name": "a"})

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        settings.train.rate *= 0.9
        _set_rate(optimizer, settings.train.rate)


class _Table:
    """Gives its numbers as an array, as tables of other packages do."""

    def __init__(self) -> None:
        self._numbers: list[float] = []

    def append(self, number: float) -> None:
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._numbers)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return numpy.array(self._numbers, dtype)

    def __getitem__(self, places: slice) -> Any:
        return numpy.array(self._numbers[places])


@_case("its 'table'")
def _table(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    table = _Table()

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        table.append(1.0)
        _set_rate(optimizer, 0.1 / len(table))


@_case("its 'days'")
def _dates(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    days = {"now": datetime.date(2026, 1, 1)}

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        days["now"] += datetime.timedelta(days=1)
        _set_rate(optimizer, 0.1 / days["now"].day)


@_case("its 'lines'")
def _file_that_is_read(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    lines = Path(__file__).open()  # noqa: SIM115  it stays open while the run goes on

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        _set_rate(optimizer, 0.1 / (1 + len(lines.readline())))


@_case("its 'average'")
def _average(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.update_parameters(model))


@_case("its 'total'")
def _average_by_hand(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    total = copy.deepcopy(model)

    @trainer.on(Events.ITERATION_COMPLETED)
    def add() -> None:
        with torch.no_grad():
            for one, other in zip(total.parameters(), model.parameters(), strict=True):
                one.add_(other)


@_case("its 'best'")
def _best(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    best = float("inf")

    @trainer.on(Events.ITERATION_COMPLETED)
    def compare() -> None:
        nonlocal best
        if trainer.state.output < best:
            best = trainer.state.output
            _set_rate(optimizer, best)


@_case("its 'counted.calls'")
def _function_s_attribute(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    def counted() -> None:
        counted.calls += 1  # type: ignore[attr-defined]
        _set_rate(optimizer, 1 / counted.calls)  # type: ignore[attr-defined]

    counted.calls = 0  # type: ignore[attr-defined]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, counted)


@_case("its 'Counting.calls'")
def _class_s_attribute(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    class Counting:
        calls = 0

        def __call__(self) -> None:
            Counting.calls += 1
            _set_rate(optimizer, 1 / Counting.calls)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, Counting())


@_case("its 'object.calls'")
def _own_class_s_attribute(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    class Counting:
        calls = 0

        def __call__(self) -> None:
            self.__class__.calls += 1
            _set_rate(optimizer, 1 / self.calls)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, Counting())


@_case("its 'sums'")
def _mapping(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    sums = {"loss": 0.0}

    @trainer.on(Events.ITERATION_COMPLETED)
    def add() -> None:
        sums["loss"] += trainer.state.output
        _set_rate(optimizer, 0.1 / (1 + sums["loss"]))


@_case("its 'object.calls'")
def _object(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    class Decay:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, engine: Any) -> None:
            self.calls += 1
            _set_rate(optimizer, 0.1 / self.calls)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, Decay())


@_case(r"trainer\.state\.alpha")
def _of_state(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer.state, "alpha", 0.1))

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay(engine: Any) -> None:
        engine.state.alpha *= 0.9
        _set_rate(optimizer, engine.state.alpha)


class _Box:
    """What a harness keeps: a log, what it trains by, and a method that reads another one."""

    def __init__(self) -> None:
        self.rows: list[float] = []
        self.best = float("inf")
        self.calls = 0

    def note(self, value: float) -> None:
        self.rows.append(value)

    def report(self) -> float:
        return sum(self.rows)

    def rate(self) -> float:
        self.calls += 1
        return 0.1 / self.calls


@_case("its 'box.best'")
def _attribute_from_outside(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    box = _Box()

    @trainer.on(Events.ITERATION_COMPLETED)
    def compare() -> None:
        if trainer.state.output < box.best:
            box.best = trainer.state.output
            _set_rate(optimizer, box.best)


@_case("its 'box.calls'")
def _called_method(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    box = _Box()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: _set_rate(optimizer, box.rate()))


@_case("its 'object.box.calls'")
def _method_of_an_attribute(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    class Harness:
        def __init__(self) -> None:
            self.box = _Box()

        def handle(self) -> None:
            _set_rate(optimizer, self.box.rate())

    trainer.add_event_handler(Events.ITERATION_COMPLETED, Harness().handle)


@_case("""its "boxes\\['rates'\\]\\[0\\].calls\"""")
def _object_in_a_nest(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    boxes = {"rates": [_Box()]}

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        for box in boxes["rates"]:
            _set_rate(optimizer, box.rate())


class _Phase(enum.Enum):
    COLD, HOT = 0.1, 0.01


@_case("its 'phase': the run reads it")
def _member_of_an_enumeration(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    phase = _Phase.COLD

    @trainer.on(Events.ITERATION_COMPLETED)
    def heat() -> None:
        nonlocal phase
        phase = _Phase.HOT if phase is _Phase.COLD or trainer.state.output < 0.1 else phase
        _set_rate(optimizer, phase.value)


@_case("its 'seen'")
def _length_decides(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    seen: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def grow() -> None:
        seen.append(1.0)
        if len(seen) > 2:
            _set_rate(optimizer, 0.01)


@_case("its 'seen'")
def _large_set(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    seen = set(range(10_000))

    @trainer.on(Events.ITERATION_COMPLETED)
    def add() -> None:
        seen.add(-trainer.state.iteration)
        _set_rate(optimizer, 1 / len(seen))


@_case("its 'count'")
def _ends_in_what_is_read(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    count: list[float] = []
    rates: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def grow() -> None:
        count.append(1.0)
        rates.append(0.1 / len(count))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: _set_rate(optimizer, rates[-1]))


@_case("its 'settings.rate'")
def _namespace(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    settings = argparse.Namespace(rate=0.1)

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay() -> None:
        settings.rate *= 0.9
        _set_rate(optimizer, settings.rate)


@_case("its 'kept'")
def _default(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    @trainer.on(Events.ITERATION_COMPLETED)
    def decay(engine: Any, kept: list[float] = [0.1]) -> None:  # noqa: B006  that is the case
        kept[0] *= 0.9
        _set_rate(optimizer, kept[0])


@_case("its 'argument 0'")
def _handlers_argument(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    def decay(engine: Any, kept: list[float]) -> None:
        kept[0] *= 0.9
        _set_rate(optimizer, kept[0])

    trainer.add_event_handler(Events.ITERATION_COMPLETED, decay, [0.1])


@_case("a filter of ITERATION_COMPLETED.*its 'calls'")
def _filter(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    calls = [0]

    def third(engine: Any, event: int) -> bool:
        calls[0] += 1
        return calls[0] % 3 == 0

    def decay() -> None:
        _set_rate(optimizer, 0.9 * optimizer.param_groups[0]["lr"])

    trainer.add_event_handler(Events.ITERATION_COMPLETED(event_filter=third), decay)


@_case("its take, its 'object'")
def _method_of_a_list(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    take = [0.1 - 0.001 * number for number in range(20)].pop
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: _set_rate(optimizer, take()))


@_case("a handler of STARTED.*its 'RunningAverage'")
def _metric_that_is_read(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    RunningAverage(output_transform=lambda output: output).attach(trainer, "loss")

    @trainer.on(Events.ITERATION_COMPLETED)
    def follow() -> None:
        _set_rate(optimizer, min(0.1, trainer.state.metrics["loss"]))


def _make(**options: Any) -> tuple[Any, nn.Module, Any]:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, deterministic=True, **options
    )
    return trainer, model, optimizer


def _data() -> Any:
    return [(torch.ones(2, 3) * i, torch.ones(2, 1)) for i in range(4)]


def _said(folder: Path, attach: Case, more: dict[str, Any] | None = None) -> list[str]:
    torch.manual_seed(3)
    trainer, model, optimizer = _make()
    attach(trainer, model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_save = {"model": model, "optimizer": optimizer, **(more or {})}
        resume_or_start(trainer, to_save, folder, 1, signals=())
        trainer.run(_data(), max_epochs=2)
    return [str(item.message) for item in caught if item.category is ResumeWarning]


@pytest.mark.parametrize("name", CASES)
def test_what_is_changed_and_read_is_told_once(name: str, tmp_path: Path) -> None:
    told, attach = CASES[name]
    (said,) = _said(tmp_path, attach)
    with pytest.warns(match=told):
        warnings.warn(said, stacklevel=1)
    assert "to_save" in said


class _Numbers:
    """A named object that holds each small number, as counters and sizes do."""

    def __init__(self) -> None:
        self.epoch = 0
        vars(self).update({f"n{i}": i for i in range(200)})

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


class _Half:
    """A named object whose state leaves out what it also changes by."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.rate, self.factor, self.seen = optimizer, 0.1, 1.0, [0.0]

    def state_dict(self) -> dict[str, Any]:
        return {"the rate": self.rate, "seen": tuple(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate, self.seen = state["the rate"], list(state["seen"])

    def __call__(self) -> None:
        self.rate *= 0.9
        self.factor *= 0.95
        self.seen.append(sum(self.seen) + self.rate)
        _set_rate(self.optimizer, self.rate * self.factor)


def test_what_the_state_of_a_named_object_leaves_out_is_told(tmp_path: Path) -> None:
    trainer, model, optimizer = _make()
    half = _Half(optimizer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, half)
    to_save = {"model": model, "optimizer": optimizer, "half": half}
    resume_or_start(trainer, to_save, tmp_path, every=2, background=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(_data(), max_epochs=1)
    said = [str(one.message) for one in caught if one.category is ResumeWarning]
    assert len(said) == 1, said
    assert "its 'object.factor'" in said[0]
    assert "object.rate" not in said[0]
    assert "seen" not in said[0]


def test_a_number_that_a_named_object_has_too_is_told(tmp_path: Path) -> None:
    """Small numbers are one object wherever they stand: one is not named because another is."""

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        count = 0

        @trainer.on(Events.ITERATION_COMPLETED)
        def decay() -> None:
            nonlocal count
            count += 1
            _set_rate(optimizer, 0.1 / count)

    (said,) = _said(tmp_path, attach, {"numbers": _Numbers()})
    assert "its 'count'" in said


SIZE = 77


def test_a_constant_is_not_told_because_a_named_object_had_its_value(tmp_path: Path) -> None:
    numbers = _Numbers()

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        @trainer.on(Events.ITERATION_COMPLETED)
        def decay() -> None:
            vars(numbers).pop(f"n{SIZE}", None)
            _set_rate(optimizer, 0.1 / SIZE)

    assert not _said(tmp_path, attach, {"numbers": numbers})


def test_caches_of_an_installed_package_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that its functions fill as they are called is made again by a resumed run."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "parses_and_keeps.py").write_text(
        "_known = {}\n\n\nclass Parser:\n    count = 0\n\n"
        "    def parse(self, text):\n        _known[text, len(_known)] = text\n"
        "        return len(_known) and self.count\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    parser = __import__("parses_and_keeps").Parser()

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: _set_rate(optimizer, 0.1 + parser.parse("x"))
        )

    assert not _said(tmp_path / "quiet", attach)

    def counts(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        attach(trainer, model, optimizer)

        @trainer.on(Events.ITERATION_COMPLETED)
        def count() -> None:
            parser.count += 1

    (said,) = _said(tmp_path / "told", counts)
    assert "its 'parser.count'" in said
    assert "_known" not in said


def test_an_object_that_comes_later_is_told_once_and_not_by_all_that_it_holds(
    tmp_path: Path,
) -> None:
    class Plan:
        def __init__(self) -> None:
            self.first, self.second, self.third = 1.0, 2.0, [3.0]

        def factor(self) -> float:
            return self.first * self.second * self.third[0]

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        class Holder:
            plan: Any = None

        holder = Holder()
        holder.plan = None

        @trainer.on(Events.ITERATION_COMPLETED)
        def use(engine: Any) -> None:
            if engine.state.iteration == 2:
                holder.plan = Plan()
            _set_rate(optimizer, 0.1 if holder.plan is None else holder.plan.factor() / 60)

    (said,) = _said(tmp_path, attach)
    assert "its 'holder.plan'" in said
    assert "holder.plan." not in said


def test_each_of_two_handlers_of_one_name_is_looked_at(tmp_path: Path) -> None:
    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        count = [1]
        event = Events.ITERATION_COMPLETED
        trainer.add_event_handler(event, lambda: _set_rate(optimizer, 0.1 / len(count)))
        trainer.add_event_handler(event, lambda: count.append(1) if count else None)
        trainer.add_event_handler(event, lambda: None)

    (said,) = _said(tmp_path, attach)
    assert "its 'count'" in said


def test_what_another_handler_reaches_later_has_not_changed(tmp_path: Path) -> None:
    """What two handlers share is found by the first: which may be gone later."""

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        def size() -> int:
            return SIZE

        @trainer.on(Events.EPOCH_COMPLETED)
        def after() -> None:
            _set_rate(optimizer, 0.1 / size())

        @trainer.on(Events.EPOCH_STARTED(once=1))
        def before() -> None:
            _set_rate(optimizer, 0.2 / size())
            trainer.remove_event_handler(before, Events.EPOCH_STARTED(once=1))

    assert not _said(tmp_path, attach)


def test_what_is_named_is_not_told(tmp_path: Path) -> None:
    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        named["scheduler"] = scheduler
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
        trainer.state_dict_user_keys.append("alpha")
        trainer.state.alpha = 1.0
        CASES["of_state"][1](trainer, model, optimizer)

    named: dict[str, Any] = {}
    trainer, model, optimizer = _make()
    attach(trainer, model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        to_save = {"model": model, "optimizer": optimizer, **named}
        resume_or_start(trainer, to_save, tmp_path, 1, signals=())
        trainer.run(_data(), max_epochs=2)


def test_logs_and_what_stays_the_same_are_not_told(tmp_path: Path) -> None:
    """What is appended to, counted up and printed; a teacher, an evaluator and its data."""
    losses: list[float] = []
    seen: dict[int, float] = {}
    count = 0

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        teacher = nn.Linear(3, 1)
        evaluator = DeterministicEngine(lambda engine, batch: float(model(batch[0]).sum()))
        history: list[Any] = []
        text, file = io.StringIO(), (tmp_path / "log").open("w")

        @trainer.on(Events.ITERATION_COMPLETED)
        def log(engine: Any) -> None:
            json.dump(engine.state.output, file)
            print(engine.state.output, file=text)
            nonlocal count
            losses.append(engine.state.output)
            seen[engine.state.iteration] = engine.state.output
            count += 1
            history.append(teacher(torch.ones(1, 3)).detach())
            print(sum(losses) / len(losses))
            evaluator.run(_data())

    assert not _said(tmp_path, attach)
    assert count == len(losses) == len(seen) == 8


class _Meter:
    """As most scripts have it: an average of what was added up."""

    def __init__(self) -> None:
        self.value = self.sum = self.average = 0.0
        self.count = 0

    def update(self, value: float) -> None:
        self.value = value
        self.sum += value
        self.count += 1
        self.average = self.sum / self.count if self.count else 0.0


@pytest.mark.parametrize("used", [False, True])
def test_an_average_that_is_only_shown_is_a_log(used: bool, tmp_path: Path) -> None:
    """A running mean, alone or by name, and a meter; where something uses them, they are told."""
    running: float | None = None
    by_name: dict[str, float] = {}
    meter = _Meter()

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        @trainer.on(Events.ITERATION_COMPLETED)
        def log(engine: Any) -> None:
            nonlocal running
            loss = engine.state.output
            running = loss if running is None else 0.9 * running + 0.1 * loss
            by_name["loss"] = 0.9 * by_name.get("loss", 0.0) + 0.1 * math.sqrt(loss)
            meter.update(loss)
            print(running, by_name, meter.average)

        def use() -> None:
            _set_rate(optimizer, 0.1 / (2 + (running or 0) + meter.average + len(by_name)))

        if used:
            trainer.add_event_handler(Events.ITERATION_COMPLETED, use)

    said = " ".join(_said(tmp_path, attach))
    assert all((name in said) is used for name in ("running", "by_name", "meter.average"))


_BEGAN = time.perf_counter()


class _Unequal:
    """Raises an error where it is compared, as a progress bar does."""

    def __eq__(self, other: object) -> bool:
        raise AttributeError("_comparable")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("used", ["readings", "sums"])
def test_what_a_clock_has_shown_is_not_told(used: str, tmp_path: Path) -> None:
    """Readings decide no weights; a number does that is as large as theirs, or a sum of them."""
    end = last = first = total = _BEGAN
    stamps: dict[str, Any] = {}
    dates = [datetime.datetime.now(datetime.UTC), datetime.datetime(2026, 1, 1)]
    odd = _Unequal()

    def readings() -> None:
        nonlocal end, last, first
        kept = (end, last, first, stamps.get("end"), *dates)
        end, last, first = time.time(), time.perf_counter(), time.time_ns()
        stamps["end"] = time.time()
        dates[:] = [datetime.datetime.now(datetime.UTC), datetime.datetime.now()]
        hash(str(kept))

    def sums() -> None:
        nonlocal end, total
        end, total = end + 1e-4 / 3, total + end
        hash((end, total, id(odd)))

    handler = readings if used == "readings" else sums
    said = _said(
        tmp_path, lambda trainer, *_: trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    )
    assert ["its 'end', its 'total'" in one for one in said] == (
        [] if used == "readings" else [True]
    )


@pytest.mark.parametrize("named", [True, False])
def test_what_is_kept_for_each_parameter_is_told_by_its_place(named: bool, tmp_path: Path) -> None:
    """An optimizer for each, which steps as its gradient comes; numbers are no names."""
    optimizers: dict[Any, Any] = {}

    def step(parameter: Any) -> None:
        optimizers[parameter].step()

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        for parameter in model.parameters():
            optimizers[parameter] = torch.optim.SGD([parameter], 0.01, momentum=0.5)
            parameter.register_post_accumulate_grad_hook(step)
        if named:
            more["each"] = list(optimizers.values())

    more: dict[str, Any] = {}
    said = _said(tmp_path, attach, more)
    assert len(said) == (0 if named else 1)
    assert all("its 'optimizers[Parameter 0]'" in one and "tensor(" not in one for one in said)


def _states_taken(trainer: Any) -> None:
    states: list[Any] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: states.append(trainer.state_dict()) if len(states) < 2 else None,
    )


def _states_by_number(trainer: Any) -> None:
    fetched: list[Any] = []
    states: dict[int, Any] = {}

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine: Any) -> None:
        fetched.append(engine.state.output)
        states.update({len(fetched): engine.state_dict()})


def _first_few(trainer: Any) -> None:
    first: list[Any] = []
    smooth = {"loss": 0.0}
    count = 0

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine: Any) -> None:
        nonlocal count
        count = count + 1
        smooth["loss"] = 0.9 * smooth["loss"] + 0.1 * engine.state.output
        if engine.state.output not in first:
            first.append(engine.state.output)


def _log_in_an_object(trainer: Any) -> None:
    box = _Box()

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine: Any) -> None:
        box.note(engine.state.output)
        box.calls = box.calls + 1


def _log_in_a_harness(trainer: Any) -> None:
    class Harness:
        def __init__(self) -> None:
            self.box = _Box()

        def handle(self, engine: Any) -> None:
            self.box.note(engine.state.output)

        def report(self) -> float:
            return self.box.report()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, Harness().handle)


@pytest.mark.parametrize(
    "attach", [_states_taken, _states_by_number, _first_few, _log_in_an_object, _log_in_a_harness]
)
def test_what_decides_only_what_it_takes_next_is_a_log(attach: Any, tmp_path: Path) -> None:
    assert not _said(tmp_path, lambda trainer, model, optimizer: attach(trainer))


def test_a_step_of_the_users_own_is_looked_into() -> None:
    hidden: list[Any] = [None]
    steps = [0]

    def step(engine: Any, batch: Any) -> float:
        before, steps[0] = hidden[0], steps[0] + 1
        hidden[0] = batch if before is None else before * 0.5 + batch
        return float(hidden[0] / steps[0])

    engine = DeterministicEngine(step, seed=1, checks=Checks(unnamed="error"))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.state_dict())
    # The owner of several is named once.
    with pytest.raises(ResumeError, match=r"of the step, its '(hidden|steps)', its '.*': the run"):
        engine.run([1.0, 2.0])
    engine = DeterministicEngine(step, seed=1, checks=Checks(unnamed="off"))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.state_dict())
    engine.run([1.0, 2.0])


def test_generators_of_another_loader_are_told() -> None:
    loader: Any = DataLoader([1, 2, 3], shuffle=True, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    engine = DeterministicEngine(lambda engine, batch: next(iter(loader)), seed=1)
    engine.run([1, 2])
    with pytest.warns(ResumeWarning, match="its 'loader', its generator"):
        engine.state_dict()


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.GET_BATCH_STARTED])
def test_the_last_output_and_metrics_are_there_before_the_first_batch(event: Any) -> None:
    def play(state: Any = None) -> tuple[list[Any], Any]:
        rows: list[Any] = []
        states: dict[int, Any] = {}
        engine = DeterministicEngine(lambda engine, batch: batch * 2.0, seed=1)
        engine.add_event_handler(
            event, lambda: rows.append((engine.state.output, dict(engine.state.metrics)))
        )

        @engine.on(Events.EPOCH_COMPLETED)
        def save() -> None:
            engine.state.metrics["last"] = engine.state.output
            states[engine.state.epoch] = engine.state_dict()

        if state is not None:
            engine.load_state_dict(state)
        engine.run([1, 2], max_epochs=3)
        return rows, states

    rows, states = play()
    rest, _ = play(states[2])
    assert rest == rows[-len(rest) :]
    assert rest[0] == (4.0, {"last": 4.0})


def _evaluator(model: nn.Module) -> Any:
    return create_supervised_evaluator(
        model, metrics={"loss": Average(output_transform=lambda pair: pair[0])}, backend="cpu"
    )


def _counter_of_an_evaluator(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    evaluator, runs = _evaluator(model), 0
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(_data()))

    @evaluator.on(Events.COMPLETED)
    def count() -> None:
        nonlocal runs
        runs += 1
        _set_rate(optimizer, 0.1 / runs)


def _best_of_an_evaluator(trainer: Any, model: nn.Module, optimizer: Any) -> None:
    evaluator = _evaluator(model)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(_data()))
    stops = EarlyStopping(2, lambda engine: -float(engine.state.metrics["loss"].sum()), trainer)
    evaluator.add_event_handler(Events.COMPLETED, stops)


@pytest.mark.parametrize(
    ("attach", "told"),
    [(_counter_of_an_evaluator, "its 'runs'"), (_best_of_an_evaluator, "EarlyStopping")],
)
def test_what_the_handlers_of_an_evaluator_keep_is_told(
    attach: Case, told: str, tmp_path: Path
) -> None:
    (said,) = _said(tmp_path, attach)
    assert told in said


def test_the_best_checkpoints_that_nobody_named_are_told(tmp_path: Path) -> None:
    def keep(score: Any, trainer: Any, model: nn.Module) -> ModelCheckpoint:
        best = ModelCheckpoint(tmp_path / "best", n_saved=1, score_function=score)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, best, {"model": model})
        return best

    def attach(trainer: Any, model: nn.Module, optimizer: Any) -> None:
        keep(lambda engine: engine.state.epoch, trainer, model)

    (said,) = _said(tmp_path / "1", attach)
    assert "ModelCheckpoint" in said
    shutil.rmtree(tmp_path / "best")
    assert not _said(tmp_path / "2", lambda trainer, model, _: keep(None, trainer, model))


class _Own(EventEnum):
    TURN = "turn"


def _rates(folder: Path, iterations: int) -> list[float]:
    """Trains up to an iteration, with a rate that follows from what runs in handlers."""
    torch.manual_seed(3)
    trainer, model, optimizer = _make()
    evaluator = _evaluator(model)
    trainer.register_events(*_Own, event_to_attr={_Own.TURN: "turns"})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(_data()))
    rates: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def turn() -> None:
        loss = evaluator.state.metrics.get("loss", torch.ones(1))
        _set_rate(optimizer, 0.1 / (1 + float(loss.abs().sum())))
        trainer.state.turns += 1
        trainer.fire_event(_Own.TURN)
        rates.append(optimizer.param_groups[0]["lr"])

    @trainer.on(_Own.TURN(every=3))
    def lower() -> None:
        _set_rate(optimizer, 0.01)

    to_save = {"model": model, "optimizer": optimizer}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        resume_or_start(trainer, to_save, folder, 1, signals=())
        trainer.run(_data(), max_iters=iterations, epoch_length=4)
    return rates


def test_an_evaluators_last_metrics_and_counts_of_events_go_on(tmp_path: Path) -> None:
    straight = _rates(tmp_path / "straight", 12)
    assert _rates(tmp_path / "killed", 6) + _rates(tmp_path / "killed", 12) == straight
