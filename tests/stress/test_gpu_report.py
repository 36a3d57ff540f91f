"""`ci/gpu_report.sh`: its dry run on the CPU, and what it says where something is missing."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import forked_shell
import pytest
from report_hardware import fails_for_apex_alone, markdown
from report_samples import sample_run

from crosstrain import backends
from crosstrain.ci.matrix.report import Report

Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """Stands in for the interpreter: what it runs is forked."""
    with tempfile.TemporaryDirectory() as place, forked_shell.programs(Path(place)) as stand_ins:
        yield str(stand_ins / "python")


def script(root: Path, python: str, *arguments: str | Path, **environment: str) -> Result:
    return subprocess.run(
        ["bash", root / "ci" / "gpu_report.sh", *map(str, arguments)],
        env={**os.environ, "PYTHON": python, **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.slow
def test_the_dry_run_passes_and_goes_on_in_parts(
    repo_root: Path, python: str, tmp_path: Path
) -> None:
    common = ("--cpu", "--short", "--jobs", "1", "--out", tmp_path, "--name", "dry")
    result = script(repo_root, python, *common, "--only", "tests")
    assert result.returncode == 0, result.stdout + result.stderr
    page = tmp_path / "dry.md"
    assert "| tests | passed |" in page.read_text()
    assert "| matrix | has not run |" in page.read_text()

    result = script(repo_root, python, *common, "--only", "matrix", "--only", "benchmarks")
    assert result.returncode == 0, result.stdout + result.stderr
    text = page.read_text()
    for part in ("tests", "matrix", "benchmarks"):
        assert f"| {part} | passed |" in text
    assert re.search(r"\d+ passed", text)
    assert "| overflow | – skipped | – skipped | ✓ passed |" in text
    assert "crosstrain over by hand" in text
    for linked in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / linked).is_file(), linked
    (run,) = Report.read(tmp_path / "dry" / "matrix").runs
    assert run.required == ("cpu", "cpu:bf16", "cpu:fp16")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cpu",), "--cpu needs --out DIR"),
        (("--only", "matrices"), "not 'matrices'"),
        (("--out",), "--out needs a value"),
        (("--gpu",), "there is no option '--gpu'"),
        (("--apex", "/nowhere"), "/nowhere is no source tree of apex with amp"),
    ],
)
def test_a_wrong_argument_is_named(
    repo_root: Path, python: str, arguments: tuple[str, ...], words: str
) -> None:
    result = script(repo_root, python, *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_a_machine_without_a_gpu_is_refused_with_the_reason(
    repo_root: Path, python: str, tmp_path: Path
) -> None:
    found = backends.probe("cuda")
    if found.ok:
        pytest.skip("there is a GPU here")
    # A driver without a GPU that torch can use: the probe's own reason has to be shown.
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho NVIDIA H200\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = script(repo_root, python, "--out", tmp_path / "out", PATH=path)
    assert result.returncode == 2
    assert "required but not available: cuda:" in result.stderr
    assert " ".join(found.reason.split()) in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_lacks_apex_alone_is_told_from_a_broken_one(tmp_path: Path) -> None:
    specs = ["cuda", "apex:O0", "apex:O1"]
    absent = {"apex:O0": "No apex.", "apex:O1": "No apex."}
    run = sample_run("one", specs, required=specs, unavailable=absent)
    Report((run,)).write(tmp_path / "matrix")
    assert fails_for_apex_alone(tmp_path)
    for other in (
        sample_run("one", specs, required=specs, unavailable={"cuda": "No GPU.", **absent}),
        sample_run("one", specs, required=specs, unavailable=absent, failed={("cuda", "middle")}),
        sample_run("one", ["cuda"], required=["cuda"]),
        replace(run, interrupted=True),
    ):
        Report((other,)).write(tmp_path / "matrix")
        assert not fails_for_apex_alone(tmp_path)


def test_the_page_of_a_machine_shows_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "2026-11-24-nvidia-h200"
    run = sample_run("one", ["cuda"], required=["cuda"], failed={("cuda", "middle")})
    Report((run,)).write(folder / "matrix")
    (folder / "matrix.result").write_text("1 65 2026-11-24T02:00:00Z\n")
    (folder / "apex.txt").write_text("required but not available: apex:O1: its amp was removed")
    (folder / "tests.txt").write_text("...\n=== short test summary info ===\nFAILED it\n1 failed\n")
    text = markdown(folder)
    assert text.startswith("# 2026-11-24-nvidia-h200\n")
    assert "| matrix | failed with exit code 1 | 65.0 s |" in text
    assert "| tests | was cut off |" in text
    assert "| benchmarks | has not run |" in text
    assert "its amp was removed" in text
    assert "middle on cuda, failed:" in text
    assert "From iteration 5 on the losses differ." in text
    assert "FAILED it" in text


def test_the_page_of_a_machine_shows_what_a_matrix_that_was_cut_off_had_printed(
    tmp_path: Path,
) -> None:
    (tmp_path / "matrix.txt").write_text("$ it\n[ 1/12] passed  cpu  middle\n")
    text = markdown(tmp_path)
    assert "| matrix | was cut off |" in text
    assert "\n[ 1/12] passed  cpu  middle\n" in text
