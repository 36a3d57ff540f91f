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
    options = ("--at", "5,6", "--kills", "2", "--workers", "0,1", "--seed", "4", "--json", report)
    told = ("verify", f"{TARGETS}:exact", "--backend", "cpu:bf16", *options)
    assert cli.main([*map(str, told)]) == 0
    assert "It resumes exactly" in capsys.readouterr().out
    verdict: dict[str, Any] = json.loads(report.read_text())
    assert verdict["status"] == "exact"
    assert verdict["iterations"] == 12
    assert [run["name"] for run in verdict["runs"]] == [
        "stopped after 5",
        "stopped after 6",
        "killed 2 times",
    ]
    assert [run["resumed_from"] for run in verdict["runs"][:2]] == [[5], [6]]
    assert verdict["runs"][0]["workers"] == [0, 1]
    assert verdict["runs"][2]["killed"] >= 1
