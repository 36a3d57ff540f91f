"""On what kind of file system an open file or folder is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

# File systems of one machine, whose folders its kernel locks for all of its processes.
_OF_THIS_MACHINE: Final = re.compile("bcachefs|btrfs|ext[234]|f2fs|jfs|overlay|ramfs|tmpfs|xfs|zfs")


def is_of_this_machine(descriptor: int) -> bool:
    """Tells whether a file or folder is on a file system that only this machine's processes see.

    By the table of what is mounted; false where there is none, or it does not tell.
    """
    try:
        told = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
        mounted = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return False
    number = re.search(r"^mnt_id:\s*(\d+)$", told, re.MULTILINE)
    found = number and re.search(rf"^{number[1]} .* - (\S+) ", mounted, re.MULTILINE)
    return bool(found and _OF_THIS_MACHINE.fullmatch(found[1]))
