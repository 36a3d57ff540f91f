"""Python programs that need not import torch: each is forked off a process that has done it.

A test that starts twenty programs spends most of its time importing torch. `ForkedPopen` is
`subprocess.Popen`, `run` is `subprocess.run`, and they start `python -m MODULE`, `python FILE.py`
and `crosstrain` as children of this process that are forked off another, the zygote, which has
torch and the engine imported and has done nothing else. They have arguments, environment, folder,
session, standard streams and process id of their own, and end as interpreters do; what they share
is the seed of Python's hashes. Those that start others, such as torchrun, fork a zygote of their
own first, so what they start is forked, too. /proc shows the environment of each.

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
import tempfile
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.data",
    "torch._dynamo",
    "crosstrain.ci.trials.child",
    "crosstrain.engine.parts.torch_parts",
)
# What starts programs itself.
_COMMAND = str(Path(sys.executable).with_name("crosstrain"))
_STARTERS = (
    "torch.distributed.run",
    "pytest",
    "crosstrain.ci.cli",
    "crosstrain.ci.matrix.run_one",
)
_SUBREAPER = 36  # of prctl
# Room for the environment of a program, where /proc looks for it: that of the zygote.
ROOM = {"CROSSTRAIN_TEST_ROOM": "-" * 2**15}
# A test may put `ForkedPopen` in its place.
_Popen = subprocess.Popen
_execute_child: Any = _Popen._execute_child  # type: ignore[attr-defined]


class _Zygote:
    """The process that has torch imported; it ends with this one, to which the line is."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
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
    del of  # this process: one that is forked off it has none yet
    line, other = socket.socketpair()
    with other:
        number = str(other.fileno())
        _Popen(
            [sys.executable, __file__, number],
            pass_fds=[other.fileno()],
            env={**os.environ, **ROOM},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _Zygote(line)


class ForkedPopen(subprocess.Popen[Any]):
    """A process as `subprocess.Popen` starts it; of a Python program, a fork."""

    def _execute_child(self, *told: Any) -> None:
        words = list(map(str, told[0]))
        at_once = words[1:2] == ["-u"]
        argv = words if words[0] == _COMMAND else words[1 + at_once :]
        # Of what is given as text, what pytest-xdist starts its workers by.
        is_program = bool(argv) and (
            argv[0].endswith(".py")
            or argv[0] in ("-m", _COMMAND)
            or (argv[0] == "-c" and "sys.stdin" in argv[1])
        )
        if words[0] not in (sys.executable, _COMMAND) or not is_program:
            _execute_child(self, *told)
            return
        cwd, env, new_session = told[5], told[6], told[21]
        given, taken, errors = told[10], told[13], told[15]
        request = {
            "argv": argv,
            "at_once": at_once,
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


def prepare() -> None:
    """Starts the process that forks others now, with the environment as it is."""
    _zygote(os.getpid())


def run(
    command: Sequence[Any], timeout: float = 280, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, forked; returns what it printed, and its exit code.

    Args:
        command: the program and its arguments.
        timeout: the seconds that it may take.
        **options: further ones of `subprocess.Popen`.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    with ForkedPopen([*map(str, command)], text=True, **{**pipes, **options}) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _serve(line: socket.socket) -> dict[str, Any]:
    """Forks when it is asked to; returns, in a child, what that one shall be."""
    while True:
        header, streams, _, _ = socket.recv_fds(line, 8, 3)
        if not header:
            os._exit(0)  # an orderly end would take apart all of torch
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


def become(request: dict[str, Any]) -> None:
    """Runs a program as if the interpreter had just been started with it, and ends."""
    import torch

    if request["new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    _show_environment()
    tempfile.tempdir = None  # that of the TMPDIR before
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A child of this process has others in their place, and shall not close those.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", 1 if request["at_once"] else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    # Makes anew the pool of threads that a fork loses, ahead of the first backward pass.
    torch.set_num_threads(1)
    first, *others = request["argv"]
    if first in (_COMMAND, "-c") or (first == "-m" and others[0] in _STARTERS):
        _fork_own_children()
    _end(_exit_code(request["argv"], request["cwd"]))


def _show_environment() -> None:
    """Puts the environment where /proc shows it: where it lay when the interpreter was started."""
    words = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    start, end = map(int, words[47:49])  # its fields 50 and 51
    variables = "".join(f"{name}={value}\0" for name, value in os.environ.items())
    data = os.fsencode(variables).ljust(end - start, b"\0")
    assert len(data) == end - start, "the environment is larger than a forked program's may be"
    # Of the C library's variables none lies there any more: all have been set anew.
    ctypes.memmove(start, data, len(data))


def _fork_own_children() -> None:
    """Has the processes that this one starts forked off one that is like it, and does nothing."""
    line, other = socket.socketpair()
    if os.fork() == 0:
        line.close()
        for stream in range(3):
            # Who reads what this process prints is not to wait for the end of that one.
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        # It ends with the line, and not before.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        become(_serve(other))
    other.close()
    zygote = _Zygote(line)
    globals()["_zygote"] = lambda of: zygote
    subprocess.Popen._execute_child = ForkedPopen._execute_child  # type: ignore[attr-defined]


def _exit_code(argv: list[str], folder: str) -> int:
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.path[0] = folder
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        elif argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            sys.path[0] = ""
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(argv[1], main.__dict__)
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
    # Reads what is installed, which no child need do once more.
    importlib.import_module("crosstrain.backends").names()
    importlib.import_module("torch").set_num_threads(1)
    # A collection would copy the pages of all that it looks at.
    gc.collect()
    gc.freeze()
    become(_serve(socket.socket(fileno=int(sys.argv[1]))))
