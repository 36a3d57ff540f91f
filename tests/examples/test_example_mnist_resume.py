"""examples/mnist_resume.py: crashed and resumed, it ends with the weights of the whole run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked_programs")

EPOCHS, ITERATIONS = 2, 2 * 23


@pytest.fixture
def example(repo_root: Path, tmp_path: Path) -> object:
    def run(folder: str, *arguments: str, data: str = "digits") -> tuple[int, str, str]:
        command = [sys.executable, repo_root / "examples" / "mnist_resume.py"]
        command += ["--output-dir", tmp_path / folder, "--data", data, "--epochs", str(EPOCHS)]
        command += ["--checkpoint-every", "10", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


def weights(shown: str) -> str:
    found = re.search(rf"iteration {ITERATIONS}: weights ([0-9a-f]{{64}})", shown)
    assert found, shown
    return found[1]


def test_crash_and_resume(example, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, whole, _ = example("whole", "--deterministic")
    assert code == 0
    assert "starts from the beginning" in whole
    assert "epoch 2: validation accuracy 0." in whole
    code, _, errors = example("crashed", "--deterministic", "--crash-iteration", "37")
    assert code == 1
    assert "RuntimeError: crash at iteration 37" in errors
    code, resumed, _ = example("crashed", "--deterministic", "--seed", "7", "--num-workers", "1")
    assert code == 0
    assert f"resumes from {tmp_path / 'crashed' / 'checkpoint_30.pt'}" in resumed
    assert weights(resumed) == weights(whole)
    # From another checkpoint, in another folder: the same end.
    code, other, _ = example(
        "other", "--deterministic", "--resume-from", str(tmp_path / "whole" / "checkpoint_40.pt")
    )
    assert code == 0
    assert weights(other) == weights(whole)


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None,
    reason="torchvision is installed, and may fetch MNIST from the network",
)
def test_it_says_which_data_it_takes(example) -> None:  # type: ignore[no-untyped-def]
    code, shown, _ = example("auto", "--crash-iteration", "1", data="auto")
    assert code == 1
    assert re.search(r"MNIST is not available \(.*torchvision.*\).*scikit-learn's digits", shown)
