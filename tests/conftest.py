"""What every test may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Here and in the processes that tests start, before torch is imported. The networks are too small
# for several threads, which on a busy machine spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The machine that runs the tests may be slow or busy: no test depends on time.
settings.register_profile("crosstrain", deadline=None)
settings.load_profile("crosstrain")


def pytest_sessionstart() -> None:
    """Starts XLA's CPU device, where the tests run with it, before the first backward pass.

    torch counts the devices of a process at that one, and none reaches one that starts later.
    """
    if os.environ.get("PJRT_DEVICE") == "CPU":
        import on_xla

        from crosstrain import backends

        if on_xla.HERE:
            backends.get("xla").open().close()


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
