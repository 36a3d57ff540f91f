"""Loop: the one loop of a run."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Generator, Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any

from .errors import DataUsedUp, EmptyData, RankFailed
from .events import Events
from .loader_workers import iterator_over
from .progress import Place, is_done
from .requests import (
    END_RUN,
    EPOCH_ENDS,
    NO_BATCHES,
    QUIET_EPOCH,
    QUIET_RUN,
    RUN_ENDS,
    EndEpoch,
    EndRun,
    Requests,
)
from .state import State

if TYPE_CHECKING:
    from crosstrain.backends import Backend

_END_RUN_EITHER_WAY = (EmptyData, DataUsedUp)
_OF_A_BATCH = (
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
)


class _Failed(Exception):
    """Leaves the run because of `Engine._failure`, which no handler dealt with."""


class Loop(Requests):
    """Runs a step over batches and fires events: the half of an Engine that moves."""

    def __init__(
        self, process_function: Callable[[Any, Any], Any], backend: Backend | None = None
    ) -> None:
        super().__init__()
        #: The backend, whose `sync()` is the boundary between two steps.
        self.backend = backend
        self._process_function = process_function
        self._data_iter: Any = None
        # Called when the step of a batch is done, before anything else is.
        self._step_done: Callable[[], None] | None = None
        self._session: Generator[None, None, None] | None = None
        # What is to propagate out of `run`.
        self._failure: BaseException | None = None
        self._before_run: list[Callable[[], None]] = []
        self._at_end: list[Callable[[], None]] = []
        self._after_pause: list[Callable[[], None]] = []
        #: Whether the run has come to its end, for what is called there: no pause, no exception.
        self.ended_in_order = False
        #: Asked about an error before EXCEPTION_RAISED fires: whether it is dealt with already.
        self.deals_with: Callable[[BaseException], bool] | None = None

    def call_before_run(self, function: Callable[[], None]) -> None:
        """Has a function called, without arguments, when `run` is called, before all else.

        What it raises, `run` does, and nothing has changed.
        """
        self._before_run.append(function)

    def call_at_end(self, function: Callable[[], None]) -> None:
        """Has a function called, without arguments, whenever `run` is about to return or to raise.

        It neither deals with an exception, as a handler of EXCEPTION_RAISED does, nor is left out
        by one. What it raises itself becomes a note of the run's exception, if there is one.
        """
        self._at_end.append(function)

    def call_after_pause(self, function: Callable[[], None]) -> None:
        """Has a function called, without arguments, when a run that has paused is about to go on.

        What it raises, `run` does, and the run stays paused.
        """
        self._after_pause.append(function)

    def _drop_session(self) -> None:
        """Forgets a paused run and its data, what was asked of a run and where it was."""
        if self._session is not None:
            self._session.close()
            self._session = self._data_iter = None
        self.asked, self._place = 0, Place()

    def _recover(self) -> None:
        """Sets the state of a failed run back to the last iteration whose step was completed."""
        place = self._place
        self.state.iteration -= place.broken
        self.state.epoch -= place.open
        place.broken = place.open = False

    def _continue(self) -> State:
        state, place = self.state, self._place
        if self._session is None:
            if place.within is None:
                place.within = state.iteration % (state.epoch_length or 1)
            place.stepped = state.iteration
            place.loaded = place.loaded and self.restartable
            self.asked = 0
            self._session = self._run()
        else:
            for function in self._after_pause:
                function()
        self._observe()
        session = self._session
        try:
            # A generator, so that interrupt() leaves the loop wherever it is and run() re-enters
            # it there.
            next(session, None)
        finally:
            if inspect.getgeneratorstate(session) == inspect.GEN_CLOSED:
                self._session = None
        failure, self._failure = self._failure, None
        if self.ranks is not None and self._session is None:
            failure = self.ranks.leave(failure)
        try:
            self._call_at_end(failure)
            if failure is not None:
                raise failure
        finally:
            # Its traceback holds this frame: without this both would wait for the collector.
            del failure
        return state

    def _call_at_end(self, failure: BaseException | None) -> None:
        self.ended_in_order = failure is None and self._session is None
        for function in self._at_end:
            try:
                function()
            except Exception as error:
                if failure is None:
                    raise
                failure.add_note(f"At the end of the run: {error}")

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
                self._begins()
                self._emit(Events.STARTED)
                if self.restartable and self._place.owed & RUN_ENDS:
                    self._end_as_loaded()
                self._place.owed &= ~RUN_ENDS
                if self.asked:
                    yield from self._obey()
                while self._place.owed & NO_BATCHES or not is_done(self.state):
                    if self.should_terminate:
                        break
                    yield from self._run_epoch()
            except EndRun:
                self._place.leave()
                self._emit(Events.TERMINATE)
            except EndEpoch:
                raise RuntimeError(
                    "The method terminate_epoch() should not be called on Events.STARTED or "
                    "Events.EPOCH_STARTED: no epoch has a batch to end at yet. Call it at "
                    "GET_BATCH_STARTED or later, or terminate() to end the run."
                ) from None
            times[Events.COMPLETED.name] = time.perf_counter() - started
            self._ends()
            if not self.asked & QUIET_RUN:
                self._emit(Events.COMPLETED)
                times[Events.COMPLETED.name] = time.perf_counter() - started
            self.logger.info("Run ends after %.3f s.", times[Events.COMPLETED.name])
        except GeneratorExit:
            # A paused run that nobody went on with is being thrown away.
            raise
        except _Failed:
            pass
        except BaseException as error:  # noqa: BLE001  EXCEPTION_RAISED decides what it means
            with contextlib.suppress(_Failed):
                self._report(error)
        self._data_iter = None

    def _end_as_loaded(self) -> None:
        """Ends the run as the one that was loaded had ended: on purpose, once and for all."""
        place = self._place
        self.asked |= place.owed & RUN_ENDS
        place.owed &= ~RUN_ENDS
        self.logger.info(
            "The run was ended on purpose at iteration %s, by terminate(): nothing is trained. To "
            "train on, set should_terminate = False before run().",
            self.state.iteration,
        )
        raise EndRun

    def _report(self, error: BaseException) -> None:
        """Fires EXCEPTION_RAISED; returns if a handler dealt with the error.

        Raises:
            _Failed: if no handler ran, or one raised; `_failure` holds what is to propagate.
        """
        if self.ranks is not None:
            error = self.ranks.first_cause(error)
        if self.deals_with is not None and self.deals_with(error):
            return
        # As text: a record that is kept must not keep the frames of the run, and their batches.
        self.logger.error("Exception at iteration %s: %s", self.state.iteration, repr(error))
        slot = self._handlers.require(Events.EXCEPTION_RAISED)
        try:
            if slot.handlers and self._fire_with(slot.event, error):
                return
        except BaseException as raised:  # noqa: BLE001  a handler decides what propagates
            error = raised
        self._failure = error
        raise _Failed

    def _run_epoch(self) -> Generator[None, None, None]:
        started = time.perf_counter()
        self._observe()
        state, place = self.state, self._place
        state.epoch += 1
        place.open, place.ended, place.loaded = True, False, False
        place.began = state.iteration - (place.within or 0)
        self._epoch_begins()
        self._emit(Events.EPOCH_STARTED)
        if self.asked:
            yield from self._obey()
        if self._data_iter is None:
            self._data_iter = self._open_data()
        if not place.owed & NO_BATCHES:
            yield from self._run_batches(place)
        place.owed = 0
        place.end_epoch()
        times, key = self.state.times, Events.EPOCH_COMPLETED.name
        times[key] = time.perf_counter() - started
        if not self.asked & QUIET_EPOCH:
            self._emit(Events.EPOCH_COMPLETED)
            times[key] = time.perf_counter() - started
        # There is no epoch left to end.
        self.asked &= ~EPOCH_ENDS
        if self.asked:
            yield from self._obey()
        self.logger.info("Epoch %s ends after %.3f s.", self.state.epoch, times[key])

    def _run_batches(self, place: Place) -> Generator[None, None, None]:
        """The loop over one epoch's batches: the hot path, whose every line is paid each time.

        It is one function although it is long: a step may raise StopIteration, which Python lets no
        generator pass on to another.
        """
        asking, got, starting, completing = map(self._handlers.require, _OF_A_BATCH)
        started = starting.event
        fire = self._fire_observed if self._observed else self._fire
        process = self._process_function
        following = self._after_each_step()
        # Events that nobody listens to are passed by, unless they are logged or timed, or a pause
        # has been: something may have been asked for meanwhile.
        alert = self._observed or self.asked != 0
        count = place.within or 0
        stepped = place.stepped = self.state.iteration
        renewed = False
        try:
            if place.owed:
                self.asked |= place.owed
                place.owed = 0
                yield from self._obey()
            while True:
                state = self.state
                state.batch = None
                if (asking.handlers or alert) and not renewed and state.dataloader is not None:
                    fire(asking)
                    if self.asked:
                        yield from self._obey()
                        alert = True
                try:
                    state.batch = next(self._data_iter)
                except StopIteration:
                    if state.epoch_length is None:
                        self._learn_epoch_length(count)
                        return
                    yield from self._renew_data(renewed)
                    renewed = True
                    continue
                renewed = False
                state.raw_output = None
                if (got.handlers or alert) and state.dataloader is not None:
                    fire(got)
                if self.asked and state.dataloader is not None:
                    yield from self._obey()
                    alert = True
                count += 1
                state.iteration += 1
                if starting.handlers or alert:
                    fire(starting)
                    if self.asked:
                        yield from self._obey()
                        alert = True
                else:
                    self.last_event_name = started
                state.raw_output = process(self, state.batch)
                if following is not None:
                    for call in following:
                        call()
                    place.stepped = state.iteration
                stepped = state.iteration
                if completing.handlers or alert:
                    fire(completing)
                if self.asked:
                    yield from self._obey()
                    alert = True
                if count == state.epoch_length:
                    return
                if stepped == state.max_iters:
                    self.asked |= END_RUN
                    raise EndRun
        except EndEpoch:
            place.open = False
            iterations = self.state.iteration - place.began
            self._fire_with(Events.TERMINATE_SINGLE_EPOCH, iter_counter=iterations)
            self._data_iter = self._reopen_data()
        except (EndRun, GeneratorExit):
            raise
        except BaseException as error:
            place.broken = self.state.iteration > stepped
            if not self._goes_on(error, stepped - place.began):
                raise

    def _after_each_step(self) -> list[Callable[[], None]] | None:
        """Returns what is called after each step, or None: to ask that of a list takes longer.

        An engine without any has nothing that reads `place.stepped` while the loop runs, and does
        not pay for it.
        """
        sync = None if self.backend is None else self.backend.sync
        return [call for call in (self._step_done, sync) if call is not None] or None

    def _goes_on(self, error: BaseException, done: int) -> bool:
        """Keeps where an error left the epoch; tells whether its handlers dealt with it here.

        `done` iterations of the epoch have had their step. `_Failed` leaves the run where they
        have not dealt with it.
        """
        length, place = self.state.epoch_length, self._place
        place.open = done != length
        # Where the length is to be learned, the epoch that goes on must count from its beginning.
        place.within = done if place.open and length is not None else 0
        if not isinstance(error, Exception) or isinstance(error, _END_RUN_EITHER_WAY):
            return False
        if self.ranks is not None and isinstance(self.ranks.first_cause(error), RankFailed):
            return False
        self._report(error)
        place.broken = False
        if length is None:
            # What is left of this pass must not be taken for the length of an epoch.
            self._data_iter = self._reopen_data()
        return True

    def _open_data(self) -> Iterator[Any]:
        """Returns an iterator over the data from its beginning."""
        data = self.state.dataloader
        if data is None:
            return repeat(None)
        return iterator_over(data)

    def _reopen_data(self) -> Iterator[Any]:
        """Returns an iterator over the data from its beginning, for another pass of this run."""
        return self._open_data()

    # What a subclass adds to a run.

    def _begin_anew(self) -> None:
        """Forgets whatever a subclass keeps of the run before: a new one begins."""

    def _begins(self) -> None:
        """Is called before STARTED fires."""

    def _epoch_begins(self) -> None:
        """Is called before EPOCH_STARTED fires."""

    def _ends(self) -> None:
        """Is called before COMPLETED fires, whether it does or not."""

    def _learn_epoch_length(self, count: int) -> None:
        """Takes the length of the data's first pass for the epoch's."""
        if count == 0:
            raise EmptyData(
                "Input data has zero size. Please provide non-empty data: "
                f"{type(self.state.dataloader).__name__} gave no batch. An iterator can be used "
                "up by an earlier loop."
            )
        self.state.epoch_length = count

    def _renew_data(self, renewed: bool) -> Generator[None, None, None]:
        """Starts the data anew because it has run out before the epoch has."""
        state = self.state
        if renewed:
            raise DataUsedUp(
                f"The data ({type(state.dataloader).__name__}) is used up at iteration "
                f"{state.iteration} and iterating it anew gives nothing, but the run goes to "
                f"{self._goal()}. Pass data that can be iterated more than once (a list, a "
                "DataLoader), a longer iterator, or give new data with set_data() at "
                "Events.DATALOADER_STOP_ITERATION."
            )
        if state.dataloader is not None:
            self._emit(Events.DATALOADER_STOP_ITERATION)
            while self.asked:
                yield from self._obey()
        self._data_iter = self._reopen_data()
