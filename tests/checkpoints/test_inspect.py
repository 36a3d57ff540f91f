"""`crosstrain inspect`: what a checkpoint holds, and whether it is good."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import pytest
import torch
from checkpoint_objects import BATCHES, made

from crosstrain.ci.cli import main
from crosstrain.engine import (
    Checkpoint,
    DeterministicEngine,
    DiskSaver,
    Engine,
    Events,
    create_supervised_trainer,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of a deterministic run on the CPU."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, deterministic=True, backend="cpu:bf16"
    )
    assert isinstance(trainer, DeterministicEngine)
    with DiskSaver(tmp_path) as saver:
        handler = Checkpoint(
            {"trainer": trainer, "model": model, "optimizer": optimizer}, saver, n_saved=None
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
        trainer.run([(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(4)])
    return tmp_path


def test_a_good_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "checkpoint_4.pt")]) == 0
    shown = capsys.readouterr().out
    for part in (
        "checkpoint_4.pt: good",
        "iteration   4, epoch 1",
        "backend     cpu:bf16",
        "world size  1, written by rank 0",
        f"torch {torch.__version__}",
        "python, numpy, torch",
    ):
        assert part in shown
    rows = {line.split()[0]: line.split()[1:3] for line in shown.splitlines() if line}
    # 3 x 2 weights and 2 biases of 4 bytes; a momentum for each.
    assert rows["model"] == ["2", "32"]
    assert rows["optimizer"] == ["2", "32"]


def test_a_folder_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = folder / "checkpoint_2.pt"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert main(["inspect", str(folder), "--json"]) == 1
    found = {Path(each["path"]).name: each for each in json.loads(capsys.readouterr().out)}
    assert not found["checkpoint_2.pt"]["good"]
    assert "cut off" in found["checkpoint_2.pt"]["problem"]
    good = found["checkpoint_4.pt"]
    assert good["good"]
    assert good["verified"]
    assert good["manifest"]["iteration"] == 4
    assert [part["name"] for part in good["parts"]] == ["trainer", "model", "optimizer"]


def test_files_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": torch.nn.Linear(1, 1).state_dict()}, tmp_path / "other.pt")
    assert main(["inspect", str(tmp_path / "other.pt")]) == 1
    assert "cannot be verified" in capsys.readouterr().out
    torch.save(torch.nn.Linear(1, 1), tmp_path / "class.pt")
    assert main(["inspect", str(tmp_path / "class.pt")]) == 1
    shown = capsys.readouterr().out
    assert "BAD" in shown
    assert "torch.nn.modules.linear.Linear" in shown


def test_a_single_object_and_a_renamed_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objects = made()
    objects["trainer"].run(BATCHES)
    with DiskSaver(tmp_path) as saver:
        Checkpoint({"model": objects["model"]}, saver)(objects["trainer"])
    (tmp_path / "model_10.pt").rename(tmp_path / "best.pt")
    assert main(["inspect", str(tmp_path / "best.pt")]) == 0
    shown = capsys.readouterr().out
    assert "as model_10.pt" in shown
    assert "\n  model " in shown


def test_nothing_to_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no checkpoint" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "none.pt")]) == 1
    assert "There is no checkpoint" in capsys.readouterr().out


def test_names_in_a_file_do_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with DiskSaver(tmp_path) as saver:
        Checkpoint(
            {"\x1b[2Jred": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1)},
            saver,
        )(Engine(lambda engine, batch: None))
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "red" in shown


def test_the_installed_command(folder: Path, console_script: Path) -> None:
    done = forked.run([console_script, "inspect", folder / "checkpoint_2.pt"])
    assert done.returncode == 0, done.stderr
    assert "checkpoint_2.pt: good" in done.stdout
