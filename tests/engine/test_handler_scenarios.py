"""Scenarios of events and handlers: each leaves the same trace on ours and on pytorch-ignite."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from differential import EVENTS, Scenario, Trace, same

SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Adds a scenario to the table."""
    SCENARIOS.append(function)
    return function


# ---------------------------------------------------------------- filters and combinations


@scenario
def filters(t: Trace) -> None:
    engine = t.engine()
    events = t.lib.Events
    counted = [event for event in events if event.name.split("_")[0] in _COUNTED]
    options: list[dict[str, Any]] = [
        {"every": 1},
        {"every": 3},
        {"once": 4},
        {"once": [2, 5]},
        {"once": (1,)},
        {"before": 3},
        {"after": 2},
        {"before": 7, "after": 2},
        {"every": 2, "after": 1},
        {"every": 3, "before": 8},
        {"every": 2, "before": 7, "after": 3},
        {"every": 1, "before": 0},
        {"after": 0},
        {"every": np.int64(2)},
        {"event_filter": lambda engine, count: count in (1, 4)},
        {"event_filter": lambda engine, event: engine.state.epoch == event},
        {"event_filter": lambda *args: args[1]},
    ]
    for event in counted:
        for number, option in enumerate(options):
            engine.add_event_handler(
                event(**option), lambda name, number: t.note(name, number), event.name, number
            )
    t.run(engine, [1, 2, 3], max_epochs=4)


_COUNTED = {"STARTED", "COMPLETED", "EPOCH", "ITERATION", "GET"}


@scenario
def what_a_filter_is(t: Trace) -> None:
    events = t.lib.Events
    for filtered in (
        events.EPOCH_STARTED,
        events.EPOCH_STARTED(every=1),
        events.EPOCH_STARTED(every=2),
        events.EPOCH_STARTED(once=2),
    ):
        t.note(filtered.name, filtered.value, filtered == events.EPOCH_STARTED, hash(filtered))
        t.note(filtered.filter is None or [filtered.filter(None, count) for count in range(5)])
        t.note(filtered == "EPOCH_STARTED", filtered in list(events), filtered == 3)


@scenario
def filters_that_are_refused(t: Trace) -> None:
    event = t.lib.Events.ITERATION_STARTED
    for options in (
        {},
        {"every": 0},
        {"every": -1},
        {"every": 1.5},
        {"every": "2"},
        {"once": 0},
        {"once": []},
        {"once": [1, 0]},
        {"once": [1, "2"]},
        {"once": 1.5},
        {"before": -1},
        {"after": -1},
        {"before": 2.5},
        {"after": "x"},
        {"every": 2, "once": 3},
        {"once": 2, "before": 3},
        {"event_filter": lambda engine, event: True, "every": 2},
        {"event_filter": lambda engine, event: True, "after": 2},
        {"event_filter": 3},
        {"event_filter": lambda: True},
        {"event_filter": lambda engine: True},
        {"event_filter": lambda engine, event, more: True},
    ):
        t.attempt(lambda options=options: event(**options).name)


@scenario
def a_count_that_a_handler_changes(t: Trace) -> None:
    class Own(t.lib.EventEnum):  # type: ignore[name-defined, misc]
        TICK = "tick"

    engine = t.engine(lambda engine, batch: engine.fire_event(Own.TICK))
    engine.register_events(*Own, event_to_attr={Own.TICK: "ticks"})

    def count(engine: Any) -> None:
        engine.state.ticks += 1

    engine.add_event_handler(Own.TICK(every=2), lambda: t.note("before the count"))
    engine.add_event_handler(Own.TICK, count)
    engine.add_event_handler(Own.TICK(every=2), lambda: t.note("after the count"))
    engine.add_event_handler(Own.TICK(once=3), lambda: t.note("third"))
    engine.add_event_handler(Own.TICK, lambda engine: setattr(engine.state, "ticks", -2))
    engine.add_event_handler(Own.TICK(every=2), lambda: t.note("below zero"))
    t.run(engine, [1, 2, 3], max_epochs=2)


@scenario
def events_joined(t: Trace) -> None:
    events = t.lib.Events
    engine = t.engine()
    joined = events.STARTED | events.EPOCH_COMPLETED(every=2) | events.ITERATION_STARTED(once=3)
    joined |= events.COMPLETED
    t.note(len(joined), [event.name for event in joined], joined[1].name)

    @engine.on(joined, "extra", key=1)
    def record(engine: Any, extra: str, key: int) -> None:
        t.note("joined", engine.last_event_name.name, extra, key)

    t.run(engine, [1, 2], max_epochs=3)
    t.note(engine.has_event_handler(record), engine.has_event_handler(record, events.STARTED))
    for other in ("STARTED", 3, None):
        t.attempt(lambda other=other: events.STARTED | other)
    handle = engine.add_event_handler(joined, lambda: t.note("to be removed"))
    handle.remove()
    t.run(engine, [1, 2], max_epochs=4)


# ---------------------------------------------------------------- custom events


@scenario
def custom_events(t: Trace) -> None:
    class Own(t.lib.EventEnum):  # type: ignore[name-defined, misc]
        FOO = "foo"
        BAR = "bar"
        LOOSE = "loose"

    def step(engine: Any, batch: int) -> int:
        engine.state.foo_count += 1
        engine.fire_event(Own.FOO)
        engine.fire_event("plain")
        t.note("inside", engine.last_event_name)
        if batch == 2:
            engine.state.bar_count += 2
            engine.fire_event(Own.BAR)
        return batch

    engine = t.engine(step)
    t.note([engine.has_registered_events(event) for event in (*Own, "plain", "STARTED")])
    t.attempt(engine.add_event_handler, Own.FOO, print)
    t.attempt(engine.fire_event, Own.FOO)
    t.attempt(engine.fire_event, "plain")
    engine.register_events(*Own, event_to_attr={Own.FOO: "foo_count", Own.BAR: "bar_count"})
    engine.register_events("plain", "other")
    t.note([engine.has_registered_events(event) for event in (*Own, "plain", "STARTED", "no")])
    t.note(engine.state.foo_count, engine.state.bar_count)
    for event in (Own.FOO, Own.BAR, Own.LOOSE, "plain"):
        engine.add_event_handler(event, lambda event: t.note("custom", str(event)), str(event))
    engine.add_event_handler(Own.FOO(every=2), lambda: t.note("every second"))
    engine.add_event_handler(Own.BAR(once=4) | Own.FOO(after=4), lambda: t.note("joined"))
    t.run(engine, [1, 2, 3], max_epochs=2)
    t.note(engine.state.foo_count, engine.state.bar_count)
    t.attempt(engine.register_events, 3)
    t.attempt(engine.register_events, "fine", None)
    t.attempt(engine.register_events, "fine", event_to_attr=["fine"])


@scenario
def built_in_events_fired_by_hand(t: Trace) -> None:
    engine = t.engine()
    engine.add_event_handler(t.lib.Events.EPOCH_STARTED(every=2), lambda: t.note("every"))
    engine.fire_event(t.lib.Events.EPOCH_STARTED)
    engine.fire_event("EPOCH_STARTED")
    t.attempt(engine.fire_event, t.lib.Events.EXCEPTION_RAISED)
    t.run(engine, [1], max_epochs=2)


# ---------------------------------------------------------------- handlers


class Caller:
    """An object that is called, and has a method to be called."""

    def __init__(self, t: Trace) -> None:
        self.t = t

    def __call__(self, engine: Any) -> None:
        self.t.note("called", engine.state.iteration)

    def method(self, engine: Any, *args: int) -> None:
        self.t.note("method", args)

    def bare(self) -> None:
        self.t.note("bare")


@scenario
def arguments_of_handlers(t: Trace) -> None:
    engine = t.engine()
    event = t.lib.Events.ITERATION_COMPLETED
    caller = Caller(t)
    other = t.engine()
    engine.add_event_handler(event, lambda: t.note("none"))
    engine.add_event_handler(event, lambda e: t.note("engine", e is engine))
    engine.add_event_handler(event, lambda e, a: t.note("engine, a", e is engine, a), 1)
    engine.add_event_handler(event, lambda a, b: t.note("a, b", a is engine, b), 1)
    engine.add_event_handler(event, lambda *, key: t.note("key", key), key=2)
    engine.add_event_handler(event, lambda e, *, key=5: t.note("default", e is engine, key))
    engine.add_event_handler(event, lambda *args: t.note("args", len(args)), 1, 2)
    engine.add_event_handler(event, lambda **kwargs: t.note("kwargs", sorted(kwargs)), x=1)
    engine.add_event_handler(event, functools.partial(lambda a, e: t.note("partial", a), 7))
    engine.add_event_handler(event, caller)
    engine.add_event_handler(event, caller.method, 3)
    engine.add_event_handler(event, caller.bare)
    engine.add_event_handler(event, lambda e: t.note("other", e is other), other)
    for wrong in (lambda a, b: None, lambda *, key: None, lambda a=1, *, b: None):
        t.attempt(engine.add_event_handler, event, wrong)
    t.attempt(engine.add_event_handler, event, lambda: None, 1)
    t.attempt(engine.add_event_handler, event, lambda e: None, key=1)
    t.attempt(engine.add_event_handler, event, 3)
    t.attempt(engine.add_event_handler, event, None)
    t.attempt(engine.add_event_handler, "unknown", print)
    t.attempt(engine.add_event_handler, None, print)
    for wrong in (None, lambda: None, lambda engine: None, lambda a, b, c: None, 3):
        t.attempt(t.lib.Engine, wrong)
    t.run(engine, [1, 2])


@scenario
def arguments_of_events(t: Trace) -> None:
    engine = t.engine()
    events = t.lib.Events
    ended, raised = events.TERMINATE_SINGLE_EPOCH, events.EXCEPTION_RAISED
    engine.add_event_handler(ended, lambda e, iter_counter: t.note("ended", iter_counter))
    engine.add_event_handler(ended, lambda iter_counter: t.note("alone", iter_counter))
    engine.add_event_handler(ended, lambda e, k, iter_counter: t.note(k, iter_counter), "k")
    engine.add_event_handler(raised, lambda e, error: t.note("raised", str(error)))
    engine.add_event_handler(raised, lambda error: t.note("alone", str(error)))
    engine.add_event_handler(raised, lambda e, error, k: t.note("and", str(error), k), "k")
    engine.add_event_handler(raised, lambda error, *, key: t.note(str(error), key), key=3)
    engine.add_event_handler(events.ITERATION_COMPLETED(once=2), lambda: engine.terminate_epoch())

    def fail() -> None:
        raise ValueError("on purpose")

    engine.add_event_handler(events.ITERATION_COMPLETED(once=4), fail)
    for wrong in (lambda: None, lambda a, b, c: None):
        t.attempt(engine.add_event_handler, ended, wrong)
        t.attempt(engine.add_event_handler, raised, wrong)
    t.run(engine, [1, 2, 3], max_epochs=3)


@scenario
def handlers_that_are_removed(t: Trace) -> None:
    engine = t.engine()
    events = t.lib.Events

    def handler(engine: Any) -> None:
        t.note("handler")

    def other() -> None:
        t.note("other")

    event = events.EPOCH_COMPLETED
    t.attempt(engine.remove_event_handler, handler, event)
    handle = engine.add_event_handler(event, handler)
    engine.add_event_handler(event, other)
    t.attempt(engine.remove_event_handler, print, event)
    t.note(engine.has_event_handler(handler, event), engine.has_event_handler(handler))
    t.note(engine.has_event_handler(handler, events.STARTED), engine.has_event_handler(print))
    t.run(engine, [1])
    handle.remove()
    handle.remove()
    t.note(engine.has_event_handler(handler, event), engine.has_event_handler(other, event))
    t.run(engine, [1])
    with engine.add_event_handler(event, handler) as entered:
        t.note(type(entered).__name__)
        t.run(engine, [1])
    t.run(engine, [1])
    for filtered in (event(every=2), events.STARTED | event(once=1)):
        with engine.add_event_handler(filtered, handler):
            t.note(engine.has_event_handler(handler, event))
            t.run(engine, [1])
        t.note(engine.has_event_handler(handler))
    engine.add_event_handler(event, handler)
    engine.add_event_handler(event, handler)
    t.run(engine, [1])
    engine.remove_event_handler(handler, event(every=3))
    t.run(engine, [1])
    t.attempt(engine.remove_event_handler, handler, "unknown")


@scenario
def handlers_that_change_while_their_event_fires(t: Trace) -> None:
    engine = t.engine()
    event = t.lib.Events.ITERATION_STARTED

    def first(engine: Any) -> None:
        t.note("first")
        if engine.has_event_handler(second, event) and engine.state.iteration == 2:
            engine.remove_event_handler(second, event)
            engine.remove_event_handler(first, event)
        if engine.state.iteration == 1:
            engine.add_event_handler(event, third)

    def second() -> None:
        t.note("second")

    def third(engine: Any) -> None:
        t.note("third")
        if engine.state.iteration < 3:
            engine.add_event_handler(event, lambda: t.note("one more"))

    engine.add_event_handler(event, first)
    engine.add_event_handler(event, second)
    t.run(engine, [1, 2, 3], max_epochs=2)


@scenario
def one_engine_inside_another(t: Trace) -> None:
    trainer, evaluator = t.engine(), t.engine()
    events = t.lib.Events
    evaluator.add_event_handler(events.ITERATION_COMPLETED(once=2), lambda: evaluator.terminate())

    @trainer.on(events.EPOCH_COMPLETED | events.ITERATION_COMPLETED(once=2))
    def evaluate() -> None:
        t.note("evaluation begins")
        t.run(evaluator, [7, 8, 9])
        evaluator.state.max_epochs = None
        t.note("evaluation ends")

    @evaluator.on(events.COMPLETED(every=1))
    def stop_the_trainer() -> None:
        if trainer.state.epoch == 2:
            trainer.terminate_epoch()
        if trainer.state.epoch == 3:
            trainer.interrupt()

    t.run(trainer, [1, 2, 3], max_epochs=4)
    t.run(trainer, [1, 2, 3], max_epochs=5)
    t.run(trainer, [1, 2, 3], max_epochs=5)


@pytest.mark.parametrize("watch", [EVENTS, ()], ids=("watched", "unwatched"))
@pytest.mark.parametrize("function", SCENARIOS, ids=lambda function: function.__name__)
def test_same(function: Scenario, watch: tuple[str, ...]) -> None:
    same(function, watch)
