"""Loop: the one loop of a run, and the requests that end or pause it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

from .dispatch import Dispatcher
from .events import Events
from .progress import is_done
from .state import State

if TYPE_CHECKING:
    from crosstrain.backends import Backend

__all__ = ["Loop"]

# What has been asked of a run and is not done yet: bits of Engine._asked.
_PAUSE: Final = 1
_END_EPOCH: Final = 2
_END_RUN: Final = 4
_QUIET_EPOCH: Final = 8  # without EPOCH_COMPLETED
_QUIET_RUN: Final = 16  # without COMPLETED

_ENDED: Final = object()


class _EndEpoch(Exception):
    """Leaves the loop over an epoch's batches."""


class _EndRun(Exception):
    """Leaves the run."""


class _Failed(Exception):
    """Leaves the run because of `Engine._failure`, which no handler dealt with."""


class Loop(Dispatcher):
    """Runs a step over batches and fires events: the half of an Engine that moves.

    Args:
        process_function: called as `process_function(engine, batch)` once an iteration.
        backend: its `sync()` is called after each step; None where the step needs none.
    """

    interrupt_resume_enabled = True

    def __init__(
        self, process_function: Callable[[Any, Any], Any], backend: Backend | None = None
    ) -> None:
        super().__init__()
        self.backend = backend
        self._process_function = process_function
        self._data_iter: Iterator[Any] | None = None
        # How many iterations the epoch that a session begins in has behind it.
        self._epoch_offset = 0
        self._asked = 0
        self._session: Generator[None, None, None] | None = None
        self._failure: BaseException | None = None
        self._step_failed = False
        self._at_end: list[Callable[[], None]] = []

    @property
    def should_terminate(self) -> bool:
        """Whether the run ends, or the last one was ended, by `terminate` or by `max_iters`."""
        return bool(self._asked & _END_RUN)

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether the epoch is about to end by `terminate_epoch`."""
        return bool(self._asked & _END_EPOCH)

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is about to pause."""
        return bool(self._asked & _PAUSE)

    def interrupt(self) -> None:
        """Pauses the run at the next event; `run()` returns, and the next `run()` goes on there.

        Raises:
            RuntimeError: if `interrupt_resume_enabled` is false.
        """
        if not self.interrupt_resume_enabled:
            raise RuntimeError(
                "Engine 'interrupt/resume' feature is disabled. "
                "Please, set Engine.interrupt_resume_enabled=True to enable it"
            )
        self.logger.info("Pause asked for: the run returns after the current event.")
        self._asked |= _PAUSE

    def terminate(self, skip_completed: bool = False) -> None:
        """Ends the run after the current event: TERMINATE fires, then COMPLETED.

        Args:
            skip_completed: if true, COMPLETED does not fire.
        """
        self.logger.info("Termination asked for: the run ends after the current event.")
        self._asked = (self._asked & ~_QUIET_RUN) | _END_RUN | (_QUIET_RUN * skip_completed)

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ends the epoch after the current event; the run goes on with the next one, data anew.

        Args:
            skip_epoch_completed: if true, EPOCH_COMPLETED does not fire.
        """
        self.logger.info("End of epoch asked for: the epoch ends after the current event.")
        quiet = _QUIET_EPOCH * skip_epoch_completed
        self._asked = (self._asked & ~_QUIET_EPOCH) | _END_EPOCH | quiet

    def call_at_end(self, function: Callable[[], None]) -> None:
        """Has a function called, without arguments, whenever `run` is about to return or to raise.

        It neither deals with an exception, as a handler of EXCEPTION_RAISED does, nor is left out
        by one. What it raises itself becomes a note of the run's exception, if there is one.
        """
        self._at_end.append(function)

    def _obey(self) -> Generator[None, None, None]:
        """Does what has been asked for: leaves the run or the epoch, or pauses."""
        if self._asked & _END_RUN:
            raise _EndRun
        if self._asked & _END_EPOCH:
            raise _EndEpoch
        if self._asked & _PAUSE:
            self._fire(self._handlers.require(Events.INTERRUPT))
            self._asked &= ~_PAUSE
            yield

    def _drop_session(self) -> None:
        """Forgets a paused run, its data, and what was asked of it or went wrong in it."""
        if self._session is not None:
            self._session.close()
        self._session = self._data_iter = None
        self._asked, self._step_failed = 0, False

    def _recover(self) -> None:
        """Sets the state back to the last iteration whose step was completed."""
        state = self.state
        state.iteration -= self._step_failed
        if state.epoch_length is not None:
            state.epoch = state.iteration // state.epoch_length
        self._failure, self._step_failed = None, False

    def _continue(self) -> State:
        if self._session is None:
            # An epoch that terminate() ended is over; any other is gone on with.
            over = self._asked & _END_RUN or not self.state.epoch_length
            self._epoch_offset = 0 if over else self.state.iteration % self.state.epoch_length
            self._asked = 0
            self._session = self._run()
        # A generator, so that interrupt() leaves the loop wherever it is and run() re-enters there.
        ended = next(self._session, _ENDED) is _ENDED
        if ended:
            self._session = None
        for function in self._at_end:
            try:
                function()
            except Exception as error:
                if self._failure is None:
                    raise
                self._failure.add_note(f"At the end of the run: {error}")
        if ended and self._failure is not None:
            raise self._failure
        return self.state

    def _goal(self) -> str:
        state = self.state
        if state.max_iters is not None:
            return f"{state.max_iters} iterations"
        return f"{state.max_epochs} epochs of {state.epoch_length or 'unknown'} iterations"

    def _run(self) -> Generator[None, None, None]:
        started = time.perf_counter()
        times = self.state.times
        times[Events.EPOCH_COMPLETED.name] = times[Events.COMPLETED.name] = 0.0
        try:
            try:
                self._fire(self._handlers.require(Events.STARTED))
                if self._asked:
                    yield from self._obey()
                while not is_done(self.state) and not self.should_terminate:
                    yield from self._run_epoch()
            except _EndRun:
                self._fire(self._handlers.require(Events.TERMINATE))
            except _EndEpoch:
                raise RuntimeError(
                    "The method terminate_epoch() should not be called on Events.STARTED or "
                    "Events.EPOCH_STARTED: no epoch has a batch to end at yet. Call it at "
                    "GET_BATCH_STARTED or later, or terminate() to end the run."
                ) from None
            times[Events.COMPLETED.name] = time.perf_counter() - started
            if not self._asked & _QUIET_RUN:
                self._fire(self._handlers.require(Events.COMPLETED))
                times[Events.COMPLETED.name] = time.perf_counter() - started
            self.logger.info("Run ends after %.3f s.", times[Events.COMPLETED.name])
        except GeneratorExit:
            # An interrupted run that nobody went on with is being thrown away.
            raise
        except _Failed:
            pass
        except BaseException as error:
            with contextlib.suppress(_Failed):
                self._report(error)
        self._data_iter = None

    def _report(self, error: BaseException) -> None:
        """Fires EXCEPTION_RAISED; returns if a handler dealt with the error.

        Raises:
            _Failed: if there is no handler, or one raised; `_failure` holds what is to propagate.
        """
        self.logger.error("Run ends with an exception: %r", error)
        slot = self._handlers.require(Events.EXCEPTION_RAISED)
        if slot.handlers:
            try:
                self._fire_with(slot, error)
            except BaseException as raised:
                error = raised
            else:
                return
        self._failure = error
        raise _Failed

    def _run_epoch(self) -> Generator[None, None, None]:
        state = self.state
        state.epoch += 1
        started = time.perf_counter()
        self._fire(self._handlers.require(Events.EPOCH_STARTED))
        if self._asked:
            yield from self._obey()
        if self._data_iter is None:
            self._data_iter = self._open_data()
        yield from self._run_batches()
        state.times[Events.EPOCH_COMPLETED.name] = time.perf_counter() - started
        if not self._asked & _QUIET_EPOCH:
            self._fire(self._handlers.require(Events.EPOCH_COMPLETED))
            state.times[Events.EPOCH_COMPLETED.name] = time.perf_counter() - started
        # There is no epoch left to end.
        self._asked &= ~(_END_EPOCH | _QUIET_EPOCH)
        if self._asked:
            yield from self._obey()
        self.logger.info(
            "Epoch %s ends after %.3f s.", state.epoch, state.times[Events.EPOCH_COMPLETED.name]
        )

    def _run_batches(self) -> Generator[None, None, None]:
        """The loop over one epoch's batches: the hot path, whose every line is paid each time."""
        slots = self._handlers
        asking, got = (
            slots.require(Events.GET_BATCH_STARTED),
            slots.require(Events.GET_BATCH_COMPLETED),
        )
        starting = slots.require(Events.ITERATION_STARTED)
        completing = slots.require(Events.ITERATION_COMPLETED)
        started = starting.event
        process = self._process_function
        sync = None if self.backend is None else self.backend.sync
        count, self._epoch_offset = self._epoch_offset, 0
        stepped = self.state.iteration
        renewed = False
        try:
            while True:
                state = self.state
                state.batch = None
                has_data = state.dataloader is not None
                if asking.handlers and has_data and not renewed:
                    self._fire(asking)
                    if self._asked:
                        yield from self._obey()
                try:
                    state.batch = next(self._data_iter)  # type: ignore[arg-type]
                except StopIteration:
                    if self._learn_epoch_length(count):
                        break
                    self._check_not_exhausted(renewed)
                    if has_data:
                        self._fire(slots.require(Events.DATALOADER_STOP_ITERATION))
                        if self._asked:
                            yield from self._obey()
                    self._data_iter = self._open_data()
                    renewed = True
                    continue
                renewed = False
                state.raw_output = None
                if got.handlers and has_data:
                    self._fire(got)
                if self._asked and has_data:
                    yield from self._obey()
                count += 1
                state.iteration += 1
                if starting.handlers:
                    self._fire(starting)
                    if self._asked:
                        yield from self._obey()
                else:
                    self.last_event_name = started
                state.raw_output = process(self, state.batch)
                if sync is not None:
                    sync()
                stepped = state.iteration
                if completing.handlers:
                    self._fire(completing)
                if self._asked:
                    yield from self._obey()
                if count == state.epoch_length:
                    break
                if stepped == state.max_iters:
                    self._asked |= _END_RUN
                    raise _EndRun
        except _EndEpoch:
            self._fire_with(slots.require(Events.TERMINATE_SINGLE_EPOCH), iter_counter=count)
            self._data_iter = self._open_data()
        except (_EndRun, GeneratorExit):
            raise
        except BaseException as error:
            self._step_failed = self.state.iteration > stepped
            if not isinstance(error, Exception):
                raise
            # Any error of the step, the data or a handler: EXCEPTION_RAISED decides what it means.
            self._report(error)

    def _open_data(self) -> Iterator[Any]:
        """Returns an iterator over the data from its beginning."""
        data = self.state.dataloader
        return repeat(None) if data is None else iter(data)

    def _learn_epoch_length(self, count: int) -> bool:
        """Takes the length of the data's first pass for the epoch's, where it was not known.

        Raises:
            ValueError: if that pass gave nothing.
        """
        state = self.state
        if state.epoch_length is not None:
            return False
        if count == 0:
            raise ValueError(
                f"Input data has zero size: {type(state.dataloader).__name__} gave no batch. "
                "Please provide non-empty data; an iterator can be used up by an earlier loop."
            )
        state.epoch_length = count
        return True

    def _check_not_exhausted(self, renewed: bool) -> None:
        """Stops a run whose data has nothing to give, though more iterations are wanted.

        Raises:
            RuntimeError: if the data was started anew and gave no batch.
        """
        state = self.state
        if renewed:
            raise RuntimeError(
                f"The data ({type(state.dataloader).__name__}) is used up at iteration "
                f"{state.iteration} and iterating it anew gives nothing, but the run goes to "
                f"{self._goal()}. Pass data that can be iterated more than once (a list, a "
                "DataLoader), a longer iterator, or give new data with set_data() at "
                "Events.DATALOADER_STOP_ITERATION."
            )
