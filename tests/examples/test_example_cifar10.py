"""examples/cifar10_distributed.py: crashed and resumed in two processes; what data it reads."""

from __future__ import annotations

import importlib.util
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("forked_programs")

ITERATIONS = 2 * 8


def run(program: Path, folder: Path, processes: int, *arguments: str) -> tuple[int, str]:
    """Runs the example on its generated data; returns its exit code and what it printed."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    command += [str(program), "--output-dir", str(folder), "--data", "generated", "--epochs", "2"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def weights(shown: str) -> str:
    found = re.search(rf"process(?:es)?, iteration {ITERATIONS}: weights ([0-9a-f]{{64}})", shown)
    assert found, shown
    return found[1]


@pytest.fixture
def program(repo_root: Path) -> Path:
    return repo_root / "examples" / "cifar10_distributed.py"


def test_crash_and_resume(program: Path, tmp_path: Path) -> None:
    code, whole = run(program, tmp_path / "whole", 2)
    assert code == 0, whole
    assert "starts from the beginning" in whole
    code, crashed = run(program, tmp_path / "crashed", 2, "--crash-iteration", "13")
    assert code != 0
    assert "RuntimeError: crash at iteration 13" in crashed
    code, resumed = run(program, tmp_path / "crashed", 2, "--seed", "7", "--num-workers", "1")
    assert code == 0, resumed
    assert f"resumes from {tmp_path / 'crashed' / 'checkpoint_10.pt'}" in resumed
    assert weights(resumed) == weights(whole)
    # Another folder, and one process: it goes on, and ends elsewhere in the last bits.
    named = str(tmp_path / "whole" / "checkpoint_15.pt")
    code, alone = run(program, tmp_path / "alone", 1, "--resume-from", named)
    assert code == 0, alone
    assert f"resumes from {named}" in alone
    assert "1 process, iteration 16" in alone


@pytest.mark.slow
def test_crash_and_resume_sharded(program: Path, tmp_path: Path) -> None:
    sharded = ("--backend", "cpu:fsdp")
    code, whole = run(program, tmp_path / "whole", 2, *sharded)
    assert code == 0, whole
    code, crashed = run(program, tmp_path / "crashed", 2, *sharded, "--crash-iteration", "13")
    assert code != 0
    assert "RuntimeError: crash at iteration 13" in crashed
    code, resumed = run(program, tmp_path / "crashed", 2, *sharded, "--num-workers", "1")
    assert code == 0, resumed
    assert f"resumes from {tmp_path / 'crashed' / 'checkpoint_10.sharded'}" in resumed
    assert weights(resumed) == weights(whole)


@pytest.fixture
def example(program: Path) -> Any:
    spec = importlib.util.spec_from_file_location("cifar10_distributed", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Python2(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Pickles text and bytes as Python 2 did, which CIFAR10 was written with."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_text(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_text


def write_batches(folder: Path) -> tuple[np.ndarray, list[int]]:
    """Writes two images a batch in both of CIFAR10's formats; returns those of the training."""
    generator = np.random.default_rng(1)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    images = generator.integers(0, 256, (12, 3072), dtype=np.uint8)
    labels = [number % 10 for number in range(12)]
    binary, pickled = folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"
    for kind in (binary, pickled):
        kind.mkdir()
    for number, name in enumerate(names):
        part, told = images[2 * number :][:2], labels[2 * number :][:2]
        batch = {b"data": part, b"labels": told, b"batch_label": b"training batch"}
        with (pickled / name).open("wb") as file:
            (Python2 if number else pickle.Pickler)(file, protocol=2).dump(batch)
        rows = np.concatenate([np.array(told, np.uint8)[:, None], part], 1)
        (binary / f"{name}.bin").write_bytes(rows.tobytes())
    return images[:10].reshape(-1, 3, 32, 32), labels[:10]


def test_both_formats(example: Any, tmp_path: Path) -> None:
    images, labels = write_batches(tmp_path)
    binary, _ = example.cifar10(tmp_path, fetch=False)
    for file in (tmp_path / "cifar-10-batches-bin").iterdir():
        file.unlink()
    (tmp_path / "cifar-10-batches-bin").rmdir()
    pickled, test = example.cifar10(tmp_path, fetch=False)
    for found, told in (binary, pickled):
        assert torch.equal(found, torch.from_numpy(images))
        assert told.tolist() == labels
    assert test[1].tolist() == [0, 1]  # the 11th and 12th


class Hostile:
    """Runs code when it is unpickled by one who does not look."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_pickle_that_runs_code_is_refused(example: Any, tmp_path: Path) -> None:
    write_batches(tmp_path)
    target = tmp_path / "ran"
    batch = {b"data": Hostile(target), b"labels": [1]}
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(batch))
    with pytest.raises(pickle.UnpicklingError, match="is no part of CIFAR10"):
        example.read_pickled(tmp_path / "cifar-10-batches-py", ["data_batch_1"])
    assert not target.exists()
