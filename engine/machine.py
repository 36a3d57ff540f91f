"""This machine and its processes, as /proc tells of them: which have ended and which live."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path


def machine() -> str:
    """Names this machine since it was booted, and its namespace of process ids."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        # Without /proc nobody is known to have ended, or taken for one of its own machine.
        return secrets.token_hex(16)
    return f"{socket.gethostname()}/{boot}/{space}"


def began(pid: int) -> str:
    """Returns when a process began; empty if there is none, or it is only not yet waited for."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
    except OSError:
        return ""
    return "" if told[0] in "ZX" else told[19]
