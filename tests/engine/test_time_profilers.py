"""The time profilers, and `time_handlers`, which they are built on: what is timed and told."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.engine
import ignite.handlers
import pytest
import torch
from differential import nothing

import crosstrain.engine
from crosstrain.engine import (
    BasicTimeProfiler,
    Engine,
    EventEnum,
    Events,
    HandlersTimeProfiler,
    convert_tensor,
)


def profiled(library: Any, kind: Callable[[], Any]) -> Any:
    """Runs two epochs of three iterations with two handlers; returns the profiler."""
    engine, profiler = library.Engine(nothing), kind()
    profiler.attach(engine)

    @engine.on(library.Events.EPOCH_COMPLETED)
    def at_epoch() -> None:
        time.sleep(0.001)

    @engine.on(library.Events.ITERATION_COMPLETED(every=2))
    def at_iteration() -> None:
        time.sleep(0.001)

    engine.run([1, 2, 3], max_epochs=2)
    return profiler


def form(value: Any) -> Any:
    """Returns the form of a result: its keys and texts, and the types of its numbers."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [form(item) for item in value]
    return value if isinstance(value, str) else type(value)


def test_basic_results_have_the_form_of_ignites() -> None:
    ours = profiled(crosstrain.engine, BasicTimeProfiler).get_results()
    theirs = profiled(ignite.engine, ignite.handlers.BasicTimeProfiler).get_results()
    assert form(ours) == form(theirs)


def test_results_of_handlers_have_the_form_of_ignites() -> None:
    ours = profiled(crosstrain.engine, HandlersTimeProfiler).get_results()
    theirs = profiled(ignite.engine, ignite.handlers.HandlersTimeProfiler).get_results()
    assert sorted(map(str, form(ours))) == sorted(map(str, form(theirs)))


def test_ignite_prints_our_results(capsys: pytest.CaptureFixture[str]) -> None:
    basic = profiled(crosstrain.engine, BasicTimeProfiler).get_results()
    ignite.handlers.BasicTimeProfiler.print_results(basic)
    said = BasicTimeProfiler.print_results(basic)
    assert said in capsys.readouterr().out
    rows = profiled(crosstrain.engine, HandlersTimeProfiler).get_results()
    before = form(rows)
    HandlersTimeProfiler.print_results(rows)
    assert form(rows) == before
    assert "at_iteration" in capsys.readouterr().out
    ignite.handlers.HandlersTimeProfiler.print_results(rows)


@pytest.mark.parametrize("rows", [[1, 2, 3], iter(range(6))])
def test_each_time_is_taken_once(rows: Any, tmp_path: Path) -> None:
    """Also where an epoch's length is not known, and in a second run, which begins anew."""
    engine = Engine(nothing)
    basic, each = BasicTimeProfiler(), HandlersTimeProfiler()
    for profiler in (basic, each, basic):
        profiler.attach(engine)

    @engine.on(Events.ITERATION_COMPLETED(every=2))
    def even() -> None: ...

    epochs = 1
    if isinstance(rows, list):
        epochs = 2
        engine.run(rows, max_epochs=5)
        engine.state.max_epochs = None
    engine.run(rows, max_epochs=epochs)
    for profiler in (basic, each):
        assert len(profiler.processing_times) == len(profiler.dataflow_times) == 6
        assert min(profiler.processing_times) >= 0
    counts = {event.name: len(times) for event, times in basic.event_handlers_times.items()}
    assert counts["STARTED"] == counts["COMPLETED"] == 1
    assert counts["EPOCH_STARTED"] == counts["EPOCH_COMPLETED"] == epochs
    assert counts["ITERATION_STARTED"] == counts["ITERATION_COMPLETED"] == 6
    (times,) = each.event_handlers_times[Events.ITERATION_COMPLETED].values()
    assert len(times) == 3
    basic.write_results(tmp_path / "basic.csv")
    each.write_results(tmp_path / "each.csv")
    for name, columns in (("basic", 12), ("each", 4)):
        with (tmp_path / f"{name}.csv").open() as file:
            table = list(csv.reader(file))
        assert [len(row) for row in table] == [columns] * 7


class Mine(EventEnum):
    """An event of a user's."""

    X = "x"


def test_every_handler_is_told_of_in_its_order() -> None:
    """Of own events, with what an event passes, added meanwhile, and beside a filter."""
    engine, told = Engine(nothing), []
    engine.register_events(Mine.X)

    def late() -> None: ...

    def at_x(engine: Any, extra: int) -> None:
        engine.add_event_handler(Mine.X, late)

    def at_end(engine: Any, iter_counter: int) -> None: ...

    engine.add_event_handler(Mine.X, at_x, 3)
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, at_end)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.terminate_epoch())
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: engine.fire_event(Mine.X))
    stop = engine.time_handlers(lambda event, handler, began, ended: told.append((event, handler)))
    engine.run([1, 2, 3], max_epochs=1)
    assert [one for one in told if one[0] == Mine.X] == [
        (Mine.X, at_x),
        (Mine.X, late),
        (Mine.X, None),
    ]
    assert (Events.TERMINATE_SINGLE_EPOCH, at_end) in told
    assert sum(one == (Events.ITERATION_STARTED, None) for one in told) == 2
    stop()
    stop()
    before = len(told)
    engine.run([1, 2, 3], max_epochs=3)
    assert len(told) == before


def test_only_our_engine_is_attached_to() -> None:
    with pytest.raises(TypeError, match=r"crosstrain\.engine\.Engine"):
        BasicTimeProfiler().attach(ignite.engine.Engine(nothing))


def test_convert_tensor_goes_into_containers() -> None:
    batch = {"x": torch.ones(2), "rest": (torch.zeros(1), "text", b"bytes")}
    moved = convert_tensor(batch, device="meta")
    assert moved["x"].device.type == moved["rest"][0].device.type == "meta"
    assert moved["rest"][1:] == ("text", b"bytes")
    assert convert_tensor(batch)["x"] is batch["x"]
