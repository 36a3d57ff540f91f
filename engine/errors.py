"""The errors and warnings of a run, and the warning that points at the user's line."""

from __future__ import annotations

import inspect
import warnings

from .shown import harmless

# Between a line of the user's and ours there may be a context manager's frame.
_BETWEEN = ("crosstrain.engine", "crosstrain.backends", "contextlib")


class EmptyData(ValueError):
    """The data has nothing to give: a list of length 0, an iterator that is used up."""


class DataUsedUp(RuntimeError):
    """The data ended before the run did, and iterating it anew gives nothing."""


class ResumeWarning(UserWarning):
    """A run goes on under conditions that may change its bits."""


class ResumeError(ValueError):
    """A resumed run was found not to go on as the run that was saved: what differs, and why.

    Args:
        message: that. It may name what is in a file, as others called it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(harmless(message))


class RankFailed(RuntimeError):
    """Another rank has ended the run, is missing, or does not do what this one does.

    Args:
        message: what happened, where, and what to do.
        rank: the rank that it happened on, or that is missing; None if it is not one alone.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line outside of this package that has led here.

    Python 3.12's `skip_file_prefixes` would do it; 3.11 has none.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(harmless(message), category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _BETWEEN)
