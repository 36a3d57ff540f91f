"""This machine and its processes, as /proc tells of them: which have ended and which live.

And what numbers a process has of its own: no script gives them to it.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Final

# By these variables torchrun and others tell a process how to reach the rest.
_PORTS: Final = ("MASTER_PORT", "TORCHELASTIC_AGENT_PORT")


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


def is_own_number(value: Any) -> bool:
    """Tells whether a number is one that each process has another of.

    That is its id, a port that it was told, or what one of its clocks has shown since it began.
    """
    if type(value) is int and value < 1 << 32:
        ports = (os.environ.get(name, "") for name in _PORTS)
        return value in (os.getpid(), os.getppid()) or str(value) in ports
    if type(value) not in (int, float):
        return False
    seconds = value if type(value) is float else value / 1e9
    age = _age()
    return any(0 <= clock() - seconds <= age for clock in (time.time, time.monotonic))


def _age() -> float:
    """Returns for how many seconds this process has been there; -1 if that is not known."""
    ticks = began(os.getpid())
    if not ticks:
        return -1
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
