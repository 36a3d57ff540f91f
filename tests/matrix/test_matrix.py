"""`crosstrain matrix`, run as the user runs it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from forked import run as run_forked
from report_samples import sample_run

from crosstrain.ci.matrix.report import Report
from crosstrain.ci.matrix.run_all import MARK
from crosstrain.ci.trials.processes import marked

Result = subprocess.CompletedProcess[str]

# Not the one of a run by hand in the same folder.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != MARK}


def matrix(script: Path, *arguments: str | Path, cwd: Path) -> Result:
    return run_forked([script, "matrix", *arguments], cwd=cwd, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def played(console_script: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A matrix of two scenarios and two backends, one of which has no loss scaling."""
    folder = tmp_path_factory.mktemp("matrix")
    arguments = ("--backends", "cpu,cpu:fp16", "--scenarios", "overflow,middle", "--name", "here")
    arguments = (*arguments, "--jobs", "2")
    result = matrix(console_script, *arguments, "--report", folder / "out", cwd=folder)
    return result, folder / "out"


def test_every_cell_passes_or_says_why_not(played: tuple[Result, Path]) -> None:
    result, folder = played
    assert result.returncode == 0, result.stdout + result.stderr
    report = Report.read(folder)
    (run,) = report.runs
    assert (run.name, run.interrupted, run.target) == ("here", False, None)
    assert run.backends == ("cpu", "cpu:fp16")
    # In the order of all scenarios, and not of the command line.
    assert list(run.scenarios) == ["middle", "overflow"]
    statuses = {(one.spec, one.scenario): one.status for one in run.outcomes}
    assert statuses == {
        ("cpu", "middle"): "passed",
        ("cpu:fp16", "middle"): "passed",
        ("cpu", "overflow"): "skipped",
        ("cpu:fp16", "overflow"): "passed",
    }
    middle = run.outcome("cpu:fp16", "middle")
    assert middle is not None
    assert middle.losses == middle.resumed_losses
    assert len(middle.losses) > 4
    assert run.versions["torch"]
    assert run.devices["cpu"]
    assert run.machine["python"]


def test_a_log_has_a_line_for_each_cell(played: tuple[Result, Path]) -> None:
    result, _ = played
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert [line[:5] for line in lines] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert "loss_scaling" in skipped
    assert "3 passed, 1 skipped" in result.stdout
    assert "\x1b" not in result.stdout


def test_all_three_reports_are_written(played: tuple[Result, Path]) -> None:
    _, folder = played
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "index.html",
        "junit.xml",
        "matrix.json",
    ]
    assert ElementTree.parse(folder / "junit.xml").getroot().get("tests") == "4"
    assert "<svg" in (folder / "index.html").read_text()


def test_a_terminal_shows_the_matrix_while_it_fills(console_script: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    command = [console_script, "matrix", "--backends", "cpu", "--scenarios", "overflow"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path
    ) as process:
        os.close(theirs)
        shown = b""
        # Reading a terminal whose other end is closed is an error on Linux.
        try:
            while some := os.read(ours, 65536):
                shown += some
        except OSError:
            pass
    os.close(ours)
    text = shown.decode()
    assert process.returncode == 0, text
    assert "0/1 cells" in text
    assert "1 running" in text
    assert "elapsed" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backends", "cpu:bf61"), "Did you mean 'cpu:bf16'?"),
        (("--backends", "cudaa"), "Did you mean 'cuda'?"),
        (("--require", "cudaa"), "Did you mean 'cuda'?"),
        (("--backends", "null"), "'null' cannot be a column"),
        (("--backends", "cpu,"), "empty entry"),
        (("--scenarios", "midle"), "Did you mean 'middle'?"),
        (("--target", "training.py"), "'training.py' is no target"),
        (("--target", "nowhere.py:build"), "There is no file 'nowhere.py'"),
        (("--jobs", "0"), "'0' is not a whole number of at least 1"),
        (("--timeout", "nan"), "'nan' is not a number above 0"),
        (("--merge", "nowhere", "--report", "out"), "nowhere"),
        (("--merge", "nowhere"), "--merge needs --report DIR"),
        (("--merge", "nowhere", "--report", "out", "--backends", "cpu"), "--merge runs nothing"),
    ],
)
def test_a_wrong_argument_is_named(
    console_script: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = matrix(console_script, *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def absent(console_script: Path) -> str:
    """A backend that cannot run here."""
    listed = run_forked([console_script, "doctor", "--json"])
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)["backends"]
    specs: list[str] = [one["spec"] for one in found if not one["ok"]]
    if not specs:
        pytest.skip("every backend can run here, so none is missing")
    return specs[0]


def test_a_backend_that_cannot_run_is_refused_with_its_reason(
    console_script: Path, tmp_path: Path, absent: str
) -> None:
    result = matrix(console_script, "--backends", f"cpu,{absent}", cwd=tmp_path)
    assert result.returncode == 2
    assert f"'{absent}' is not available" in result.stderr
    assert "Remedy" in result.stderr


def test_a_required_backend_that_is_missing_fails_and_is_reported(
    console_script: Path, tmp_path: Path, absent: str
) -> None:
    arguments = ("--backends", "cpu", "--require", absent, "--scenarios", "overflow")
    result = matrix(console_script, *arguments, "--report", "out", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{absent} is required and missing" in result.stdout
    (run,) = Report.read(tmp_path / "out").runs
    assert run.missing() == [absent]
    # The others have run all the same.
    cell = run.outcome("cpu", "overflow")
    assert cell is not None
    assert cell.status == "skipped"


def test_a_target_that_cannot_be_imported_fails(console_script: Path, tmp_path: Path) -> None:
    arguments = ("--backends", "cpu", "--scenarios", "middle", "--target", "nowhere:build")
    result = matrix(console_script, *arguments, "--report", "out", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    (run,) = Report.read(tmp_path / "out").runs
    assert [one.status for one in run.outcomes] == ["error"]
    assert "nowhere" in run.outcomes[0].reason
    assert list((tmp_path / "out" / "cells").glob("*/*"))


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    children = {
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*")
        for child in (task / "children").read_text().split()
    }
    return children.union(*map(descendants, children))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_kills_the_cells_and_writes_the_report(
    console_script: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [console_script, "matrix", "--backends", "cpu", "--scenarios", "middle,overflow"]
    command = [*command, "--jobs", "2", "--report", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        # The skipped cell ends first; the other has by then started a process of its own.
        assert process.stdout is not None
        assert "skipped" in process.stdout.readline()
        while len(cells := descendants(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    assert not cells & set(marked(f"{MARK}="))
    assert "1 skipped, 1 not run" in out
    (run,) = Report.read(tmp_path / "out").runs
    assert run.interrupted
    assert [one.scenario for one in run.outcomes] == ["overflow"]
    assert "Interrupted" in (tmp_path / "out" / "index.html").read_text()


def test_reports_merge_into_one(console_script: Path, tmp_path: Path) -> None:
    Report((sample_run("one"),)).write(tmp_path / "one")
    Report((sample_run("two", ["cuda"]),)).write(tmp_path / "two")
    arguments = ("--merge", "one", "two/matrix.json", "--report", "all")
    result = matrix(console_script, *arguments, "--require", "cpu,cuda", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [run.name for run in Report.read(tmp_path / "all").runs] == ["one", "two"]
    assert (tmp_path / "all" / "index.html").is_file()
    assert (tmp_path / "all" / "junit.xml").is_file()

    # A runner that was offline is missed here, where all reports come together.
    result = matrix(console_script, *arguments, "--require", "cpu,tpu", cwd=tmp_path)
    assert result.returncode == 1
    assert "ran on no machine: tpu" in result.stderr


def test_merging_a_broken_report_fails(console_script: Path, tmp_path: Path) -> None:
    Report((sample_run("one", failed={("cpu", "middle")}),)).write(tmp_path / "one")
    result = matrix(console_script, "--merge", "one", "--report", "all", cwd=tmp_path)
    assert result.returncode == 1
    assert "one: middle on cpu: failed" in result.stdout
    assert (tmp_path / "all" / "index.html").is_file()

    # What has not run is not known to pass.
    Report((sample_run("two", not_run={("cpu", "middle")}),)).write(tmp_path / "two")
    result = matrix(console_script, "--merge", "two", "--report", "all", cwd=tmp_path)
    assert result.returncode == 1
    assert "not every cell has run: two" in result.stderr
