"""Programs: small descriptions of what is done to an engine, to be run on two libraries alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from differential import EVENTS, Expected, Trace, Unsized, endless
from torch.utils.data import DataLoader

from crosstrain.engine.progress import is_done

# What an action may do, by name.
REQUESTS: dict[str, Callable[[Any], None]] = {
    "terminate": lambda engine: engine.terminate(),
    "terminate quietly": lambda engine: engine.terminate(skip_completed=True),
    "end epoch": lambda engine: engine.terminate_epoch(),
    "end epoch quietly": lambda engine: engine.terminate_epoch(skip_epoch_completed=True),
    "interrupt": lambda engine: engine.interrupt(),
}

DATA = ("list", "loader", "unsized", "iterator", "endless", "none")


@dataclass(frozen=True)
class Action:
    """Something that is done at the `nth` time that `at` happens.

    Args:
        at: the name of an event, or `step` or `fetch`: inside the process function or the data.
        nth: from 1.
        what: one of `REQUESTS`, `raise`, `stop` (KeyboardInterrupt), `swap` (set_data), `attach`,
            `detach`.
    """

    at: str
    nth: int
    what: str


@dataclass(frozen=True)
class Program:
    """What is done to an engine.

    Args:
        data: one of `DATA`.
        size: how many batches the data has, where it ends.
        limits: the arguments of the first `run`, besides the data.
        actions: done by handlers.
        calls: what is done before each further call of `run`: nothing (an empty string), one of
            `REQUESTS`, `swap`, `reset` (a new run), `more` (a higher limit), `fresh` (a new engine
            with the state of the old one).
        errors: what the handler of EXCEPTION_RAISED does: `none` is attached, it may `deal` with
            the exception, or raise the `same` or an `other` one.
        watch: the events that are recorded.
    """

    data: str = "list"
    size: int = 3
    limits: tuple[tuple[str, int], ...] = (("max_epochs", 3),)
    actions: tuple[Action, ...] = ()
    calls: tuple[str, ...] = ("",)
    errors: str = "none"
    watch: tuple[str, ...] = EVENTS

    def __call__(self, trace: Trace) -> None:
        """Runs the program, until a call of `run` raises or all are done."""
        Runner(self, trace).run()


class Runner:
    """Runs a program on the library of a trace."""

    def __init__(self, program: Program, trace: Trace) -> None:
        self.program = program
        self.trace = trace
        self.counts: dict[str, int] = {}
        self.stopped_at: tuple[int, int] | None = None
        self.engine = self.make()

    def make(self) -> Any:
        """Makes an engine with the program's handlers."""
        engine = self.trace.engine(self.step)
        for event in self.trace.lib.Events:
            if event.name == "EXCEPTION_RAISED":
                continue
            if any(action.at == event.name for action in self.program.actions):
                engine.add_event_handler(event, self.act, event.name)
        if self.program.errors != "none":
            error = None if self.program.errors == "deal" else self.program.errors
            self.trace.on_exception(engine, error)
        events = self.trace.lib.Events
        engine.add_event_handler(events.DATALOADER_STOP_ITERATION, self.data_stops)
        engine.add_event_handler(events.INTERRUPT, self.pauses)
        return engine

    def data_stops(self, engine: Any) -> None:
        """Keeps where the data ran out."""
        self.stopped_at = (engine.state.epoch, engine.state.iteration)

    def pauses(self, engine: Any) -> None:
        """Ends the program at a pause there: ignite fires GET_BATCH_STARTED twice afterwards."""
        here = (engine.state.epoch, engine.state.iteration)
        self.trace.over |= engine.state.batch is None and here == self.stopped_at

    def run(self) -> None:
        limits = dict(self.program.limits)
        going = self.trace.run(self.engine, self.make_data(), **limits)
        for call in self.program.calls:
            if not going or self.trace.over:
                return
            arguments = self.prepare(call, limits)
            going = self.trace.run(self.engine, self.make_data(), **arguments)

    def prepare(self, call: str, limits: dict[str, int]) -> dict[str, int]:
        """Does what comes before a further call of `run`; returns its arguments."""
        engine = self.engine
        if call in REQUESTS:
            REQUESTS[call](engine)
        elif call == "swap":
            engine.set_data(range(100, 105))
        elif call == "reset":
            engine.state.max_epochs = engine.state.max_iters = None
            return limits
        elif call == "more" and self.ended_with_a_whole_epoch():
            for name in ("max_epochs", "max_iters"):
                value = getattr(engine.state, name)
                if value is not None:
                    return {name: value + 2}
        elif call == "fresh" and not is_done(engine.state):
            state = dict(engine.state_dict())
            # Theirs does not remember that an end was on purpose.
            state.pop("terminated", None)
            self.trace.note("state_dict", *sorted(state.items()))
            self.engine = self.make()
            self.trace.attempt(self.engine.load_state_dict, state)
        return {}

    def ended_with_a_whole_epoch(self) -> bool:
        """Tells whether a higher limit means the same to both: see docs/engine.md."""
        state = self.engine.state
        length = state.epoch_length
        return length is not None and (not is_done(state) or state.iteration % length == 0)

    def make_data(self) -> Any:
        """Makes the data for one call of `run`."""
        size = self.program.size
        if self.program.data == "list":
            return Watched(list(range(size)), self)
        if self.program.data == "loader":
            return DataLoader(torch.arange(size), batch_size=None)
        if self.program.data == "unsized":
            return Unsized(size)
        if self.program.data == "iterator":
            # Longer than any run, so that it is never used up.
            return WatchedIterator(list(range(200)), self)
        return endless() if self.program.data == "endless" else None

    def step(self, engine: Any, batch: Any) -> Any:
        """The process function: acts, and returns twice the batch."""
        self.act(engine, "step")
        return batch

    def act(self, engine: Any, *args: Any, **kwargs: Any) -> None:
        """Counts what happens at a place, and does what the program says for it."""
        place = args[-1]
        count = self.counts[place] = self.counts.get(place, 0) + 1
        for action in self.program.actions:
            if (action.at, action.nth) == (place, count):
                self.trace.note("action", place, count, action.what)
                self.do(engine, action)

    def do(self, engine: Any, action: Action) -> None:
        """Does one action."""
        if action.what in REQUESTS:
            REQUESTS[action.what](engine)
        elif action.what == "raise":
            raise Expected(f"{action.at} {action.nth}")
        elif action.what == "stop":
            raise KeyboardInterrupt
        elif action.what == "swap":
            engine.set_data(range(50, 57))
        elif action.what == "attach":
            event = self.event(action)
            engine.add_event_handler(event, lambda *args, **kwargs: self.trace.note("attached"))
        else:
            assert action.what == "detach"
            if engine.has_event_handler(self.act, self.event(action)):
                engine.remove_event_handler(self.act, self.event(action))

    def event(self, action: Action) -> Any:
        """The event at which an action is done; for one in the step, the iteration's end."""
        name = action.at if action.at in EVENTS else "ITERATION_COMPLETED"
        return self.trace.lib.Events[name]


class Watched:
    """A list whose iterators act when they are asked for a batch; one that raised goes on."""

    def __init__(self, batches: list[int], runner: Runner) -> None:
        self.batches = batches
        self.runner = runner

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[int]:
        return WatchedIterator(self.batches, self.runner)


class WatchedIterator:
    """Gives batches once, and acts before each."""

    def __init__(self, batches: list[int], runner: Runner) -> None:
        self.batches = iter(batches)
        self.runner = runner

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.runner.act(self.runner.engine, "fetch")
        return next(self.batches)
