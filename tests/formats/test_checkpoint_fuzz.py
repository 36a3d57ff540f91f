"""Whatever a file holds, loading it ends in its own state or in a documented error, soon.

The long form is `python tests/support/fuzzing_program.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fork_server import ForkServer
from fuzzing_program import fuzz


@pytest.mark.slow
def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with ForkServer("fuzzing_program") as server:
        code = server.run(fuzz, str(tmp_path), 20, str(report))
    assert code == 0, "the process that loads the files has died"
    found = json.loads(report.read_text())
    print(found["count"], found["outcomes"], f"slowest {found['slowest']:.2f} s")
    assert not found["wrong"], "\n".join(found["wrong"])
    assert found["count"] >= 600
    assert set(found["outcomes"]) <= {
        "loaded",
        "found",
        "passed over",
        "CheckpointCorrupt",
        "CheckpointUnsafe",
        "CheckpointMismatch",
        # An object that, read back, holds something else than the file says.
        "ResumeError",
    }
