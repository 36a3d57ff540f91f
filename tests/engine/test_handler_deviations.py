"""Where ours differs from pytorch-ignite on purpose: events and handlers."""

from __future__ import annotations

from typing import Any

import pytest
from differential import IGNITE, OURS, Expected, names, nothing

from crosstrain.engine import CallableEventWithFilter, Engine, EventEnum, Events


def always_fails(engine: Any, batch: Any) -> None:
    """A step that fails."""
    raise Expected


class Own(EventEnum):
    TICK = "tick"


def test_what_counts_an_event_is_the_engines_own() -> None:
    engine, other = Engine(nothing), Engine(nothing)
    engine.register_events(*Own, event_to_attr={Own.TICK: "ticks"})
    assert engine.state.ticks == 0  # type: ignore[attr-defined]
    assert not hasattr(other.state, "ticks")
    assert not hasattr(Engine(nothing).state, "ticks")
    other.register_events(*Own)
    with pytest.raises(RuntimeError, match="no attribute of the state counts it"):
        other.add_event_handler(Own.TICK(every=2), print)


def test_the_table_of_counters_of_all_engines_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        OURS.State.event_to_attr[Own.TICK] = "ticks"  # type: ignore[index]


@pytest.mark.parametrize("library", [OURS, IGNITE])
@pytest.mark.parametrize("skip", [False, True])
def test_requests_tell_what_was_asked_for(library: Any, skip: bool) -> None:
    engine = library.Engine(nothing)
    fired = names(engine, library.Events.TERMINATE, library.Events.COMPLETED)
    seen: list[Any] = []
    completed = library.Events.ITERATION_COMPLETED

    def end_epoch() -> None:
        engine.terminate_epoch(skip_epoch_completed=skip)
        seen.append(engine.should_terminate_single_epoch)

    engine.add_event_handler(completed(once=1), end_epoch)
    engine.add_event_handler(completed(once=4), lambda: engine.terminate(skip_completed=skip))
    engine.run([1, 2, 3], max_epochs=3)
    assert seen == ["skip_epoch_completed" if skip else True]
    assert engine.should_terminate == ("skip_completed" if skip else True)
    assert engine.should_terminate_single_epoch is False
    assert engine.should_interrupt is False
    assert fired == ["TERMINATE"] + ["COMPLETED"] * (not skip)


@pytest.mark.parametrize(("value", "last"), [(True, "COMPLETED"), ("skip_completed", "TERMINATE")])
def test_a_request_can_be_made_by_assignment_and_taken_back(value: Any, last: str) -> None:
    for library in (OURS, IGNITE):
        engine: Any = library.Engine(nothing)
        fired = names(engine, library.Events.TERMINATE, library.Events.COMPLETED)

        completed = library.Events.ITERATION_COMPLETED

        def at(
            iteration: int, name: str, value: Any, engine: Any = engine, completed: Any = completed
        ) -> None:
            event = completed(once=iteration)
            engine.add_event_handler(event, lambda: setattr(engine, name, value))

        at(1, "should_terminate", True)
        at(1, "should_terminate", False)
        at(3, "should_terminate_single_epoch", True)
        at(4, "should_terminate", value)
        engine.run([1, 2, 3, 4], max_epochs=3)
        assert (engine.state.epoch, engine.state.iteration, fired[-1]) == (2, 4, last)


def test_a_method_of_the_engine_as_a_handler_is_not_given_the_engine_again() -> None:
    # On pytorch-ignite the engine becomes `skip_completed`, and COMPLETED does not fire.
    for library, expected in ((OURS, [2, 2]), (IGNITE, [2])):
        engine = library.Engine(nothing)
        seen: list[int] = []
        engine.add_event_handler(library.Events.ITERATION_COMPLETED(once=2), engine.terminate)
        for event in (library.Events.TERMINATE, library.Events.COMPLETED):
            engine.add_event_handler(
                event, lambda engine, seen: seen.append(engine.state.iteration), seen
            )
        engine.run([1, 2, 3])
        assert seen == expected


def test_a_method_of_a_subclass_that_takes_an_engine_is_given_it() -> None:
    class Counting(Engine):
        def note(self, engine: Engine) -> None:
            seen.append(engine)

    seen: list[Engine] = []
    engine = Counting(nothing)
    engine.add_event_handler(Events.COMPLETED, engine.note)
    engine.run([1])
    assert seen == [engine]


def test_the_next_batch_is_asked_for_once() -> None:
    def fetches(library: Any) -> tuple[int, int]:
        engine = library.Engine(nothing)
        engine.register_events("mine")
        asked: list[str] = []
        events = library.Events
        engine.add_event_handler(events.GET_BATCH_STARTED, lambda: asked.append("asked"))
        engine.add_event_handler(events.GET_BATCH_COMPLETED, lambda: asked.append("got"))
        engine.add_event_handler(
            events.DATALOADER_STOP_ITERATION, lambda: engine.fire_event("mine")
        )
        engine.run([1, 2], max_epochs=3)
        return asked.count("asked"), asked.count("got")

    assert fetches(OURS) == (6, 6)
    assert fetches(IGNITE) == (8, 6)


def test_a_pause_where_the_data_has_run_out() -> None:
    engine = Engine(nothing)
    fired = names(engine)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, engine.interrupt)
    engine.run([1, 2], max_epochs=2)
    assert fired[-2:] == ["DATALOADER_STOP_ITERATION", "INTERRUPT"]
    del fired[:]
    engine.run()
    assert fired[:2] == ["GET_BATCH_COMPLETED", "ITERATION_STARTED"]
    assert engine.state.iteration == 4


def test_a_request_in_a_pause_where_the_data_has_run_out() -> None:
    engine = Engine(nothing)
    fired = names(engine)
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, engine.interrupt)
    engine.run([1, 2], max_epochs=2)
    engine.interrupt()
    engine.run()
    engine.terminate()
    del fired[:]
    engine.run()
    assert fired == ["TERMINATE", "COMPLETED"]


def test_joining_events_leaves_them_as_they_were() -> None:
    first = Events.STARTED | Events.COMPLETED
    second = first | Events.EPOCH_STARTED
    both = first | second
    assert [len(first), len(second), len(both)] == [2, 3, 5]


def test_a_filter_where_nothing_counts_is_refused_when_it_is_attached() -> None:
    engine = Engine(nothing)
    for event in (Events.TERMINATE, Events.EXCEPTION_RAISED, Events.INTERRUPT):
        with pytest.raises(RuntimeError, match=f"{event.name}.*no attribute of the state counts"):
            engine.add_event_handler(event(every=2), nothing)


@pytest.mark.parametrize(
    "event", [Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH], ids=lambda e: e.name
)
def test_filters_work_on_every_event_that_is_counted(event: Events) -> None:
    engine = Engine(always_fails if event is Events.EXCEPTION_RAISED else nothing)
    engine.register_events(event, event_to_attr={event: "epoch"})
    seen: list[int] = []
    engine.add_event_handler(
        event(every=2), lambda *args, **kwargs: seen.append(engine.state.epoch)
    )
    engine.add_event_handler(event, lambda *args, **kwargs: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, engine.terminate_epoch)
    engine.run([1, 2], max_epochs=4)
    assert seen == [2, 4]


def test_an_exception_that_every_handler_lets_pass_propagates() -> None:
    engine = Engine(always_fails)
    engine.register_events(
        Events.EXCEPTION_RAISED, event_to_attr={Events.EXCEPTION_RAISED: "epoch"}
    )
    engine.add_event_handler(Events.EXCEPTION_RAISED(every=2), print)
    with pytest.raises(Expected):
        engine.run([1, 2])


def test_handlers_of_an_ended_epoch_are_checked_as_they_will_be_called() -> None:
    engine = Engine(nothing)
    for wrong in (lambda engine: None, lambda engine, count: None, lambda count: None):
        with pytest.raises(ValueError, match="'iter_counter'"):
            engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, wrong)
    seen: list[Any] = []
    engine.add_event_handler(
        Events.TERMINATE_SINGLE_EPOCH, lambda engine, **kwargs: seen.append(kwargs)
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.terminate_epoch)
    engine.run([1, 2, 3])
    assert seen == [{"iter_counter": 2}]


def test_a_handler_is_attached_to_all_of_several_events_or_to_none() -> None:
    engine = Engine(nothing)

    def handler(engine: Engine) -> None:
        raise AssertionError

    with pytest.raises(ValueError, match="iter_counter"):
        engine.add_event_handler(Events.STARTED | Events.TERMINATE_SINGLE_EPOCH, handler)
    assert not engine.has_event_handler(handler)


def test_an_event_is_known_by_name_and_value() -> None:
    class Other(EventEnum):
        STARTED = "something_else"

    engine = Engine(nothing)
    with pytest.raises(ValueError, match="registered already, with value 'started'"):
        engine.register_events(Other.STARTED)
    assert not engine.has_registered_events(Other.STARTED)
    assert engine.has_registered_events(CallableEventWithFilter("started", None, "STARTED"))


def test_a_handle_of_a_bound_method_removes_it() -> None:
    class Holder:
        def method(self) -> None:
            calls.append(1)

    calls: list[int] = []
    holder = Holder()
    engine = Engine(nothing)
    for event in (Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=1, after=0)):
        with engine.add_event_handler(event, holder.method):
            engine.run([1, 2])
        engine.run([1, 2])
    assert len(calls) == 4
