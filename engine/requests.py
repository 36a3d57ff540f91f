"""Requests: what handlers, the step and the caller ask of a run: to end, to pause."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Final

from .dispatch import Dispatcher
from .events import Events

if TYPE_CHECKING:
    from crosstrain.engine.ranks.agreement import Agreement

__all__ = [
    "END_EPOCH",
    "END_RUN",
    "PAUSE",
    "QUIET_EPOCH",
    "QUIET_RUN",
    "EndEpoch",
    "EndRun",
    "Requests",
]

# What has been asked of a run and is not done yet: bits of Engine._asked.
PAUSE: Final = 1
END_EPOCH: Final = 2
END_RUN: Final = 4
QUIET_EPOCH: Final = 8  # without EPOCH_COMPLETED
QUIET_RUN: Final = 16  # without COMPLETED


class EndEpoch(Exception):
    """Leaves the loop over an epoch's batches."""


class EndRun(Exception):
    """Leaves the run."""


class Requests(Dispatcher):
    """Keeps what has been asked of a run and obeys it: the part of an Engine that is told to stop.

    What is asked is done after the current event, when the loop next calls `_obey`.
    """

    interrupt_resume_enabled = True

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0
        #: With whom it is agreed what is done of it, where several processes train as one.
        self.ranks: Agreement | None = None

    @property
    def should_terminate(self) -> bool:
        """Whether the run ends, or the last one was ended, by `terminate` or by `max_iters`."""
        return bool(self._asked & END_RUN)

    @property
    def should_terminate_single_epoch(self) -> bool:
        """Whether the epoch is about to end by `terminate_epoch`."""
        return bool(self._asked & END_EPOCH)

    @property
    def should_interrupt(self) -> bool:
        """Whether the run is about to pause."""
        return bool(self._asked & PAUSE)

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
        self._asked |= PAUSE

    def terminate(self, skip_completed: bool = False) -> None:
        """Ends the run after the current event: TERMINATE fires, then COMPLETED.

        Args:
            skip_completed: if true, COMPLETED does not fire.
        """
        self.logger.info("Termination asked for: the run ends after the current event.")
        self._asked = (self._asked & ~QUIET_RUN) | END_RUN | (QUIET_RUN * skip_completed)

    def terminate_epoch(self, skip_epoch_completed: bool = False) -> None:
        """Ends the epoch after the current event; the run goes on with the next one, data anew.

        Args:
            skip_epoch_completed: if true, EPOCH_COMPLETED does not fire.
        """
        self.logger.info("End of epoch asked for: the epoch ends after the current event.")
        quiet = QUIET_EPOCH * skip_epoch_completed
        self._asked = (self._asked & ~QUIET_EPOCH) | END_EPOCH | quiet

    def _obey(self) -> Generator[None, None, None]:
        """Does what has been asked for: leaves the run or the epoch, or pauses."""
        if self.ranks is not None:
            self.ranks.review()
        if self._asked & END_RUN:
            raise EndRun
        if self._asked & END_EPOCH:
            raise EndEpoch
        if self._asked & PAUSE:
            self._emit(Events.INTERRUPT)
            self._asked &= ~PAUSE
            yield
