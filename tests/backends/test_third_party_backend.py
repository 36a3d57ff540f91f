"""A package of someone else's adds a backend, with no change here: the one in examples/."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run as run_forked


@pytest.fixture(scope="module")
def environment(
    repo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """The example's source, and the variables with which it is installed."""
    folder = tmp_path_factory.mktemp("third_party")
    # A copy, because a build leaves its own folders beside the source.
    source = shutil.copytree(repo_root / "examples" / "third_party_backend", folder / "source")
    target = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return source, {**os.environ, "PYTHONPATH": str(target)}


def run(environment: dict[str, str], cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_forked([sys.executable, *words], env=environment, cwd=cwd)


def test_it_is_found_and_can_be_required(environment: tuple[Path, dict[str, str]]) -> None:
    source, variables = environment
    words = ("-m", "crosstrain.ci.cli", "doctor", "--json", "--require", "single-thread:bf16")
    result = run(variables, source.parent, *words)
    assert result.returncode == 0, result.stderr
    found = {entry["spec"]: entry for entry in json.loads(result.stdout)["backends"]}
    assert found["single-thread"]["devices"] == ["1 thread"]


def test_its_own_conformance_test_passes(environment: tuple[Path, dict[str, str]]) -> None:
    source, variables = environment
    result = run(variables, source, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
    assert "failed" not in result.stdout


@pytest.mark.slow
def test_its_trainings_resume_exactly(
    environment: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, variables = environment
    words = ["-m", "crosstrain.ci.cli", "matrix", "--backends", "single-thread:bf16"]
    words += ["--scenarios", "sigkill,random_layers,overflow,port", "--report", str(tmp_path)]
    result = run(variables, tmp_path, *words)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = json.loads((tmp_path / "matrix.json").read_text())["runs"]
    # It scales no loss, so none overflows.
    assert {cell["scenario"]: cell["status"] for cell in found["outcomes"]} == {
        "sigkill": "passed",
        "random_layers": "passed",
        "overflow": "skipped",
        "port": "passed",
    }


def test_tests_run_on_it_by_default(
    environment: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    _, variables = environment
    (tmp_path / "test_mine.py").write_text("def test_mine(backend): assert backend.name\n")
    words = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--require-backends=single-thread")
    result = run(variables, tmp_path, *words)
    assert result.returncode == 0, result.stdout
    for row in ("[single-thread]", "[single-thread:bf16]", "[cpu:fp16]"):
        assert f"test_mine{row} PASSED" in result.stdout
