"""Ends a process that waits in vain for a rank whose run has failed, and shows what it waited in.

A collective operation of gloo cannot be interrupted from another thread: once a rank has failed
whose process lives on, the others would wait in it until its timeout, half an hour by default. The
watchdogs of other transports end such a process. This is ours. What it knows is what all of Python
knows: whether the main thread goes from one instruction to another.

CROSSTRAIN_END_STUCK is the number of seconds without such a move after which a process is ended
(15 by default), or `never`.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import time
from typing import Any, Final

from crosstrain.backends import BackendError

VARIABLE: Final = "CROSSTRAIN_END_STUCK"
_PATIENCE: Final = "15"
# Seconds between two looks.
_LOOK: Final = 0.1


def patience() -> float | None:
    """Returns the seconds of CROSSTRAIN_END_STUCK; None if no process is to be ended."""
    text = os.environ.get(VARIABLE, _PATIENCE)
    if text == "never":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise BackendError(
            f"{VARIABLE}={text!r} is neither a number of seconds above 0, after which a process "
            "that waits for a failed rank is ended, nor 'never'; leave it unset for 15."
        )
    return seconds


def end_if_stuck(
    limit: float | None, main: int, freed: threading.Event, reason: str, rank: int, longest: float
) -> None:
    """Returns when the main thread has left the run; ends the process if it does not move.

    Threads that are no daemons are given time while they move: the main thread may wait for one of
    them, such as one that writes a checkpoint. But a pool of threads may work for ever, so they are
    named, and the process is ended where the main thread has not moved for `longest` seconds.

    Args:
        limit: what `patience` returned, before the run.
        main: the identity of the main thread.
        freed: set when it has left the run.
        reason: what has happened on the other rank, as sentences.
        rank: this rank.
        longest: at most so many seconds.
    """
    if limit is None:
        return
    limit = min(limit, longest)
    said = False
    places = _places(main)
    moved = any_moved = time.monotonic()
    while not freed.wait(_LOOK):
        now, places_now = time.monotonic(), _places(main)
        if places_now.get(main) != places.get(main):
            moved = any_moved = now
        elif places_now != places:
            any_moved = now
        places = places_now
        still = now - moved
        if still <= limit:
            continue
        if now - any_moved > limit or still > longest:
            _end(f"{reason} Rank {rank} waits in vain and is ended ({VARIABLE}).")
        if not said:
            said = True
            _say(
                f"{reason} Rank {rank} does not move, and waits for {_others(main)} to end or for "
                f"the failed rank's process: it is ended after {longest:g} s (CROSSTRAIN_TIMEOUT)."
            )


def _places(main: int) -> dict[int, tuple[int, int]]:
    """Returns where the main thread is, and those that keep the process alive."""
    frames: dict[int, Any] = sys._current_frames()
    found: dict[int, tuple[int, int]] = {}
    for thread in threading.enumerate():
        identity = thread.ident
        if identity in frames and (identity == main or not thread.daemon):
            assert identity is not None
            found[identity] = (id(frames[identity]), frames[identity].f_lasti)
    return found


def _others(main: int) -> str:
    names = [t.name for t in threading.enumerate() if not t.daemon and t.ident != main]
    return f"the thread{'s' * (len(names) != 1)} {', '.join(names)}" if names else "no thread"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end(text: str) -> None:
    _say(text)
    try:
        faulthandler.dump_traceback(sys.stderr)
    except (AttributeError, ValueError, io.UnsupportedOperation):
        # What stands in for the stream of errors is no file.
        faulthandler.dump_traceback(2)
    os._exit(1)
