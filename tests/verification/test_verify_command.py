"""`crosstrain verify` as it is started, with an interpreter for each of its processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import SUPPORT

from crosstrain.ci import cli

TARGETS = SUPPORT / "verify_targets.py"


def test_an_exact_training_passes_every_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "verdict.json"
    options = ("--at", "5", "--kills", "1", "--workers", "0,1", "--seed", "4", "--json", report)
    told = ("verify", f"{TARGETS}:exact", "--backend", "cpu:bf16", *options)
    assert cli.main([*map(str, told)]) == 0
    assert "It resumes exactly" in capsys.readouterr().out
    verdict: dict[str, Any] = json.loads(report.read_text())
    assert verdict["status"] == "exact"
    assert verdict["iterations"] == 12
    stopped, killed = verdict["runs"]
    assert [stopped["name"], killed["name"]] == ["stopped after 5", "killed 1 time"]
    assert stopped["resumed_from"] == [5]
    assert stopped["workers"] == [0, 1]
    assert killed["killed"] == 1
