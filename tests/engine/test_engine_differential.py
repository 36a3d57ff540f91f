"""The same scenario leaves the same trace on ours and on pytorch-ignite: the table of stops.

Each request to stop, at each event, over several kinds of data. `test_engine_scenarios.py` has the
scenarios that are written out one by one, `test_engine_random.py` random ones, and
`test_engine_deviations.py` the deliberate differences, which are left out here.
"""

from __future__ import annotations

from itertools import product

import pytest
from differential import EVENTS, same
from engine_programs import REQUESTS, Action, Program

STOPS = tuple(event for event in EVENTS if event != "EXCEPTION_RAISED")
WATCHES = (EVENTS, ())

LIMITS = {
    "list": ("list", (("max_epochs", 3),)),
    "list by iterations": ("list", (("max_iters", 7),)),
    "short epochs": ("list", (("epoch_length", 2), ("max_epochs", 3))),
    "long epochs": ("list", (("epoch_length", 5), ("max_epochs", 3))),
    "loader": ("loader", (("max_epochs", 3),)),
    "unknown length": ("unsized", (("max_epochs", 3),)),
    "generator": ("endless", (("epoch_length", 3), ("max_epochs", 3))),
    "no data": ("none", (("epoch_length", 3), ("max_iters", 8))),
}


@pytest.mark.parametrize("limits", LIMITS)
def test_a_run_and_another(limits: str) -> None:
    data, given = LIMITS[limits]
    for watch in WATCHES:
        rows = same(Program(data=data, limits=given, calls=("", "more", "reset")), watch)
        assert sum(row[0] == "step" for row in rows) > 6


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_at_each_event(request_: str, limits: str) -> None:
    data, given = LIMITS[limits]
    for place, count in product((*STOPS, "step"), (1, 2, 3, 4)):
        for watch in WATCHES:
            # The pause at DATALOADER_STOP_ITERATION ends its program: see Runner.pauses.
            same(Program(data, 3, given, (Action(place, count, request_),), ("", "")), watch)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("place", STOPS)
def test_a_request_during_a_pause(place: str, request_: str) -> None:
    for count in (1, 2):
        actions = (Action(place, count, "interrupt"),)
        for watch in WATCHES:
            same(Program("list", 3, (("max_epochs", 3),), actions, (request_, "", "")), watch)


@pytest.mark.parametrize("first", REQUESTS)
@pytest.mark.parametrize("second", REQUESTS)
def test_two_requests_at_one_event(first: str, second: str) -> None:
    for place in ("ITERATION_COMPLETED", "EPOCH_COMPLETED", "step", "TERMINATE", "INTERRUPT"):
        actions = (
            Action("ITERATION_STARTED", 2, "interrupt"),
            Action(place, 1, first),
            Action(place, 1, second),
        )
        same(Program("list", 3, (("max_epochs", 3),), actions, ("", "", "")))


@pytest.mark.parametrize("errors", ["none", "deal", "same", "other"])
@pytest.mark.parametrize("what", ["raise", "stop"])
@pytest.mark.parametrize("place", [*STOPS, "step", "fetch"])
def test_an_exception_at_each_event(place: str, what: str, errors: str) -> None:
    for count in (1, 2, 4):
        actions = (Action(place, count, what), Action("ITERATION_COMPLETED", 5, "end epoch"))
        for watch in WATCHES:
            same(Program("list", 3, (("max_epochs", 3),), actions, (), errors), watch)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("place", [*STOPS, "step"])
def test_new_data_at_each_event(place: str, limits: str) -> None:
    data, given = LIMITS[limits]
    for count in (1, 2, 3):
        for watch in WATCHES:
            same(Program(data, 3, given, (Action(place, count, "swap"),), ("more",)), watch)


@pytest.mark.parametrize("limits", LIMITS)
def test_new_data_between_runs(limits: str) -> None:
    data, given = LIMITS[limits]
    actions = (Action("ITERATION_COMPLETED", 2, "interrupt"), Action("step", 4, "terminate"))
    same(Program(data, 3, given, actions, ("swap", "swap", "swap", "")))


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("count", range(1, 8))
def test_a_new_engine_goes_on_from_the_state_of_another(limits: str, count: int) -> None:
    data, given = LIMITS[limits]
    for what in ("terminate", "interrupt"):
        actions = (Action("ITERATION_COMPLETED", count, what),)
        same(Program(data, 3, given, actions, ("fresh", "more")))


@pytest.mark.parametrize("what", ["attach", "detach"])
@pytest.mark.parametrize("place", STOPS)
def test_handlers_that_come_and_go_while_their_event_fires(place: str, what: str) -> None:
    actions = (Action(place, 1, what), Action(place, 3, what), Action("step", 4, "terminate"))
    for watch in WATCHES:
        same(Program("list", 3, (("max_epochs", 3),), actions, ("",)), watch)
