"""Two machines whose cable is cut, and a store that has fallen silent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import two_machines
from torch import distributed

from crosstrain.engine.ranks.store import AskedStore

# Holds a store until its input ends; prints the port.
HOST = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_silent_store_is_given_up() -> None:
    """torch itself would wait: a stopped process keeps its connections, and answers nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        try:
            assert host.stdout is not None
            port = int(host.stdout.readline())
            module: Any = distributed
            store = AskedStore(module.TCPStore("127.0.0.1", port), 60)
            store.set("key", "text")
            assert store.get("key") == b"text"
            os.kill(host.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, host.pid, os.WSTOPPED)
            store.limit = 0.5
            with pytest.raises(distributed.DistNetworkError, match=r"not answered within 0\.5 s"):
                store.check(["key"])
            assert store.lost
            # The connection is blocked by the question before.
            with pytest.raises(distributed.DistNetworkError):
                store.get("key")
        finally:
            host.kill()


@pytest.mark.slow
def test_machine_cut_off_and_brought_back(tmp_path: Path) -> None:
    """Both ranks end within the timeout, and the next start ends with the undisturbed bits."""
    if reasons := two_machines.missing():
        pytest.skip(" ".join(reasons))
    command = [sys.executable, two_machines.__file__, "--iterations", "100"]
    done = forked.run(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 1 ended" in done.stdout
    assert done.stdout.endswith("Bit-identical; no rank hung.\n")
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert "crosstrain-" not in left.stdout
