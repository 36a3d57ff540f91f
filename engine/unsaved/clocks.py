"""Which values are readings of a clock, told by what they are and not by what they are called.

A script keeps the time at which an iteration ended, to show how long the next one takes. No other
process could be given that time again, and none needs it. What has changed since a run began and is
such a reading was taken since then: it lies between what the clock showed then and shows now.
"""

from __future__ import annotations

import datetime
import time
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from crosstrain.engine.nests import NESTS
from crosstrain.engine.source.tree import words_in

_EARLIER: Final = 1.0  # A clock may be set back a little; in seconds.
# Clocks that count from a beginning of their own, whose readings are numbers as others are.
_MONOTONIC: Final = (time.perf_counter, time.monotonic)
# By which of these names scripts read them.
_NAMES: Final = frozenset({"default_timer", "monotonic", "perf_counter"})
_NANOSECONDS: Final = 10**9
_DEPTH: Final = 2
_DIGITS: Final = 4
_MANY: Final = 64


@dataclass
class Clocks:
    """What the clocks show at a moment.

    Args:
        seconds: since 1970.
        monotonic: of each clock that has a beginning of its own, its seconds.
    """

    seconds: float = field(default_factory=time.time)
    monotonic: list[float] = field(default_factory=lambda: [clock() for clock in _MONOTONIC])


class ClocksSince:
    """Tells what clocks have given between then and now.

    Args:
        then: what they showed.
        functions: by which the run may have read them.
    """

    def __init__(self, then: Clocks, functions: Iterable[types.FunctionType]) -> None:
        self._then, self._now, self._functions = then, Clocks(), functions

    def gave(self, value: Any, depth: int = _DEPTH) -> bool:
        """Tells whether a value is a reading, or a small nest of nothing else."""
        if isinstance(value, datetime.datetime):
            # Without a zone, it is one of where the machine is, or of UTC.
            zones = (None, datetime.UTC) if value.tzinfo is None else (value.tzinfo,)
            return any(self._is_time(value.replace(tzinfo=one).timestamp()) for one in zones)
        if type(value) is float:
            return self._is_time(value) or self._is_monotonic(value)
        if type(value) is int:
            # Of time.time_ns: no count comes to that.
            return self._is_time(value // _NANOSECONDS)
        if depth == 0 or not isinstance(value, NESTS) or not 0 < len(value) <= _MANY:
            return False
        items = value.values() if isinstance(value, dict) else value
        return all(self.gave(one, depth - 1) for one in items)

    def _is_time(self, seconds: float) -> bool:
        return self._then.seconds - _EARLIER <= seconds <= self._now.seconds

    def _is_monotonic(self, seconds: float) -> bool:
        # Sums and counts come to such numbers, too: no clock is read to a few digits only, and
        # one is called.
        if round(seconds, _DIGITS) == seconds or not self._reads_monotonic:
            return False
        clocks = zip(self._then.monotonic, self._now.monotonic, strict=True)
        return any(then <= seconds <= now for then, now in clocks)

    @cached_property
    def _reads_monotonic(self) -> bool:
        return any(_names_clock(one) for one in self._functions)


def _names_clock(function: types.FunctionType) -> bool:
    """Tells whether a function calls such a clock, by its own name or by another."""
    words = words_in(function.__code__)
    known = (function.__globals__.get(word) for word in words)
    return bool(_NAMES & set(words)) or any(map(_is_clock, known))


def _is_clock(value: Any) -> bool:
    # By identity: what another object makes of being compared is its own.
    return any(value is clock for clock in _MONOTONIC)
