"""Files without a name, for what is on its way to or from a store: the system frees them."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import IO

from crosstrain.engine.storage.atomic import free_space


def temporary_file(needed: int) -> IO[bytes]:
    """Opens a file without a name among the temporary ones (`TMPDIR`), if it has room."""
    folder = Path(tempfile.gettempdir())
    free = free_space(folder)
    if free is not None and free < needed:
        raise OSError(
            errno.ENOSPC,
            f"ENOSPC: it takes {needed:,} bytes on its way and {free:,} are free in {folder}; free "
            "some there, or set TMPDIR to another folder",
        )
    return tempfile.TemporaryFile(dir=folder)
