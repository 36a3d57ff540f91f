"""What a killed process leaves half written: how it is named, and how it is removed."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Final

#: How the names of unfinished files, and of folders of unfinished parts, begin and end.
FILES: Final = (".crosstrain-", ".tmp")
PARTS: Final = (".crosstrain-", ".parts")
#: What stands before the name of a checkpoint that another is just taking the place of.
ASIDE: Final = ".crosstrain-aside-"


def new_name(kind: tuple[str, str]) -> str:
    """Returns a name that nothing has, for something unfinished: of `FILES` or `PARTS`."""
    return secrets.token_hex(8).join(kind)


def is_leftover(name: str, kind: tuple[str, str]) -> bool:
    """Tells whether a name is one of something unfinished."""
    return name.startswith(kind[0]) and name.endswith(kind[1])


def remove_leftovers(folder: Path) -> int:
    """Removes what killed processes have left, and puts back what was set aside for a moment.

    Only call it while holding the folder's lock: what another process is writing looks the same.
    Returns how many it has removed.
    """
    removed = 0
    for entry in sorted(folder.iterdir()):
        home = folder / entry.name.removeprefix(ASIDE)
        aside = entry.name.startswith(ASIDE)
        if aside and not home.exists():
            os.rename(entry, home)
        elif aside or is_leftover(entry.name, FILES) or is_leftover(entry.name, PARTS):
            _remove(entry)
            removed += 1
    return removed


def _remove(path: Path) -> None:
    """Removes a file, or a folder with all in it; of a link, the link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
