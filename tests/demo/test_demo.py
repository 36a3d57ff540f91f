"""The main job: `crosstrain demo`, and the same training as a user's script, killed and resumed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import on_xla
import pytest
import torch
from forked import ForkedPopen
from forked import run as run_forked
from rich.console import Console

from crosstrain.ci.demo import print_table
from crosstrain.ci.trials.course import Course
from crosstrain.engine import Checkpoint

ARGUMENTS = ["--epochs", "2", "--backend"]
SPECS = [
    "cpu",
    pytest.param("xla", marks=on_xla.needs_xla),
    pytest.param("xla:bf16", marks=on_xla.needs_xla),
]


def demo(console_script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [console_script, "demo", *arguments]
    return run_forked(command, env={**os.environ, "COLUMNS": "120"})


@pytest.fixture(scope="module", params=SPECS)
def shown(
    request: pytest.FixtureRequest, console_script: Path, tmp_path_factory: pytest.TempPathFactory
):
    out = tmp_path_factory.mktemp("demo")
    arguments = [*ARGUMENTS, request.param, "--workers", "0", "--out", str(out)]
    return out, demo(console_script, *arguments), request.param


Shown = tuple[Path, subprocess.CompletedProcess[str], str]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = Checkpoint.latest(folder).path
    assert path is not None
    assert path.name == "checkpoint_60.pt"
    return torch.load(path, weights_only=True)["model"]


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_demo_is_bit_identical(shown: Shown) -> None:
    out, process, _ = shown
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Bit-identical: batches, losses, weights, random states." in process.stdout
    for name in ("test accuracy", "killed after iteration", "resumed from iteration"):
        assert name in process.stdout
    # Five rows, and the sentence.
    assert process.stdout.count("identical") == 6
    assert "different" not in process.stdout
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert_same_bits(final_weights(out / "straight"), final_weights(out / "killed"))


def test_demo_runs_again_in_its_folder_but_not_in_another(
    console_script: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "straight" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    process = demo(console_script, *ARGUMENTS, "cpu", "--out", str(tmp_path))
    assert process.returncode != 0
    assert "holds files that no demo wrote" in process.stderr
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("width", [30, 60, 120])
def test_equal_digests_are_shown_whole_in_any_terminal(width: int) -> None:
    runs = Course(), Course()
    digest = "0123456789abcdef"
    for run in runs:
        row = {"iteration": 1, "batch": "b", "loss": (0.5).hex(), "scalar": True}
        run.take({"begun": True, "resumed_from": None, "traits": {}})
        run.take({**row, "weights": digest, "optimizer": digest, "random states": digest})
        run.take({"done": True, "length": 1, "metrics": {"accuracy": 0.9}})
    console = Console(file=io.StringIO(), width=width)
    print_table(console, *runs, 2, "")
    file: Any = console.file
    assert file.getvalue().count(digest) == 6
    assert file.getvalue().count("identical") == 6


def test_example_is_the_same_training_and_survives_a_kill(
    shown: Shown, repo_root: Path, tmp_path: Path
) -> None:
    out, _, spec = shown
    folder = tmp_path / "digits"
    script = [sys.executable, str(repo_root / "examples" / "digits.py")]
    command = [*script, *ARGUMENTS, spec, "--workers", "1", "--out", str(folder)]
    with ForkedPopen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline().startswith("epoch 1: loss ")
        os.killpg(first.pid, signal.SIGKILL)
    # Other workers than before: they do not matter.
    command[command.index("--workers") + 1] = "0"
    second = run_forked(command)
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout
    assert "epoch 2: loss " in second.stdout
    assert_same_bits(final_weights(folder), final_weights(out / "straight"))
