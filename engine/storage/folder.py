"""What is in a folder of checkpoints, and how it is named, on a disk as in a store."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """Something in a folder that is named like a checkpoint.

    In a store, what stands for a folder is one. What is neither file nor folder cannot be a
    checkpoint. `modified_ns` is 0 if it is not told; `lost` says why nothing is behind the name.
    """

    name: str
    is_file: bool
    is_folder: bool
    modified_ns: int = 0
    lost: str | None = None


def check_name(name: str) -> None:
    """Raises ValueError if a checkpoint cannot have a name, as a file in a folder, and be found."""
    why = ""
    if not name:
        why = "it is empty"
    elif "/" in name or os.sep in name:
        why = "it leads into another folder: give that to DiskSaver, and the name without it"
    elif "\0" in name:
        why = "no file system has names with that character"
    elif name.startswith("."):
        why = "what begins with a dot is hidden, and no start would find it"
    if why:
        raise ValueError(
            f"{name!r} cannot be the name of a checkpoint: {why}. It is made of filename_prefix, "
            "filename_pattern and the names in to_save"
        )
