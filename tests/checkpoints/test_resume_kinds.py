"""One script, whose backend is changed between its starts: sharded checkpoints and whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import results, run_program, run_world
from shares_program import ITERATIONS

from crosstrain.backends import get
from crosstrain.engine import create_supervised_trainer, resume_or_start

PROGRAM = "resume_kinds_program.py"


def start(size: int, folder: Path, spec: str, until: int = 0) -> list[dict[str, Any]]:
    """Starts the program in some processes; returns what each rank tells."""
    arguments = [str(folder), str(folder / "saved"), spec, str(until)]
    if size == 1:
        run_program(PROGRAM, *arguments)
    else:
        run_world(size, PROGRAM, *arguments)
    return results(folder, size)


@pytest.mark.slow
def test_a_run_goes_on_on_another_kind_of_backend(tmp_path: Path) -> None:
    """Sharded, alone, sharded, replicated: in each case from the newest, with the same numbers."""
    straight, chain = tmp_path / "straight", tmp_path / "chain"
    straight.mkdir()
    chain.mkdir()
    (whole,) = start(1, straight, "cpu")
    done = 0
    for size, spec, until, found in (
        (2, "cpu:fsdp", 2, None),
        (1, "cpu", 5, "checkpoint_2.sharded"),
        (2, "cpu:fsdp", 7, "checkpoint_5.pt"),
        (2, "cpu", 0, "checkpoint_7.sharded"),
    ):
        told = start(size, chain, spec, until)
        iterations = range(done + 1, (until or ITERATIONS) + 1)
        for one in told:
            assert one["from"] == found
            assert one["losses"].keys() == set(map(str, iterations))
            for iteration, loss in one["losses"].items():
                assert loss == pytest.approx(whole["losses"][iteration], abs=1e-12), iteration
        done = until
    for one in told:
        for ours, theirs in zip(one["weights"], whole["weights"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-10)


def trainer_on(backend: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, backend=backend, deterministic=True
    )
    return trainer, {"model": model, "optimizer": optimizer}


def trained(spec: str, folder: Path, epochs: int, **options: Any) -> Any:
    """Goes on in a folder, in one process; returns the run."""
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, 2))
    with get(spec) as backend:
        trainer, objects = trainer_on(backend)
        run = resume_or_start(trainer, objects, folder, every=2, **options)
        trainer.run(torch.utils.data.DataLoader(data), max_epochs=epochs)
        run.checkpoint.save_handler.close()  # type: ignore[union-attr]
    return run


def test_what_is_newest_counts_and_not_how_it_was_saved(tmp_path: Path) -> None:
    assert trained("cpu:fsdp", tmp_path, 1).resumed_from is None
    with pytest.warns(match="was 'cpu:fsdp' and is 'cpu:fp32'"):
        assert trained("cpu", tmp_path, 2).resumed_from == tmp_path / "checkpoint_4.sharded"
    assert trained("cpu", tmp_path, 3).resumed_from == tmp_path / "checkpoint_8.pt"
    with pytest.warns(match="was 'cpu:fp32' and is 'cpu:fsdp'"):
        run = trained("cpu:fsdp", tmp_path, 4)
    assert run.resumed_from == tmp_path / "checkpoint_12.pt"
    # Old ones of either kind go.
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("."))
    assert names == ["checkpoint_14.sharded", "checkpoint_16.sharded"]


def test_either_kind_can_be_named(tmp_path: Path) -> None:
    trained("cpu:fsdp", tmp_path / "sharded", 1)
    trained("cpu", tmp_path / "whole", 1)
    for spec, kind, name in (("cpu", "sharded", "2.sharded"), ("cpu:fsdp", "whole", "2.pt")):
        named = tmp_path / kind / f"checkpoint_{name}"
        with pytest.warns(match="The backend was"):
            run = trained(spec, tmp_path / "new" / kind, 1, resume_from=named)
        assert run.resumed_from == named


@pytest.mark.parametrize("damaged", ["rank-0.pt", "index.json", "__0_0.distcp"])
def test_a_newer_one_of_the_other_kind_that_is_damaged_is_passed_over(
    tmp_path: Path, damaged: str
) -> None:
    trained("cpu:fsdp", tmp_path, 1)
    newest = tmp_path / "checkpoint_4.sharded"
    path = newest / damaged
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(match="The backend was"):
        run = trained("cpu", tmp_path, 1)
    assert run.resumed_from == tmp_path / "checkpoint_2.sharded"
    assert [over.path for over in run.passed_over] == [newest]
    assert f"{damaged} is damaged" in run.passed_over[0].reason


def test_overlap_is_refused_for_a_sharded_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which a sharded model cannot have"):
        trained("cpu:fsdp", tmp_path, 1, overlap=True)
    assert not any(tmp_path.iterdir())
