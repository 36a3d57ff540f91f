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
from differential import IGNITE, OURS, Expected, Trace, Unsized, names, nothing, trace
from ignite.handlers import TimeLimit

from crosstrain.engine import DataUsedUp, EmptyData, Engine, Events

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
    theirs = ignite.engine.Engine(nothing)
    theirs.add_event_handler(ignite.engine.Events.EPOCH_STARTED(once=99), theirs.terminate)
    with pytest.warns(UserWarning, match="can not provide data anymore"):
        theirs.run(iter([1, 2, 3]), max_iters=10, epoch_length=5)
    assert (theirs.state.epoch, theirs.state.iteration) == (99, 3)


def test_new_data_at_the_end_of_the_old_prevents_that() -> None:
    engine = Engine(nothing)
    engine.add_event_handler(
        Events.DATALOADER_STOP_ITERATION, lambda: engine.set_data(iter([4, 5, 6]))
    )
    assert engine.run(iter([1, 2, 3]), max_epochs=2, epoch_length=3).iteration == 6


@pytest.mark.parametrize("limits", [{}, {"max_epochs": 3}, {"max_iters": 3}])
def test_empty_data_is_an_error(limits: dict[str, int]) -> None:
    for data in (iter([]), Unsized(0), (number for number in range(0))):
        with pytest.raises(EmptyData, match=r"zero size\..*gave no batch"):
            Engine(nothing).run(data, **limits)
    with pytest.raises(EmptyData, match=r"zero size\..*list has the length 0"):
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


def test_a_stop_iteration_is_not_taken_for_the_end_of_the_data() -> None:
    def fail(left: list[int]) -> None:
        if left.pop() == 2:
            raise StopIteration

    for library in (OURS, IGNITE):
        engine = library.Engine(nothing)
        engine.add_event_handler(library.Events.GET_BATCH_COMPLETED, fail, [9, 8, 7, 6, 2, 1])
        if library is OURS:
            with pytest.raises(StopIteration):
                engine.run([1, 2, 3])
            assert engine.state.iteration == 1
        else:
            assert engine.run([1, 2, 3]).iteration == 3


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


def test_an_epoch_that_begins_after_a_run_has_ended_is_whole() -> None:
    def iterations(library: Any) -> int:
        engine = library.Engine(nothing)
        handle = engine.add_event_handler(
            library.Events.ITERATION_COMPLETED, lambda: engine.terminate_epoch()
        )
        engine.run(range(5), max_epochs=2)
        handle.remove()
        return engine.run(range(5), max_epochs=3).iteration - 2

    assert iterations(OURS) == 5
    assert iterations(IGNITE) == 3


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


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("iteration", [3, 4, 10])
def test_a_run_that_was_ended_on_purpose_trains_nothing_from_its_state(
    iteration: int, quiet: bool
) -> None:
    engine = Engine(nothing)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=iteration), lambda: engine.terminate(quiet)
    )
    engine.run(range(5), max_epochs=3)
    again = Engine(nothing)
    again.restartable = True
    again.load_state_dict(engine.state_dict())
    assert again.should_terminate
    fired = names(again)
    again.run(range(5))
    assert fired == ["STARTED", "TERMINATE"] + ["COMPLETED"] * (not quiet)
    assert again.state.iteration == iteration
    assert again.state_dict()["terminated"] == engine.state_dict()["terminated"]
    # It is another decision to train on.
    for restartable in (True, False):
        again = Engine(nothing)
        again.restartable = restartable
        again.load_state_dict(engine.state_dict())
        if restartable:
            again.should_terminate = False
        assert again.run(range(5)).iteration == 15
        assert "terminated" not in again.state_dict()


@pytest.mark.parametrize("how", ["goes_on", "time limit"])
def test_a_run_that_a_time_limit_has_ended_goes_on_from_its_state(how: str) -> None:
    engine = Engine(nothing)
    if how == "goes_on":
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=7), lambda: engine.terminate(goes_on=True)
        )
    else:
        limit = TimeLimit(1)
        limit.start_time -= 10
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=7), limit)
    engine.run(range(5), max_epochs=3)
    assert engine.state.iteration == 7
    again = Engine(nothing)
    again.restartable = True
    again.load_state_dict(engine.state_dict())
    assert again.run(range(5)).iteration == 15


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
