"""Files without a name, for what is on its way to or from a store: the system frees them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

from .atomic import check_free_space
from .locations import StorePath

__all__ = ["unnamed"]


def unnamed(needed: int, place: StorePath) -> IO[bytes]:
    """Opens a file without a name among the temporary ones (`TMPDIR`).

    Args:
        needed: how many bytes it is to take at most.
        place: what it is of, in the store.

    Raises:
        CheckpointWriteError: if there is no room for it.
    """
    folder = Path(tempfile.gettempdir())
    check_free_space(folder / place.name, needed, f"{place} is staged there; see TMPDIR. ")
    return tempfile.TemporaryFile(dir=folder)
