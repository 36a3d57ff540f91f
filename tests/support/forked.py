"""Python programs that need not import torch: each is forked off a process that has done it.

A test that starts twenty programs spends most of its time importing torch. `ForkedPopen` is
`subprocess.Popen`, and starts `python -m MODULE` and `python FILE.py` as children of this process
that are forked off another, the zygote, which has torch and the engine imported and has done
nothing else. They have arguments, environment, folder, session, standard streams and process id of
their own, and end as interpreters do; what they share is the seed of Python's hashes.

Started as a program it is the zygote.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed",
    "torch.utils.data",
    "torch._dynamo",
    "crosstrain.ci.trials.life",
    "crosstrain.engine.storage.torch_parts",
)
_SUBREAPER = 36  # of prctl
# A test may put `ForkedPopen` in its place.
_Popen = subprocess.Popen


class _Zygote:
    """The process that has torch imported; it ends with this one."""

    def __init__(self) -> None:
        self._line, other = socket.socketpair()
        with other:
            number = str(other.fileno())
            self._process = _Popen(
                [sys.executable, __file__, number],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._one_at_a_time = threading.Lock()

    def fork(self, request: dict[str, Any], streams: Sequence[int]) -> int:
        """Has it fork off a child of this process; returns the child's id."""
        libc = ctypes.CDLL(None)
        with self._one_at_a_time:
            data = json.dumps(request).encode()
            # Whose parent ends is given to the nearest such ancestor.
            libc.prctl(_SUBREAPER, 1)
            socket.send_fds(self._line, [len(data).to_bytes(8, "little")], streams)
            self._line.sendall(data)
            answer = self._line.recv(8)
            libc.prctl(_SUBREAPER, 0)
        assert answer, "the process that forks others has died"
        return int.from_bytes(answer, "little")


@functools.cache
def _zygote(of: int) -> _Zygote:
    return _Zygote()


class ForkedPopen(subprocess.Popen[Any]):
    """A process as `subprocess.Popen` starts it; of a Python program, a fork."""

    def _execute_child(self, *told: Any) -> None:
        words, cwd, env, new_session = list(told[0]), told[5], told[6], told[21]
        is_file = len(words) > 1 and str(words[1]).endswith(".py")
        if words[0] != sys.executable or not (is_file or words[1] == "-m"):
            super()._execute_child(*told)  # type: ignore[misc]
            return
        given, taken, errors = told[10], told[13], told[15]
        request = {
            "argv": [str(word) for word in words[1:]],
            "env": dict(os.environ if env is None else env),
            "cwd": os.path.abspath(cwd or "."),
            "new_session": bool(new_session),
        }
        streams = [
            own if found == -1 else found for own, found in enumerate((given, taken, errors))
        ]
        self.pid = _zygote(os.getpid()).fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(*told[10:16])  # type: ignore[attr-defined]


def _serve(line: socket.socket) -> dict[str, Any]:
    """Forks when it is asked to; returns, in a child, what that one shall be."""
    while True:
        header, streams, _, _ = socket.recv_fds(line, 8, 3)
        if not header:
            sys.exit()
        size, data = int.from_bytes(header, "little"), b""
        while len(data) < size:
            data += line.recv(size - len(data))
        told, tells = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child:
                os.write(tells, child.to_bytes(8, "little"))
                os._exit(0)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.closerange(3, 100)
            request: dict[str, Any] = json.loads(data)
            return request
        os.waitpid(middle, 0)
        line.sendall(os.read(told, 8))
        for descriptor in (told, tells, *streams):
            os.close(descriptor)


def _become(request: dict[str, Any]) -> None:
    """Runs a program as if the interpreter had just been started with it, and ends."""
    import torch

    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115 - they stay open
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    # Makes anew the pool of threads that a fork loses, ahead of the first backward pass.
    torch.set_num_threads(1)
    _end(_exit_code(request["argv"], request["cwd"]))


def _exit_code(argv: list[str], folder: str) -> int:
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.path[0] = folder
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path[0] = str(Path(argv[0]).resolve().parent)
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _end(code: int) -> None:
    """Ends as the interpreter does, but for what it then takes apart: in torch, a second's work."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    import importlib

    for _name in PRELOADED:
        importlib.import_module(_name)
    importlib.import_module("torch").set_num_threads(1)
    # A collection would copy the pages of all that it looks at.
    gc.collect()
    gc.freeze()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
