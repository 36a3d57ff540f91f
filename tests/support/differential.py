"""One scenario on two libraries: ours and the installed pytorch-ignite, traced alike.

A scenario is a function of a `Trace`. It takes `Engine`, `Events` and the rest from `trace.lib`,
which is `crosstrain.engine` or `ignite.engine`, and so runs unchanged on both. `same` runs it on
both and compares what was recorded: each event with the state that its handlers see, what `run`
returned or raised, and the warnings.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from difflib import unified_diff
from types import ModuleType
from typing import Any

import ignite.engine
import torch

import crosstrain.engine

OURS = crosstrain.engine
IGNITE = ignite.engine

EVENTS = tuple(event.name for event in OURS.Events)
# More rows than any scenario makes: a run that goes on for ever is stopped, and seen.
BUDGET = 3000

SILENT = logging.getLogger("differential")
SILENT.disabled = True

Row = tuple[Any, ...]
Scenario = Callable[["Trace"], object]


class Expected(Exception):
    """What scenarios raise on purpose."""


class Overrun(BaseException):
    """The run has gone on for too long."""


class Trace:
    """Records what happens in a scenario.

    Args:
        lib: the library under test.
        watch: the names of the events that are recorded; the other events have no handler but the
            scenario's own.
    """

    def __init__(self, lib: ModuleType, watch: Iterable[str] = EVENTS) -> None:
        self.lib = lib
        self.watch = frozenset(watch)
        self.rows: list[Row] = []
        # A scenario must not go on: what follows is a deliberate difference.
        self.over = False
        self.engines: list[Any] = []

    def engine(self, step: Callable[[Any, Any], Any] | None = None) -> Any:
        """Makes an engine whose step and watched events are recorded.

        The output of the step is the batch, doubled where it is a number, unless `step` is given.
        """

        def recorded(engine: Any, batch: Any) -> Any:
            self.note("step", *self.look(engine))
            if step is not None:
                return step(engine, batch)
            return None if batch is None else 2 * plain(batch)

        engine = self.lib.Engine(recorded)
        engine.logger = SILENT
        for event in self.lib.Events:
            # A handler of EXCEPTION_RAISED deals with the exception, so none is attached unasked.
            if event.name in self.watch and event.name != "EXCEPTION_RAISED":
                engine.add_event_handler(event, self.recorder(event.name))
        self.engines.append(engine)
        return engine

    def recorder(self, label: str) -> Callable[..., None]:
        """Makes a handler that records a row, whatever its event passes."""

        def record(engine: Any, *args: Any, **kwargs: Any) -> None:
            passed = [type_of(value) for value in args]
            self.note(label, *passed, *sorted(kwargs.items()), *self.look(engine))

        return record

    def on_exception(self, engine: Any, error: str | None = None) -> None:
        """Records exceptions; deals with them, or raises `error`: "same" or "other"."""
        record = self.recorder("EXCEPTION_RAISED")

        def handle(engine: Any, exception: BaseException) -> None:
            if isinstance(exception, GeneratorExit):
                # ignite's alone, where a paused run is thrown away; a deliberate difference.
                return
            self.over = True
            record(engine, exception)
            if error is not None:
                raise exception if error == "same" else Expected("from the handler")

        engine.add_event_handler(self.lib.Events.EXCEPTION_RAISED, handle)

    def look(self, engine: Any) -> Row:
        """Returns what a handler can see of an engine."""
        state = engine.state
        last = engine.last_event_name
        return (
            f"iteration {state.iteration}",
            f"epoch {state.epoch}",
            f"of {state.epoch_length}, {state.max_epochs}, {state.max_iters}",
            f"batch {plain(state.batch)}",
            f"output {plain(state.output)}",
            f"last {last if last is None or isinstance(last, str) else last.name}",
            "asked "
            + "".join(
                "01"[bool(flag)]
                for flag in (
                    engine.should_terminate,
                    engine.should_terminate_single_epoch,
                    engine.should_interrupt,
                )
            ),
        )

    def note(self, *values: Any) -> None:
        """Records a row of the scenario's own."""
        self.rows.append(values)
        if len(self.rows) > BUDGET:
            raise Overrun

    def attempt(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function and records what it returned or raised; returns the former."""
        try:
            result = function(*args, **kwargs)
        except (Exception, KeyboardInterrupt, Overrun) as error:  # noqa: BLE001  compared
            self.note("raised", type_of(error))
            return None
        self.note("returned", describe(result))
        return result

    def run(self, engine: Any, *args: Any, **kwargs: Any) -> bool:
        """Calls `run`, records how it ended and the state after it; tells whether it returned."""
        result = self.attempt(engine.run, *args, **kwargs)
        seen = self.look(engine)
        if not self.watch.issuperset(EVENTS):
            # Ours sets last_event_name only where a handler or the step can see it.
            seen = tuple(item for item in seen if not item.startswith("last"))
        self.note("after", *seen, f"times {sorted(engine.state.times)}")
        return result is not None


def plain(value: Any) -> Any:
    """Returns a batch as a plain value."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def type_of(value: Any) -> str:
    """Names the type of a value; for an exception of ours, the built-in one from which it comes."""
    kinds = type(value).__mro__
    if kinds[0].__module__.startswith("crosstrain"):
        return next(kind.__name__ for kind in kinds if kind.__module__ == "builtins")
    return kinds[0].__name__


def describe(value: Any) -> str:
    """Describes what a function returned, without naming the library that it is of."""
    if isinstance(value, (int, float, str, bool, dict, list)):
        return f"{type(value).__name__} {value}"
    return type(value).__name__


def trace(lib: ModuleType, scenario: Scenario, watch: Iterable[str] = EVENTS) -> list[Row]:
    """Runs a scenario on one library; returns its rows, warnings last."""
    seen = Trace(lib, watch)
    shared = dict(ignite.engine.State.event_to_attr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            scenario(seen)
        finally:
            # ignite keeps this dictionary on the class: one scenario would change the next.
            ignite.engine.State.event_to_attr.clear()
            ignite.engine.State.event_to_attr.update(shared)
            for engine in seen.engines:
                if lib is IGNITE:
                    # It fires EXCEPTION_RAISED when a paused engine is collected.
                    engine._event_handlers.clear()
    # That data begins anew inside an epoch is told by ours only: difference 39 of docs/engine.md.
    told = [one for one in caught if one.category is not crosstrain.engine.ResumeWarning]
    seen.rows.extend(("warned", warning.category.__name__) for warning in told)
    return once_each_exception(seen.rows)


def once_each_exception(rows: list[Row]) -> list[Row]:
    """Drops the second EXCEPTION_RAISED of one exception, which ignite fires.

    It is one of the deliberate differences (docs/engine.md): ours fires it once.
    """
    kept: list[Row] = []
    for row in rows:
        if not (kept and row[0] == kept[-1][0] == "EXCEPTION_RAISED"):
            kept.append(row)
    return kept


def same(scenario: Scenario, watch: Iterable[str] = EVENTS) -> list[Row]:
    """Runs a scenario on both libraries, asserts that the traces are equal, and returns them."""
    theirs = trace(IGNITE, scenario, watch)
    ours = trace(OURS, scenario, watch)
    if ours != theirs:
        difference = unified_diff(
            [str(row) for row in theirs], [str(row) for row in ours], "ignite", "ours", lineterm=""
        )
        raise AssertionError("\n".join(("the traces differ", *difference)))
    assert ("raised", "Overrun") not in ours, "the scenario does not end on either library"
    return ours


def nothing(engine: Any, batch: Any) -> None:
    """A step that does nothing."""


def names(engine: Any, *watched: Any) -> list[str]:
    """Collects the names of events as they fire, all but EXCEPTION_RAISED unless told."""
    fired: list[str] = []
    for event in watched or [one for one in OURS.Events if one != OURS.Events.EXCEPTION_RAISED]:
        engine.add_event_handler(event, lambda *args, name=event.name, **kwargs: fired.append(name))
    return fired


class Unsized:
    """Data that can be iterated again and again, and does not tell its length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count)


def endless() -> Iterator[int]:
    """Yields the natural numbers."""
    number = 0
    while True:
        yield number
        number += 1
