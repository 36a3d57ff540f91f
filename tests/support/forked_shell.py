"""Python programs that a shell script starts, forked as those are that tests start (see `forked`).

`programs` makes a folder to put first on a script's path. Its `python`, `crosstrain`, `pytest` and
`torchrun` ask the test that runs the script for a forked process, stand in for it (they pass its
streams and signals on, end as it does, and it is killed where they are), and save the import of
torch. What cannot be forked, such as `python -c`, is the real interpreter.

Started as a program, by one of these, it is such a stand-in.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MODULES = {"pytest": "pytest", "torchrun": "torch.distributed.run"}
_NUMBER = 8  # bytes of a number on the line


@contextlib.contextmanager
def programs(folder: Path) -> Iterator[Path]:
    """Makes the folder, whose programs work until the context ends.

    Args:
        folder: an empty one, of a short path: a socket is in it.
    """
    place = Path(sys.executable).parent
    commands = {"python": [], "crosstrain": [place / "crosstrain"]}
    commands |= {name: ["-m", module] for name, module in _MODULES.items()}
    address = folder / "line"
    for name, first in commands.items():
        words = [sys.executable, "-IS", __file__, address, *first]
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        server = threading.Thread(target=_serve, args=[listener], daemon=True)
        server.start()
        yield folder
        listener.shutdown(socket.SHUT_RDWR)
        server.join()


def _serve(listener: socket.socket) -> None:
    """Starts what is asked for, and tells how it ended, until nobody can ask any more."""
    running: dict[int, tuple[socket.socket, Any]] = {}
    while True:
        lines = {line.fileno(): ended for ended, (line, _) in running.items()}
        ready, _, _ = select.select([listener.fileno(), *running, *lines], [], [])
        # These first: what comes next is not to meet a process that its script has killed.
        for ended in {lines.get(number, number) for number in ready} - {listener.fileno()}:
            line, process = running.pop(ended)
            if ended not in ready:
                process.kill()
            code = process.wait()
            with line, contextlib.suppress(OSError):
                line.sendall(code.to_bytes(_NUMBER, "little", signed=True))
            os.close(ended)
        if listener.fileno() in ready:
            try:
                line, _ = listener.accept()
            except OSError:
                break
            process = _start(line)
            running[os.pidfd_open(process.pid)] = (line, process)
    for line, process in running.values():
        process.kill()
        process.wait()
        line.close()


def _start(line: socket.socket) -> Any:
    """Starts the process that a stand-in asks for."""
    from forked import ForkedPopen

    header, streams, _, _ = socket.recv_fds(line, _NUMBER, 3)
    with line.makefile("rb") as reader:
        request = json.loads(reader.read(int.from_bytes(header, "little")))
    given, taken, errors = streams
    words, env, cwd = request["words"], request["env"], request["cwd"]
    process = ForkedPopen(words, stdin=given, stdout=taken, stderr=errors, env=env, cwd=cwd)
    for stream in streams:
        os.close(stream)
    line.sendall(process.pid.to_bytes(_NUMBER, "little"))
    return process


def _stand_in(address: str, words: list[str]) -> int:
    """Has the words run as a process; returns how it ended, as `subprocess` tells it."""
    if words[0].endswith("/crosstrain"):
        command = words
    else:
        command = [sys.executable, *words]
        if words[0] != "-m" and not words[0].endswith(".py"):
            os.execv(command[0], command)
    told = {"words": command, "env": dict(os.environ), "cwd": os.getcwd()}
    data = json.dumps(told).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [len(data).to_bytes(_NUMBER, "little")], [0, 1, 2])
        line.sendall(data)
        process = int.from_bytes(line.recv(_NUMBER), "little")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda which, _: os.kill(process, which))
        return int.from_bytes(line.recv(_NUMBER), "little", signed=True)


if __name__ == "__main__":
    _code = _stand_in(sys.argv[1], sys.argv[2:])
    if _code < 0:
        signal.signal(-_code, signal.SIG_DFL)
        os.kill(os.getpid(), -_code)
    sys.exit(_code)
