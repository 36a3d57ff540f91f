"""`crosstrain doctor`, run as the user runs it; `stress/test_gpu_report.py` starts real ones."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("forked_programs")


@pytest.fixture(scope="module")
def registered() -> set[str]:
    return {point.name for point in entry_points(group="crosstrain.backends")}


def doctor(
    script: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "160"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [script, "doctor", *arguments],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_names_every_backend(console_script: Path, registered: set[str]) -> None:
    result = doctor(console_script, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["crosstrain"] == version("crosstrain")
    assert report["python"] == platform.python_version()
    assert report["missing"] == []
    backends = {entry["spec"]: entry for entry in report["backends"]}
    assert len(backends) == len(report["backends"])
    assert registered <= backends.keys()
    assert backends["cpu"]["ok"] is True
    assert backends["cpu"]["versions"]["torch"] == torch.__version__
    assert backends["cpu"]["devices"]
    for entry in backends.values():
        assert entry["required"] is False
        # What is not available says why and what to do.
        assert entry["ok"] or (entry["reason"] and entry["remedy"]), entry


def test_the_list_names_every_backend(console_script: Path, registered: set[str]) -> None:
    result = doctor(console_script)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    first_words = {row[0]: row[1] for row in rows if row[1:2] in (["yes"], ["no"])}
    assert registered <= first_words.keys()
    assert first_words["cpu"] == "yes"


@pytest.mark.parametrize("columns", ["30", "200"])
def test_what_is_to_be_copied_is_one_line_and_versions_stand_once(
    console_script: Path, columns: str
) -> None:
    environment = {**os.environ, "COLUMNS": columns}
    command = [console_script, "doctor"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    report = json.loads(doctor(console_script, "--json").stdout)
    lines = [line.strip() for line in result.stdout.splitlines()]
    for entry in report["backends"]:
        assert entry["ok"] or " ".join(entry["remedy"].split()) in lines
    assert f", torch {torch.__version__}" in lines[0]
    assert sum(line.startswith("options: ") for line in lines) >= 1
    assert "options: fp32, bf16, fp16" in result.stdout


@pytest.mark.parametrize("required", [("cpu",), ("cpu,null",), ("cpu:bf16", "cpu")])
def test_required_and_available(console_script: Path, required: tuple[str, ...]) -> None:
    arguments = [word for spec in required for word in ("--require", spec)]
    result = doctor(console_script, "--json", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    backends = {entry["spec"]: entry for entry in json.loads(result.stdout)["backends"]}
    for spec in ",".join(required).split(","):
        assert backends[spec]["required"] is True
        assert backends[spec]["ok"] is True


def test_required_but_missing(console_script: Path) -> None:
    result = doctor(console_script, "--json", "--require", "cpu,cpuu")
    assert result.returncode == 1
    assert json.loads(result.stdout)["missing"] == ["cpuu"]
    assert result.stderr.startswith("required but not available: cpuu: ")
    assert result.stderr.count("\n") == 1


def test_an_empty_entry_is_refused(console_script: Path) -> None:
    result = doctor(console_script, "--require", "cpu,")
    assert result.returncode == 2
    assert "'cpu,' has an empty entry" in result.stderr


def test_a_backend_of_another_package_that_is_broken(console_script: Path, tmp_path: Path) -> None:
    info = tmp_path / "someones_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[crosstrain.backends]\nbroken = nowhere_at_all:Backend\n"
    )
    result = doctor(console_script, "--json", path=tmp_path)
    assert result.returncode == 0, result.stderr
    backends = {entry["spec"]: entry for entry in json.loads(result.stdout)["backends"]}
    assert backends["broken"]["ok"] is False
    assert "nowhere_at_all" in backends["broken"]["reason"]
    assert backends["cpu"]["ok"] is True
