"""What every test may use."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest
from forked import ForkedPopen
from hypothesis import settings

# Here and in the processes that tests start, before torch is imported. The networks are too small
# for several threads, which on a busy machine spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machine that runs the tests may be slow or busy: no test depends on time.
settings.register_profile("crosstrain", deadline=None)
settings.load_profile("crosstrain")


# A shell that runs the tests in the background has them, and what they start, ignore it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a process forked off a test is at, where the test has run out of time: see below.
faulthandler.register(signal.SIGUSR2, file=os.fdopen(os.dup(2), "w"))


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer() -> Generator[None, object, object]:
    """Has the processes that a test has forked off print their stacks when it runs out of time.

    A loader's worker that hangs shows up as a test that waits for a batch, and nothing more. The
    handler above is inherited by what is forked; other programs are left alone.
    """
    made = yield
    fail = signal.getsignal(signal.SIGALRM)
    if callable(fail):

        def look_first(number: int, frame: object) -> None:
            # One may end meanwhile, and not every kernel lists them.
            with suppress(OSError):
                for child in Path("/proc/thread-self/children").read_text().split():
                    status = Path(f"/proc/{child}/status").read_text()
                    caught = int(status.split("SigCgt:")[1].split()[0], 16)
                    if caught >> (signal.SIGUSR2 - 1) & 1:
                        os.kill(int(child), signal.SIGUSR2)
            fail(number, frame)

        signal.signal(signal.SIGALRM, look_first)
    return made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that have slow tests: the last to end is then not one of these."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_sessionstart() -> None:
    """Starts XLA's CPU device, where the tests run with it, before the first backward pass.

    torch counts the devices of a process at that one, and none reaches one that starts later.
    """
    if os.environ.get("PJRT_DEVICE") == "CPU":
        import on_xla

        from crosstrain import backends

        if on_xla.HERE:
            backends.get("xla").open().close()


@pytest.fixture(scope="module")
def forked_programs() -> Generator[None]:
    """Has the Python programs that a module's tests start forked off one that knows torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", ForkedPopen)
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root folder of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def console_script() -> Path:
    """The installed `crosstrain` command of the interpreter that runs the tests."""
    script = Path(sys.executable).with_name("crosstrain")
    assert script.is_file(), (
        f"{script} is missing: install the package into this environment first, "
        "`python -m pip install -c constraints.txt -e '.[test]'`"
    )
    return script
