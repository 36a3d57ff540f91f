"""Requests: what handlers, the step and the caller ask of a run: to end, to pause."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Final, Protocol

from .dispatch import Dispatcher
from .events import Events
from .progress import Place

# What has been asked of a run and is not done yet: bits of `Engine.asked`.
PAUSE: Final = 1
END_EPOCH: Final = 2
END_RUN: Final = 4
QUIET_EPOCH: Final = 8  # without EPOCH_COMPLETED
QUIET_RUN: Final = 16  # without COMPLETED
ON_PURPOSE: Final = 32  # for good: started again from its state, the run trains nothing more
NO_BATCHES: Final = 64  # the epoch's iterations are all done: only its end is to be fired
# All that is asked of an epoch's end, and of the run's.
EPOCH_ENDS: Final = END_EPOCH | QUIET_EPOCH
RUN_ENDS: Final = END_RUN | QUIET_RUN | ON_PURPOSE

# Calls `terminate` because time is up, which is no end on purpose.
_TIME_LIMIT: Final = "ignite.handlers.time_limit"


class EndEpoch(Exception):
    """Leaves the loop over an epoch's batches."""


class EndRun(Exception):
    """Leaves the run."""


class Ranks(Protocol):
    """What a loop needs of the other processes of its world: all end a run together."""

    def review(self, asked: int) -> int:
        """Returns what is done now of what is asked of this rank: what all have agreed upon."""
        ...

    def first_cause(self, error: BaseException) -> BaseException:
        """Returns what another rank's failure makes of an error of this one; else the error."""
        ...

    def leave(self, failure: BaseException | None) -> BaseException | None:
        """Tells the others that this rank's run has ended, and how; returns what it is to raise."""
        ...


class Requests(Dispatcher):
    """Keeps what has been asked of a run and obeys it: the part of an Engine that is told to stop.

    What is asked is done after the current event, when the loop next calls `_obey`.
    """

    interrupt_resume_enabled = True
    #: Whether the program is one that its scheduler starts again, as `resume_or_start` says: a run
    #: that a loaded state was ended on purpose in trains nothing more, and of several runs with a
    #: limit each, those that the state has behind it are passed by.
    restartable = False

    def __init__(self) -> None:
        super().__init__()
        #: What has been asked of the run and is not done yet, as bits such as END_RUN.
        self.asked = 0
        self._place = Place()
        #: With whom it is agreed what is done of it, where several processes train as one.
        self.ranks: Ranks | None = None

    @property
    def should_terminate(self) -> bool | str:
        """Whether the run ends, or the last one was ended, by `terminate` or by `max_iters`.

        "skip_completed" where COMPLETED is not to fire, as `terminate(skip_completed=True)` asks.
        Also after `resume_or_start` has loaded the state of a run that `terminate` had ended.
        Setting it to True does what `terminate()` does. Setting it to False takes that back: the
        next `run` goes on.
        """
        owed = self._place.owed if self.restartable else 0
        asked = self.asked | owed
        return "skip_completed" if asked & QUIET_RUN else bool(asked & END_RUN)

    @should_terminate.setter
    def should_terminate(self, value: bool | str) -> None:
        if value:
            self.terminate(skip_completed=value == "skip_completed")
        else:
            self.asked &= ~RUN_ENDS
            self._place.owed &= ~RUN_ENDS

    @property
    def should_terminate_single_epoch(self) -> bool | str:
        """Whether the epoch is about to end by `terminate_epoch`; can be set, too.

        "skip_epoch_completed" where EPOCH_COMPLETED is not to fire.
        """
        return "skip_epoch_completed" if self.asked & QUIET_EPOCH else bool(self.asked & END_EPOCH)

    @should_terminate_single_epoch.setter
    def should_terminate_single_epoch(self, value: bool | str) -> None:
        if value:
            self.terminate_epoch(skip_epoch_completed=value == "skip_epoch_completed")
        else:
            self.asked &= ~EPOCH_ENDS

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is about to pause; can be set, as by `interrupt`."""
        return bool(self.asked & PAUSE)

    @should_interrupt.setter
    def should_interrupt(self, value: bool) -> None:
        if value:
            self.interrupt()
        else:
            self.asked &= ~PAUSE

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
        self.asked |= PAUSE

    def terminate(self, skip_completed: bool = False, *, goes_on: bool = False) -> None:
        """Ends the run after the current event: TERMINATE fires, then COMPLETED.

        This is an end on purpose, such as early stopping's: a state that is saved from here on says
        so, and `resume_or_start`, started again, trains nothing more. Where only this process has
        to end, because its time is up or a signal has come, say so by `goes_on`.

        Args:
            skip_completed: if true, COMPLETED does not fire.
            goes_on: whether the run goes on where it was, when it is started again from its state.
                pytorch-ignite's `TimeLimit` need not say so.
        """
        if not goes_on:
            caller = sys._getframe(1).f_globals.get("__name__")
            goes_on = caller == _TIME_LIMIT
        self.logger.info("Termination asked for: the run ends after the current event.")
        purpose = 0 if goes_on else ON_PURPOSE
        self.asked = (self.asked & ~QUIET_RUN) | END_RUN | (QUIET_RUN * skip_completed) | purpose

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ends the epoch after the current event; the run goes on with the next one, data anew.

        Args:
            skip_epoch_completed: if true, EPOCH_COMPLETED does not fire.
        """
        self.logger.info("End of epoch asked for: the epoch ends after the current event.")
        quiet = QUIET_EPOCH * skip_epoch_completed
        self.asked = (self.asked & ~QUIET_EPOCH) | END_EPOCH | quiet

    def _obey(self) -> Generator[None, None, None]:
        """Does what has been asked for: leaves the run or the epoch, or pauses."""
        if self.ranks is not None:
            self.asked = self.ranks.review(self.asked)
        if self.asked & END_RUN:
            raise EndRun
        if self.asked & END_EPOCH:
            raise EndEpoch
        if self.asked & PAUSE:
            self._emit(Events.INTERRUPT)
            self.asked &= ~PAUSE
            yield
