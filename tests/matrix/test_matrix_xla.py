"""`crosstrain matrix` on XLA's CPU device, and its report merged with another machine's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from on_xla import needs_xla
from report_samples import sample_run

from crosstrain.ci.matrix.report import Report


@needs_xla
@pytest.mark.slow
def test_xla_passes_and_merges(console_script: Path, tmp_path: Path) -> None:
    def matrix(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [console_script, "matrix", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )

    # A save that overlaps with the training once asked XLA's tensors for what they do not have.
    arguments = ("--require", "xla", "--scenarios", "background", "--report", "xla")
    result = matrix(*arguments, "--name", "xla")
    assert result.returncode == 0, result.stdout + result.stderr
    Report((sample_run("other"),)).write(tmp_path / "other")
    result = matrix("--merge", "other", "xla", "--require", "cpu,xla", "--report", "all")
    assert result.returncode == 0, result.stdout + result.stderr
    merged = Report.read(tmp_path / "all")
    assert [run.name for run in merged.runs] == ["other", "xla"]
    outcome = merged.runs[1].outcome("xla", "background")
    assert outcome is not None
    assert outcome.losses == outcome.resumed_losses
    assert outcome.versions["torch_xla"]
