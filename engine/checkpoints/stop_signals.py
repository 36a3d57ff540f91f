"""Signals that ask a run to end: noticed at once, acted upon where the run's state is complete.

A signal handler of Python's runs between any two instructions, in the midst of a write to the log
too. So here it sets a flag and does nothing else; who has asked for the signals looks at it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import FrameType
from typing import Any, ClassVar, Final

_logger = logging.getLogger(__name__)

#: Schedulers send the first, a terminal the second, and when it closes the third.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds after the first signal within which another is the same one, sent twice.
_SAME: Final = 1.0


class Stop:
    """By what a run of this process has ended.

    Args:
        by: the signal.
        place: where the run is saved.
        trained: the parameters that are what half of it has come to.
    """

    def __init__(self, by: signal.Signals, place: Hashable, trained: Iterable[Any]) -> None:
        self.by, self.place = by, place
        # One that is forked off has ended none.
        self.process = os.getpid()
        # Whether somebody was told that a run begins all the same.
        self.told = False
        self._trained = {id(one): weakref.ref(one) for one in trained}

    def has_trained(self, parameters: Iterable[Any]) -> bool:
        """Tells whether one of some parameters is of what the run has trained."""
        for one in parameters:
            trained = self._trained.get(id(one))
            # Another object may have the place of one that is gone.
            if trained is not None and trained() is one:
                return True
        return False


class StopSignals:
    """Remembers the first of some signals; a second Ctrl-C interrupts at once, as Python does.

    Within a second of the first signal it is the same one: torchrun passes on to its ranks what a
    scheduler may have sent to them too.

    SIGHUP is left as it is where somebody has set it already, as `nohup` does. `noticed` is called
    in the signal handler with the first one that arrives, and sets flags only.

    What has ended one run was sent to the process: it is for what goes on from that run, too, until
    the program starts that run again.

    Args:
        signals: which ones.
        noticed: see above.
        place: where the run is saved that they end.
    """

    #: As a signal is the process's, so is this.
    _last: ClassVar[Stop | None] = None

    def __init__(
        self,
        signals: Sequence[signal.Signals] = STOP_SIGNALS,
        noticed: Callable[[int], None] | None = None,
        place: Hashable = None,
    ) -> None:
        self._signals = tuple(signals)
        self._noticed = noticed
        self._place = place
        if StopSignals._last is not None and StopSignals._last.place == place:
            StopSignals._last = None
        # What had been stopped before the run was set up, it has been set up after.
        self._before = StopSignals._last
        self._previous: dict[signal.Signals, Any] = {}
        self._process = 0
        #: Whether another run listens meanwhile, in a handler of which this one is made.
        self.is_within_another = False
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    def install(self) -> None:
        """Begins to listen; what was set for the signals before is kept for `restore`."""
        if self._previous or not self._signals:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(each.name for each in self._signals)
            _logger.warning(
                "The run is not in the main thread, where alone Python delivers signals: %s will "
                "end the program as if nothing were listening, without a checkpoint.",
                names,
            )
            return
        self._process = os.getpid()
        for each in self._signals:
            if each is signal.SIGHUP and signal.getsignal(each) is not signal.SIG_DFL:
                continue
            self._previous[each] = signal.signal(each, self._handle)
        owners = (getattr(one, "__self__", None) for one in self._previous.values())
        self.is_within_another = any(isinstance(one, StopSignals) for one in owners)

    def restore(self) -> None:
        """Stops listening, and sets back what was set before."""
        if threading.current_thread() is not threading.main_thread():
            return
        for each, previous in self._previous.items():
            # None: it was set by C code, and cannot be set back from here.
            signal.signal(each, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def run_has_ended(self, by: signal.Signals, trained: Iterable[Any]) -> None:
        """Notes that the run has ended by a signal, which the process may not outlive for long.

        At a prompt, Ctrl-C ends what goes on, and the next is another matter.

        Args:
            by: the signal.
            trained: the parameters that the run has trained.
        """
        if by != signal.SIGINT or not (hasattr(sys, "ps1") or sys.flags.interactive):
            StopSignals._last = Stop(by, self._place, trained)

    def stop_before(self, trained: Iterable[Any]) -> tuple[Stop | None, bool]:
        """Returns what has ended a run of this process, of the same trainer or of another.

        Args:
            trained: the parameters that this run trains.

        Returns:
            The stop, if it was by one of these signals; and whether this run would go on from that
            one: it was set up before it was stopped, or trains what that has trained.
        """
        last = StopSignals._last
        if last is None or last.process != os.getpid() or last.by not in self._signals:
            return None, False
        return last, last is not self._before or last.has_trained(trained)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._process:
            self._handle_in_child(received)
        elif self.received is None:
            self.received, self._received_at = received, time.monotonic()
            if self._noticed is not None:
                self._noticed(number)
        elif received == signal.SIGINT and time.monotonic() > self._received_at + _SAME:
            self.restore()
            raise KeyboardInterrupt

    def _handle_in_child(self, received: signal.Signals) -> None:
        """Acts in a process that was forked off, as a DataLoader's worker, and inherited this.

        The terminal sends Ctrl-C to all of them; the parent needs its workers until it has stopped.
        """
        if received != signal.SIGINT:
            previous = self._previous.get(received, signal.SIG_DFL)
            signal.signal(received, signal.SIG_DFL if previous is None else previous)
            os.kill(os.getpid(), received)
