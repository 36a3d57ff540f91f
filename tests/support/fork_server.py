"""A process that has torch imported and forks off children that run a function, to be killed.

Started as a program it serves; imported it offers `ForkServer`. Importing torch takes seconds and a
fork milliseconds, so hundreds of real processes can be killed in one test.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

SUPPORT = Path(__file__).resolve().parent


class ForkServer:
    """Runs functions of test modules in children of a fresh process.

    Args:
        *preload: modules that the process imports before it forks.
    """

    def __init__(self, *preload: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=SUPPORT,
        )

    def start(self, function: Callable[..., object], *args: Any) -> int:
        """Forks a child that calls a function of a module in `tests` and exits.

        Args:
            function: a module's function; it is found again by its name.
            *args: what JSON can hold.

        Returns:
            The child's process id.
        """
        file = Path(sys.modules[function.__module__].__file__ or "")
        place = {"folder": str(file.parent), "module": file.stem, "name": function.__name__}
        return int(self._ask({**place, "args": args}))

    def wait(self, pid: int) -> int:
        """Waits for a child; returns its exit code, or minus the signal that killed it."""
        return int(self._ask({"wait": pid}))

    def run(self, function: Callable[..., object], *args: Any) -> int:
        """Starts and waits."""
        return self.wait(self.start(function, *args))

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the fork server has died"
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    import torch

    if "crosstrain.backends" in sys.modules:
        # Reads what is installed, which no child need do once more.
        sys.modules["crosstrain.backends"].names()
    # Of what is there now, a child's collections need copy no pages.
    gc.collect()
    gc.freeze()
    # Threads that the parent of a fork had are not there in the child.
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _run_child(request)
        print(pid, flush=True)


def _run_child(request: dict[str, Any]) -> None:
    # Neither may a child read the next request, nor its output be taken for an answer.
    sys.stdin.close()
    os.dup2(2, 1)
    code = 1
    try:
        import torch

        # Makes anew the pool of threads that a fork loses. A first backward pass would do it in the
        # threads of several devices at once, which torch does not stand.
        torch.set_num_threads(1)
        sys.path.insert(0, request["folder"])
        getattr(importlib.import_module(request["module"]), request["name"])(*request["args"])
        code = 0
    except BaseException:  # noqa: BLE001 - a child has nobody to raise to
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
