"""A store is asked again where that may help: after longer and longer pauses, and not for ever."""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from crosstrain.engine.shown import shown

_logger = logging.getLogger(__name__)

#: The environment's variable with the seconds for which a failing request is repeated.
PATIENCE: Final = "CROSSTRAIN_STORE_TIMEOUT"
_SECONDS: Final = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
# Asking again would give the same answer.
_FINAL: Final = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
    ImportError,
)
_FINAL_ERRNOS: Final = frozenset({errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT})
# It may be a request that was damaged on its way, or one that is wrong: worth another try or two.
_DOUBTFUL_TRIES: Final = 3
_FINAL_NAMES: Final = ("Credential", "ParamValidation", "Unauthorized", "Forbidden")

_T = TypeVar("_T")


def patience_seconds() -> float:
    """Returns for how many seconds a request that fails is repeated: CROSSTRAIN_STORE_TIMEOUT."""
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text) if text else _SECONDS
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{PATIENCE} should be a number of seconds above 0, such as 120: {text!r}")
    return seconds


class Patience:
    """Repeats what a store refuses or does not answer, with growing pauses, for a limited time.

    The pauses double, and vary by half, so that many processes do not come back at once.

    Args:
        seconds: so long after the first failure, the next one is final.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # Of its own: what a run draws from must not be moved by a store that is slow today.
        self._random = random.Random()

    def __call__(self, what: str, do: Callable[[], _T]) -> _T:
        """Returns what a function returns, called until it does, or raises its last error.

        Args:
            what: what it does, for the log; without credentials.
            do: the function; may be called again after any failure.
        """
        # Counted from the first failure on: a long upload that fails at its end is begun once more.
        ends: float | None = None
        pause, tries = _FIRST_PAUSE, 0
        while True:
            try:
                return do()
            except Exception as error:
                tries += 1
                ends = ends or time.monotonic() + self.seconds
                left = ends - time.monotonic()
                if left <= 0 or is_final(error) or (tries >= _DOUBTFUL_TRIES and _doubtful(error)):
                    raise
                # Its text may hold a URL with credentials.
                _logger.info(
                    "%s failed (%s) and is tried again.", shown(what), type(error).__name__
                )
            time.sleep(min(pause * self._random.uniform(0.5, 1.0), left))
            pause = min(2 * pause, _LONGEST_PAUSE)


def is_final(error: BaseException) -> bool:
    """Tells whether an error would come again however often one asked."""
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return True
    # The packages of stores have errors of their own, of which only the names are known here.
    named = any(part in type(error).__name__ for part in _FINAL_NAMES)
    return named or isinstance(error, _FINAL)


def _doubtful(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EINVAL
