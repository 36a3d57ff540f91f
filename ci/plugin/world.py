"""Tests in several processes: the mark `world(size)` of the pytest plugin.

The test's own process starts torchrun, in which each rank runs pytest on that one test. Fixtures
are made in the ranks only. What each rank says comes back in a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from crosstrain.ci.trials.processes import Child, torchrun

#: Where the ranks write what became of the test; set in their environment.
FOLDER = "CROSSTRAIN_PYTEST_WORLD"


def folder_of_rank() -> Path | None:
    """Returns where this process writes its report, if it is a rank of a test's world."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None


def world_size(item: pytest.Item) -> int:
    """Returns in how many processes a test runs, by its mark; 1 without one."""
    mark = item.get_closest_marker("world")
    if mark is None:
        return 1
    size: object = mark.args[0] if len(mark.args) == 1 else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or mark.kwargs:
        raise pytest.UsageError(
            f"{item.nodeid}: the mark world takes the number of processes, such as "
            f"pytest.mark.world(2); got {mark.args or dict(mark.kwargs) or 'nothing'}."
        )
    return size


def run_in_world(item: pytest.Item, spec: str, size: int) -> None:
    """Runs a test in a world of processes; passes if it passes in each."""
    with tempfile.TemporaryDirectory(prefix="crosstrain-world-") as folder:
        command = [*torchrun(size), "-m", "pytest", *_arguments(item, spec)]
        child = Child(command, folder=item.config.rootpath, variables={FOLDER: folder})
        try:
            text = child.text()
        finally:
            # Left early, by a time limit or Ctrl-C, or at its end.
            code = child.end()
        reports = [_read(Path(folder), rank) for rank in range(size)]
    failures = [
        f"Rank {rank} of {size}:\n{report['text']}"
        for rank, report in enumerate(reports)
        if report is not None and report["outcome"] == "failed"
    ]
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    lost = [str(rank) for rank, report in enumerate(reports) if report is None]
    if lost or code:
        pytest.fail(
            f"Ranks {', '.join(lost) or 'none'} of {size} did not come to an end; torchrun ended "
            f"with exit code {code}:\n{text}",
            pytrace=False,
        )
    skipped = [report["text"] for report in reports if report and report["outcome"] == "skipped"]
    if skipped:
        pytest.skip(f"Skipped by {len(skipped)} of {size} ranks: {skipped[0]}")


def _arguments(item: pytest.Item, spec: str) -> list[str]:
    config = item.config
    arguments = [item.nodeid, f"--backends={spec}", "--rootdir", str(config.rootpath)]
    arguments += ["-p", "no:cacheprovider", "--no-header", "-q"]
    if config.inipath is not None:
        arguments += ["-c", str(config.inipath)]
    if config.pluginmanager.hasplugin("xdist"):
        arguments += ["-n0"]
    return arguments


def _read(folder: Path, rank: int) -> dict[str, Any] | None:
    path = folder / f"{rank}.json"
    return json.loads(path.read_text()) if path.is_file() else None


class RankReports:
    """A plugin of the ranks: writes what became of the test for the process that started them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.environ.get('RANK', '0')}.json"
        self._outcome = "failed"
        self._text = "No test was found."

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst of set-up, test and tear-down."""
        if report.when == "setup" and report.passed:
            self._outcome, self._text = "passed", ""
        elif not report.passed:
            self._outcome, self._text = report.outcome, _reason(report)

    def pytest_sessionfinish(self) -> None:
        """Writes it."""
        beside = self._path.with_suffix(".part")
        beside.write_text(json.dumps({"outcome": self._outcome, "text": self._text}))
        beside.replace(self._path)


def _reason(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    sections = "".join(f"\n---- {name} ----\n{text}" for name, text in report.sections)
    return f"{report.longreprtext}{sections}"
