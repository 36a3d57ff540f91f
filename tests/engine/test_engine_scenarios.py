"""Scenarios of runs and states: each leaves the same trace on ours and on pytorch-ignite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from differential import EVENTS, Scenario, Trace, Unsized, endless, same
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

SCENARIOS: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Adds a scenario to the table."""
    SCENARIOS.append(function)
    return function


# ---------------------------------------------------------------- data and limits


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield from range(4)


@scenario
def every_kind_of_data(t: Trace) -> None:
    kinds: list[Callable[[], Any]] = [
        lambda: [1, 2, 3],
        lambda: (1, 2, 3),
        lambda: range(3),
        lambda: "abc",
        lambda: {"a": 1, "b": 2},
        lambda: np.arange(3).tolist(),
        lambda: torch.arange(3),
        lambda: DataLoader(TensorDataset(torch.arange(4)), batch_size=None),
        lambda: DataLoader(Stream(), batch_size=2),
        lambda: Unsized(3),
        lambda: (number for number in range(3)),
        lambda: iter([1, 2, 3]),
        lambda: map(str, range(3)),
    ]
    for make in kinds:
        engine = t.engine(lambda engine, batch: None)
        t.run(engine, make())
        t.note(engine.state_dict())


@scenario
def limits_and_lengths(t: Trace) -> None:
    for limits in (
        {},
        {"max_epochs": 3},
        {"max_iters": 1},
        {"max_iters": 3},
        {"max_iters": 6},
        {"max_iters": 8},
        {"max_epochs": 2, "epoch_length": 1},
        {"max_epochs": 2, "epoch_length": 7},
        {"max_iters": 9, "epoch_length": 4},
        {"max_iters": 2, "epoch_length": 4},
        {"max_epochs": np.int64(2), "epoch_length": np.int64(2)},
    ):
        engine = t.engine()
        t.run(engine, [1, 2, 3], **limits)
        t.run(engine, [4, 5, 6])


@scenario
def an_iterator_that_is_long_enough(t: Trace) -> None:
    engine = t.engine()
    t.run(engine, iter(range(100)), max_epochs=3, epoch_length=4)
    engine = t.engine()
    numbers = iter(range(12))
    t.run(engine, numbers, max_epochs=3, epoch_length=4)
    t.note(list(numbers))
    engine = t.engine()
    t.run(engine, endless(), max_iters=10, epoch_length=4)


@scenario
def no_data(t: Trace) -> None:
    engine = t.engine()
    t.run(engine)
    t.run(engine, epoch_length=3, max_epochs=2)
    t.run(engine, max_epochs=1)
    t.run(engine, max_epochs=4)
    engine.state.max_epochs = None
    t.run(engine)


@scenario
def bad_data_and_limits(t: Trace) -> None:
    engine = t.engine()
    for data in (3, 2.5, object(), len):
        t.run(engine, data)
    t.run(engine, [])
    t.run(engine, [1], max_epochs=1, max_iters=1)
    t.run(engine, [1], epoch_length=0)
    t.run(engine, [1, 2], max_epochs=3)
    for limits in (
        {"max_epochs": 2},
        {"max_epochs": -1},
        {"max_iters": 2},
        {"max_epochs": 4, "epoch_length": 3},
        {"max_epochs": 4, "max_iters": 3},
        {"max_epochs": 3},
    ):
        t.run(engine, [1, 2], **limits)
    engine = t.engine()
    t.run(engine, [1, 2], max_iters=3)
    for limits in ({"max_iters": 2}, {"max_epochs": 2}, {"max_iters": 5}):
        t.run(engine, [1, 2], **limits)


@scenario
def runs_one_after_the_other(t: Trace) -> None:
    engine = t.engine()
    t.run(engine, [1, 2], max_epochs=2)
    t.run(engine, [1, 2], max_epochs=4)
    t.run(engine, [3, 4, 5], max_epochs=4)
    engine.state.max_epochs = None
    t.run(engine, [6], max_iters=4)
    t.run(engine, [7, 8], max_iters=6)
    engine.state.max_iters = None
    t.run(engine, [9], max_epochs=1)


@scenario
def new_data_before_and_after_a_run(t: Trace) -> None:
    engine = t.engine()
    engine.set_data([7, 8, 9])
    t.run(engine, [1, 2], max_epochs=2)
    engine.set_data(iter(range(50)))
    t.run(engine, epoch_length=4, max_epochs=3)
    t.run(engine, epoch_length=2, max_epochs=5)
    t.attempt(engine.set_data, None)
    t.attempt(engine.set_data, 3)


# ---------------------------------------------------------------- state


@scenario
def states_that_load(t: Trace) -> None:
    for state in (
        {"epoch": 1, "max_epochs": 3, "epoch_length": 4},
        {"epoch": 0, "max_epochs": 2, "epoch_length": 4},
        {"iteration": 0, "max_epochs": 2, "epoch_length": None},
        {"iteration": 5, "max_epochs": 3, "epoch_length": 4},
        {"iteration": 5, "max_iters": 7, "epoch_length": 4},
        {"iteration": 8, "max_iters": 15, "epoch_length": 4},
        {"iteration": 5, "max_epochs": None, "epoch_length": 4},
        {"epoch": 2, "max_iters": None, "epoch_length": 4},
    ):
        engine = t.engine()
        t.attempt(engine.load_state_dict, state)
        t.note(engine.state_dict())
        t.run(engine, range(4))
        engine = t.engine()
        t.attempt(engine.load_state_dict, state)
        t.run(engine, range(4), max_epochs=5)


@scenario
def states_that_do_not_load(t: Trace) -> None:
    for state in (
        {},
        None,
        [("epoch", 1)],
        {"epoch": 1, "iteration": 4, "max_epochs": 3, "epoch_length": 4},
        {"max_epochs": 3, "epoch_length": 4},
        {"epoch": 1, "epoch_length": 4},
        {"epoch": 1, "max_epochs": 3},
        {"epoch": 1, "max_epochs": 3, "max_iters": 3, "epoch_length": 4},
        {"epoch": 1, "max_epochs": 3, "epoch_length": None},
        {"iteration": 5, "max_epochs": 3, "epoch_length": None},
        {"iteration": 5, "max_epochs": 3, "epoch_length": 0},
        {"epoch": 5, "max_epochs": 3, "epoch_length": 4},
        {"iteration": 5, "max_iters": 3, "epoch_length": 4},
        {"iteration": 5, "max_iters": 0, "epoch_length": 4},
    ):
        t.attempt(t.engine().load_state_dict, state)


@scenario
def the_users_own_keys(t: Trace) -> None:
    engine = t.engine()
    engine.state_dict_user_keys.append("alpha")
    engine.state_dict_user_keys.append("beta")
    t.attempt(engine.state_dict)
    engine.state.alpha, engine.state.beta = 0.1, [2]
    t.run(engine, [1, 2], max_epochs=2)
    state = engine.state_dict()
    t.note(state)
    other = t.engine()
    other.state_dict_user_keys.extend(("alpha", "beta"))
    t.attempt(other.load_state_dict, {"iteration": 1, "max_epochs": 3, "epoch_length": 2})
    t.attempt(other.load_state_dict, {**state, "iteration": 1, "gamma": 3})
    t.note(other.state.alpha, other.state.beta, hasattr(other.state, "gamma"))
    t.run(other, [1, 2])


@scenario
def what_a_state_shows(t: Trace) -> None:
    state = t.lib.State(metrics={"loss": 1.0}, alpha=3, output=4)
    t.note(repr(state), state.output, state.alpha, state.iteration, state.times)
    engine = t.engine()
    t.run(engine, [1, 2], max_epochs=2)
    t.note(repr(engine.state))
    for event in t.lib.Events:
        t.attempt(engine.state.get_event_attrib_value, event)
        t.attempt(engine.state.get_event_attrib_value, event.name)
    for name in ("no such event", t.lib.Events.EPOCH_STARTED(every=2)):
        t.attempt(engine.state.get_event_attrib_value, name)


@scenario
def handlers_change_batch_and_output(t: Trace) -> None:
    engine = t.engine(lambda engine, batch: batch)
    events = t.lib.Events

    @engine.on(events.ITERATION_STARTED)
    def other_batch() -> None:
        engine.state.batch = [engine.state.batch] * 2

    @engine.on(events.ITERATION_COMPLETED)
    def other_output() -> None:
        engine.state.output = {"was": engine.state.output}

    @engine.on(events.EPOCH_COMPLETED)
    def note() -> None:
        t.note(engine.state.batch, engine.state.output)

    t.run(engine, [1, 2], max_epochs=2)


@scenario
def times_are_there_when_handlers_ask(t: Trace) -> None:
    engine = t.engine()

    def note(engine: Any) -> None:
        shown = {
            key: value if value is None else ("zero" if value == 0 else "positive")
            for key, value in engine.state.times.items()
        }
        t.note(sorted(shown.items()))

    note(engine)
    for event in t.lib.Events:
        if event.name != "EXCEPTION_RAISED":
            engine.add_event_handler(event, lambda *args, **kwargs: note(engine))
    t.run(engine, [1, 2], max_epochs=2)
    t.run(engine, [1, 2], max_epochs=5)
    engine.add_event_handler(t.lib.Events.ITERATION_STARTED(once=12), lambda: engine.terminate())
    t.run(engine, [1, 2], max_epochs=8)


# ---------------------------------------------------------------- pauses and exceptions


@scenario
def a_pause_and_new_limits(t: Trace) -> None:
    engine = t.engine()
    events = t.lib.Events
    engine.add_event_handler(events.ITERATION_COMPLETED(every=4), lambda: engine.interrupt())
    t.run(engine, [1, 2, 3], max_epochs=2)
    t.run(engine, [5, 6, 7], max_epochs=3)
    t.run(engine, [5, 6, 7], max_epochs=1)
    t.run(engine, [5, 6, 7], epoch_length=9)
    t.run(engine, [5, 6, 7], max_iters=9)
    t.run(engine)
    t.run(engine)
    t.run(engine, [1, 2, 3])
    engine.state.max_epochs = None
    t.run(engine, [8, 9], max_epochs=1)


@scenario
def pausing_forbidden(t: Trace) -> None:
    engine = t.engine()
    engine.interrupt_resume_enabled = False
    t.attempt(engine.interrupt)
    t.run(engine, [1, 2], max_epochs=2)


@scenario
def exceptions_and_their_handlers(t: Trace) -> None:
    def step(engine: Any, batch: int) -> None:
        if engine.state.iteration in (2, 5):
            raise ZeroDivisionError("on purpose")

    for errors in (None, "same", "other"):
        engine = t.engine(step)
        t.on_exception(engine, errors)
        t.run(engine, [1, 2, 3], max_epochs=3)
    engine = t.engine(step)
    t.on_exception(engine)
    t.on_exception(engine, "other")
    t.run(engine, [1, 2, 3], max_epochs=3)
    t.run(t.engine(step), [1, 2, 3], max_epochs=3)


@scenario
def stops_while_an_exception_is_dealt_with(t: Trace) -> None:
    def step(engine: Any, batch: int) -> None:
        if engine.state.iteration == 2:
            raise ZeroDivisionError("on purpose")

    for request in ("terminate", "terminate_epoch", "interrupt"):
        engine = t.engine(step)
        t.on_exception(engine)
        stop = getattr(engine, request)
        engine.add_event_handler(t.lib.Events.EXCEPTION_RAISED, lambda error, stop: stop(), stop)
        t.run(engine, [1, 2, 3], max_epochs=3)
        t.run(engine, [1, 2, 3], max_epochs=3)


@pytest.mark.parametrize("watch", [EVENTS, ()], ids=("watched", "unwatched"))
@pytest.mark.parametrize("function", SCENARIOS, ids=lambda function: function.__name__)
def test_same(function: Scenario, watch: tuple[str, ...]) -> None:
    same(function, watch)
