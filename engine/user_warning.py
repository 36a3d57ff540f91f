"""warn_user: a warning that points at the user's line, and not into this package."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["warn_user"]

# Between a line of the user's and ours there may be a context manager's frame.
_BETWEEN = ("crosstrain.engine", "crosstrain.backends", "contextlib")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line outside of this package that has led here.

    Python 3.12's `skip_file_prefixes` would do it; 3.11 has none.

    Args:
        message: what is wrong, and what to do.
        category: of the warning.
    """
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _BETWEEN)
