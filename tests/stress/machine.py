"""One of the machines of `two_machines`: it forks off itself each torchrun that it is to start.

It is the first process of its namespace, and has torch imported once for all of them and their
ranks. Its input is orders in JSON, one a line: what to start, or null, which ends all that there is
on the machine. It answers each with a line, and tells by another the exit code of a torchrun. With
its input it ends, and all that it has started with it.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import forked


def main(name: str) -> None:
    """Does as it is told.

    Args:
        name: its host name.
    """
    socket.sethostname(name)
    for module in forked.PRELOADED:
        importlib.import_module(module)
    importlib.import_module("torch").set_num_threads(1)
    started = None
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.buffer.readline()
            if not line:
                os._exit(0)
            order = json.loads(line)
            started = _stop() if order is None else _start(order)
            print("done", flush=True)
        # What torchrun leaves behind comes to this process, too.
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == started:
                    print(os.waitstatus_to_exitcode(ended[1]), flush=True)


def _start(order: dict[str, object]) -> int:
    """Starts what an order says, its output in the order's file; returns the process id."""
    process = os.fork()
    if process == 0:
        for stream in (1, 2):
            os.dup2(os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        forked.become({**order, "cwd": os.getcwd(), "at_once": False, "new_session": True})
    return process


def _stop() -> None:
    """Ends all that there is on the machine."""
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    main(sys.argv[1])
