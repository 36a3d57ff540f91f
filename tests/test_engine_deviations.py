"""Where ours differs from pytorch-ignite on purpose: each difference of docs/engine.md, shown.

The same scenario runs on both; the test says what ours does and, where it is worth knowing, that
pytorch-ignite does otherwise, so that a difference which is gone is noticed.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import ignite.engine
import pytest
from differential import IGNITE, OURS, Expected, Trace, Unsized, trace

from crosstrain.engine import CallableEventWithFilter, Engine, EventEnum, Events
from crosstrain.engine.progress import DataUsedUp, EmptyData


def nothing(engine: Any, batch: Any) -> None:
    """A step that does nothing."""


def names(engine: Engine, *watched: Events) -> list[str]:
    """Collects the names of events as they fire, all but EXCEPTION_RAISED unless told."""
    fired: list[str] = []
    for event in watched or [event for event in Events if event != Events.EXCEPTION_RAISED]:
        engine.add_event_handler(event, lambda *args, name=event.name, **kwargs: fired.append(name))
    return fired


# ---------------------------------------------------------------- data that is used up


def test_data_that_is_used_up_is_an_error() -> None:
    engine = Engine(nothing)
    with pytest.raises(DataUsedUp, match=r"list_iterator.*used up at iteration 3.*2 epochs of 3"):
        engine.run(iter([1, 2, 3]), max_epochs=2)
    assert engine.state.iteration == 3
    theirs = ignite.engine.Engine(nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert theirs.run(iter([1, 2, 3]), max_epochs=2).iteration == 3


def test_data_that_is_used_up_ends_the_run_even_if_a_handler_deals_with_it() -> None:
    # pytorch-ignite begins one epoch after another for ever: no iteration is made.
    engine = Engine(nothing)
    errors: list[BaseException] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, errors.append)
    fired = names(engine, Events.EPOCH_STARTED)
    engine.run(iter([1, 2, 3]), max_iters=10, epoch_length=5)
    assert [type(error) for error in errors] == [DataUsedUp]
    assert fired == ["EPOCH_STARTED"]


def test_new_data_at_the_end_of_the_old_prevents_that() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(
        Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(iter([4, 5, 6]))
    )
    assert engine.run(iter([1, 2, 3]), max_epochs=2, epoch_length=3).iteration == 6


@pytest.mark.parametrize("limits", [{}, {"max_epochs": 3}, {"max_iters": 3}])
def test_empty_data_is_an_error(limits: dict[str, int]) -> None:
    for data in (iter([]), Unsized(0), (number for number in range(0))):
        with pytest.raises(EmptyData, match=r"zero size.*gave no batch"):
            Engine(nothing).run(data, **limits)
    with pytest.raises(EmptyData, match="zero size: list of length 0"):
        Engine(nothing).run([], **limits)


# ---------------------------------------------------------------- exceptions


def fails_at(*iterations: int) -> Any:
    """Makes a step that fails the first time that each of these iterations is done."""
    left = set(iterations)

    def step(engine: Any, batch: Any) -> Any:
        if engine.state.iteration in left:
            left.remove(engine.state.iteration)
            raise Expected(f"iteration {engine.state.iteration}")
        return batch

    return step


def pass_on(error: BaseException, errors: list[BaseException]) -> None:
    """Keeps an exception and raises it again: a handler of EXCEPTION_RAISED."""
    errors.append(error)
    raise error


def test_exception_raised_fires_once() -> None:
    for library, times in ((OURS, 1), (IGNITE, 2)):
        engine = library.Engine(fails_at(2))
        errors: list[BaseException] = []

        engine.add_event_handler(library.Events.EXCEPTION_RAISED, pass_on, errors)
        with pytest.raises(Expected, match="iteration 2"):
            engine.run([1, 2, 3])
        assert len(errors) == times


def test_an_exception_has_its_own_traceback() -> None:
    def step(engine: Any, batch: Any) -> None:
        deep()

    def deep() -> None:
        raise Expected("deep")

    with pytest.raises(Expected) as caught:
        Engine(step).run([1])
    functions = [entry.name for entry in caught.traceback]
    assert functions[-2:] == ["step", "deep"]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_an_exception_propagates_when_its_handler_is_gone() -> None:
    # pytorch-ignite drops the exception without a word.
    theirs = ignite.engine.Engine(fails_at(2))
    theirs.add_event_handler(ignite.engine.Events.EXCEPTION_RAISED, print).remove()
    theirs.run([1, 2, 3])
    engine = Engine(fails_at(2))
    engine.add_event_handler(Events.EXCEPTION_RAISED, print).remove()
    with pytest.raises(Expected):
        engine.run([1, 2, 3])


def test_an_engine_that_raised_runs_again() -> None:
    theirs = ignite.engine.Engine(fails_at(2))
    engine = Engine(fails_at(2))
    for each in (theirs, engine):
        with pytest.raises(Expected):
            each.run([1, 2, 3], max_epochs=2)
    assert theirs.run([1, 2, 3], max_epochs=2) is None
    assert engine.run([1, 2, 3], max_epochs=2).iteration == 6


@pytest.mark.parametrize("error", [StopIteration, StopAsyncIteration, GeneratorExit])
@pytest.mark.parametrize("event", [None, Events.ITERATION_STARTED, Events.COMPLETED])
def test_a_stop_iteration_is_an_error(error: type[BaseException], event: Events | None) -> None:
    def fail(*args: Any) -> None:
        raise error("on purpose")

    engine = Engine(nothing if event else fail)
    if event is not None:
        engine.add_event_handler(event, fail)
    with pytest.raises(error, match="on purpose"):
        engine.run([1, 2, 3])
    assert engine.state.iteration == (3 if event is Events.COMPLETED else 1)


def test_a_stop_iteration_of_a_handler_of_an_epoch_is_an_error() -> None:
    def fail() -> None:
        raise StopIteration

    engine = Engine(nothing)
    engine.add_event_handler(Events.EPOCH_COMPLETED, fail)
    with pytest.raises(RuntimeError, match="StopIteration"):
        engine.run([1, 2, 3], max_epochs=2)
    assert engine.state.epoch == 1


def test_a_paused_run_that_is_thrown_away_raises_no_exception_event() -> None:
    for library, expected in ((OURS, []), (IGNITE, ["GeneratorExit"])):
        engine = library.Engine(nothing)
        raised: list[str] = []
        engine.add_event_handler(
            library.Events.EXCEPTION_RAISED,
            lambda error, raised: raised.append(type(error).__name__),
            raised,
        )
        engine.add_event_handler(library.Events.ITERATION_STARTED(once=2), engine.interrupt)
        engine.run([1, 2, 3])
        engine.state.max_epochs = None
        engine.run([1, 2, 3])
        assert raised == expected


# ---------------------------------------------------------------- events and handlers


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


def test_requests_are_booleans() -> None:
    engine = Engine(nothing)
    fired = names(engine, Events.TERMINATE, Events.COMPLETED)
    engine.add_event_handler(
        Events.ITERATION_STARTED, lambda: engine.terminate(skip_completed=True)
    )
    engine.run([1, 2, 3])
    assert engine.should_terminate is True
    assert engine.should_terminate_single_epoch is False
    assert engine.should_interrupt is False
    assert fired == ["TERMINATE"]


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
    engine = Engine(fails_at(1, 2, 3) if event is Events.EXCEPTION_RAISED else nothing)
    engine.register_events(event, event_to_attr={event: "epoch"})
    seen: list[int] = []
    engine.add_event_handler(
        event(every=2), lambda *args, **kwargs: seen.append(engine.state.epoch)
    )
    engine.add_event_handler(event, lambda *args, **kwargs: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, engine.terminate_epoch)
    engine.run([1, 2], max_epochs=4)
    assert seen == ([2] if event is Events.EXCEPTION_RAISED else [2, 4])


def test_an_exception_that_every_handler_lets_pass_propagates() -> None:
    engine = Engine(fails_at(1))
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


# ---------------------------------------------------------------- limits, lengths and states


@pytest.mark.parametrize("name", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", [3], float("inf")])
def test_a_limit_is_an_integer_of_at_least_one(name: str, value: Any) -> None:
    engine = Engine(nothing)
    with pytest.raises(ValueError, match=f"{name} is invalid: .*integer of at least 1") as caught:
        engine.run([1, 2], **{name: value})
    assert repr(value) in str(caught.value)
    assert engine.state.max_epochs is None
    assert engine.run([1, 2]).iteration == 2


def test_iterations_stay_the_limit_where_the_epoch_length_was_learned() -> None:
    engine = Engine(nothing)
    engine.run(Unsized(3), max_iters=7)
    state = engine.state
    assert (state.iteration, state.epoch, state.epoch_length) == (7, 3, 3)
    assert (state.max_epochs, state.max_iters) == (None, 7)
    assert engine.run(Unsized(3), max_iters=9).iteration == 9
    theirs = ignite.engine.Engine(nothing)
    theirs.run(Unsized(3), max_iters=7)
    assert theirs.state.max_epochs == 3
    with pytest.raises(ValueError, match="To switch"):
        theirs.run(Unsized(3), max_iters=9)


def test_the_length_of_an_epoch_is_learned_from_a_whole_pass() -> None:
    def length(library: Any) -> Any:
        engine = library.Engine(fails_at(2))
        engine.add_event_handler(library.Events.EXCEPTION_RAISED, lambda error: None)
        return engine.run(Unsized(5), max_epochs=2).epoch_length

    assert length(OURS) == 5
    assert length(IGNITE) == 3


def test_a_run_that_goes_on_learns_the_length_from_a_whole_pass() -> None:
    def length(library: Any) -> Any:
        engine = library.Engine(nothing)
        engine.add_event_handler(
            library.Events.ITERATION_COMPLETED(once=1), lambda: engine.terminate_epoch()
        )
        engine.run(Unsized(3), max_epochs=1)
        return engine.run(Unsized(3), max_epochs=2).epoch_length

    assert length(OURS) == 3
    assert length(IGNITE) == 4


STATE = {"iteration": 7, "max_epochs": 3, "epoch_length": 5}


def test_data_set_before_a_resumed_run_does_not_lengthen_its_epoch() -> None:
    for library, iterations in ((OURS, 15), (IGNITE, 17)):
        engine = library.Engine(nothing)
        engine.load_state_dict(STATE)
        engine.set_data(range(5))
        assert engine.run().iteration == iterations


def test_a_state_loaded_after_a_terminated_run_is_gone_on_with_in_the_middle() -> None:
    for library, iterations in ((OURS, 15), (IGNITE, 17)):
        engine = library.Engine(nothing)
        handle = engine.add_event_handler(
            library.Events.ITERATION_COMPLETED(once=3), engine.terminate
        )
        engine.run(range(5), max_epochs=3)
        handle.remove()
        engine.load_state_dict(STATE)
        assert engine.run(range(5)).iteration == iterations


def test_a_state_loaded_into_a_paused_engine_replaces_the_pause() -> None:
    engine = Engine(nothing)
    fired = names(engine)
    handle = engine.add_event_handler(Events.ITERATION_STARTED(once=2), engine.interrupt)
    engine.run(range(5), max_epochs=3)
    handle.remove()
    engine.load_state_dict(STATE)
    del fired[:]
    assert engine.run(range(5)).iteration == 15
    assert fired[:2] == ["STARTED", "EPOCH_STARTED"]
    assert fired.count("ITERATION_COMPLETED") == 15 - 7


def test_a_loaded_state_with_nothing_left_to_do_is_not_run_anew() -> None:
    engine = Engine(nothing)
    engine.load_state_dict({**STATE, "iteration": 15})
    fired = names(engine)
    assert engine.run(range(5)).iteration == 15
    assert fired == ["STARTED", "COMPLETED"]
    # The run after that is a new one.
    assert engine.run(range(5)).iteration == 5


def test_a_state_that_does_not_load_changes_nothing() -> None:
    engine = Engine(nothing)
    engine.state_dict_user_keys.append("alpha")
    engine.state.alpha = 1  # type: ignore[attr-defined]
    engine.run(range(4), max_epochs=2)
    before = dict(vars(engine.state))
    for wrong in (
        {**STATE, "iteration": 12, "max_epochs": 1, "alpha": 2},
        {**STATE, "epoch_length": 0, "alpha": 2},
        {**STATE, "iteration": -1, "alpha": 2},
        STATE,
    ):
        with pytest.raises(ValueError):
            engine.load_state_dict(wrong)
        assert vars(engine.state) == before


def test_the_last_event_is_exact_wherever_a_handler_or_the_step_sees_it() -> None:
    seen: list[str] = []

    class Data:
        def __iter__(self) -> Iterator[int]:
            for number in range(2):
                seen.append(engine.last_event_name.name)
                yield number

    def step(engine: Engine, batch: int) -> None:
        seen.append(engine.last_event_name.name)

    engine = Engine(step)
    engine.run(Data())
    # In the data it may be an earlier one: an event that nobody listens to is passed by.
    assert seen == ["EPOCH_STARTED", "ITERATION_STARTED"] + ["ITERATION_STARTED"] * 2
    del seen[:]
    engine.add_event_handler(Events.GET_BATCH_STARTED, lambda: None)
    engine.run(Data())
    assert seen == ["GET_BATCH_STARTED", "ITERATION_STARTED"] * 2


def test_the_harness_sees_a_difference() -> None:
    def scenario(t: Trace) -> None:
        t.run(t.engine(), iter([1, 2]), max_iters=4)

    assert trace(OURS, scenario) != trace(IGNITE, scenario)
    gc.collect()
