"""A piece of work in a thread of its own, whose failure is kept for whoever asked for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from crosstrain.engine.shown import shown

__all__ = ["BackgroundJob"]

_logger = logging.getLogger(__name__)


class BackgroundJob:
    """Runs a function in a thread that the interpreter waits for before it exits.

    Args:
        work: what to run.
        name: what it is, for the log and for debuggers.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self.name = name
        self._work = work
        self.error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=False)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks
            # Logged as well: nobody may ask before the program ends.
            _logger.error("%s failed: %s", shown(self.name), shown(error))
            self.error = error
        finally:
            self._done.set()

    @property
    def running(self) -> bool:
        """Whether the work is still going on."""
        return not self._done.is_set()

    def join(self) -> None:
        """Waits for the end of the work; `error` then holds what it raised, if it did.

        Not by the thread's own `join`: where a signal's handler raises in that, as Ctrl-C does, and
        torch where a loader's worker has died, Python takes the thread for ended. It then neither
        waits for it at exit nor survives its end.
        """
        self._done.wait()
