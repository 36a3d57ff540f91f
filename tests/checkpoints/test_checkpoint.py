"""Checkpoint as users write it: what is saved, what is loaded, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from checkpoint_objects import BATCHES, made, names, same

from crosstrain.engine import (
    BaseSaveHandler,
    Checkpoint,
    CheckpointError,
    CheckpointMismatch,
    DiskSaver,
    Engine,
    Events,
)


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    folder = str(tmp_path / "training")
    to_save = made()
    trainer = to_save["trainer"]
    handler = Checkpoint(to_save, DiskSaver(folder, create_dir=True))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(BATCHES[:5], max_epochs=2)
    assert names(tmp_path / "training") == ["checkpoint_10.pt"]

    to_load = made(seed=1)
    checkpoint_file = f"{folder}/checkpoint_10.pt"
    checkpoint = torch.load(checkpoint_file)
    Checkpoint.load_objects(to_load=to_load, checkpoint=checkpoint)
    for name in ("model", "optimizer", "lr_scheduler"):
        assert same(to_load[name].state_dict(), to_save[name].state_dict())
    state = to_load["trainer"].run(BATCHES[:5], max_epochs=3)
    assert (state.iteration, state.epoch) == (15, 3)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["text", "Path", "latest"])
def test_load_objects_takes_paths(tmp_path: Path, kind: Any) -> None:
    written = made()
    written["trainer"].run(BATCHES)
    Checkpoint(written, tmp_path)(written["trainer"])
    path = tmp_path / "checkpoint_10.pt"
    read = made(seed=1)
    Checkpoint.load_objects(
        read, Checkpoint.latest(tmp_path) if kind is os.fsencode else kind(path)
    )
    assert same(read["model"].state_dict(), written["model"].state_dict())


def test_the_engine_is_loaded_last(tmp_path: Path) -> None:
    order: list[str] = []

    class Part:
        def __init__(self, name: str) -> None:
            self.name = name

        def state_dict(self) -> dict[str, Any]:
            return {"name": self.name}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            order.append(self.name)

    class Last(Engine):
        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            order.append("trainer")

    trainer = Last(lambda engine, batch: None)
    objects = {"trainer": trainer, "b": Part("b"), "a": Part("a")}
    Checkpoint(objects, tmp_path)(trainer)
    Checkpoint.load_objects(objects, tmp_path / "checkpoint_0.pt")
    assert order == ["b", "a", "trainer"]


def test_missing_and_unexpected_names_are_errors(tmp_path: Path) -> None:
    written = made()
    written["trainer"].run(BATCHES)
    Checkpoint(written, tmp_path)(written["trainer"])
    path = tmp_path / "checkpoint_10.pt"
    more = made() | {"ema": torch.nn.Linear(1, 1)}
    before = [tensor.clone() for tensor in more["model"].state_dict().values()]
    with pytest.raises(CheckpointMismatch, match=r"'ema'.*holds.*'lr_scheduler'") as error:
        Checkpoint.load_objects(more, path)
    assert str(path) in str(error.value)
    # The names are looked at before anything is loaded.
    assert same(list(more["model"].state_dict().values()), before)
    with pytest.raises(ValueError, match="ema"):
        Checkpoint.load_objects(more, torch.load(path))
    fewer = made()
    del fewer["lr_scheduler"]
    with pytest.raises(CheckpointMismatch, match=r"'lr_scheduler'.*strict=False"):
        Checkpoint.load_objects(fewer, path)
    Checkpoint.load_objects(fewer, path, strict=False)
    # Without an engine it is no resumed run, and to load a part is what many want.
    Checkpoint.load_objects({"model": fewer["model"]}, path)


def test_strict_reaches_the_modules(tmp_path: Path) -> None:
    Checkpoint({"net": torch.nn.Linear(2, 2)}, tmp_path)(Engine(lambda engine, batch: None))
    path = tmp_path / "net_0.pt"
    other = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(CheckpointMismatch, match=r"'net' \(Linear\).*bias"):
        Checkpoint.load_objects({"net": other}, path)
    Checkpoint.load_objects({"net": other}, path, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Checkpoint.load_objects({"net": torch.nn.Linear(3, 2)}, path)


def test_wrong_arguments_of_load_objects(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="string or a dictionary, or a path"):
        Checkpoint.load_objects({"model": model}, 12)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"load_state_dict.*'model'"):
        Checkpoint.load_objects({"model": object()}, {})
    with pytest.raises(TypeError, match="to_load"):
        Checkpoint.load_objects(model, {})  # type: ignore[arg-type]
    (tmp_path / "other.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"none\.pt.*other\.pt"):
        Checkpoint.load_objects({"model": model}, tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="folder"):
        Checkpoint.load_objects({"model": model}, tmp_path)


def test_wrong_arguments_of_checkpoint(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    good: dict[str, Any] = {"to_save": {"model": model}, "save_handler": tmp_path}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"to_save": [model]}, TypeError, "to_save.*dictionary"),
        ({"to_save": {"model": 1}}, TypeError, "state_dict.*'model'"),
        ({"save_handler": 12}, TypeError, "save_handler"),
        ({"n_saved": 0}, ValueError, "n_saved.*0"),
        ({"global_step_transform": 1}, TypeError, "global_step_transform"),
        ({"include_self": True, "to_save": {"checkpointer": model}}, ValueError, "checkpointer"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            Checkpoint(**good | wrong)
    scores = iter([torch.tensor(1.0), "high"])
    handler = Checkpoint(**good, score_function=lambda engine: next(scores))
    for _ in range(2):
        with pytest.raises(ValueError, match="should be a number"):
            handler(Engine(lambda engine, batch: None))
    with pytest.raises(ValueError, match="score_sign"):
        Checkpoint.get_default_score_fn("accuracy", 2.0)
    with pytest.raises(ValueError, match="_saved"):
        handler.load_state_dict({})
    with pytest.raises(TypeError, match="dictionary"):
        handler.load_state_dict([])  # type: ignore[arg-type]


def test_arguments_of_torch_save_that_are_not_safe(tmp_path: Path) -> None:
    for wrong in (
        {"pickle_protocol": 4},
        {"_use_new_zipfile_serialization": False},
        {"pickle_module": __import__("pickle")},
    ):
        with pytest.raises(TypeError, match="weights_only=True"):
            DiskSaver(tmp_path, **wrong)
    DiskSaver(tmp_path, pickle_protocol=2)({"a": 1}, "a.pt")
    assert torch.load(tmp_path / "a.pt") == {"a": 1}


def test_a_folder_with_checkpoints_is_not_taken_unasked(tmp_path: Path) -> None:
    (tmp_path / "old.pt").touch()
    with pytest.raises(ValueError, match=r"old\.pt.*require_empty=False"):
        DiskSaver(tmp_path)
    DiskSaver(tmp_path, require_empty=False).close()


def test_what_a_kill_kept_from_being_removed_is_removed_later(tmp_path: Path) -> None:
    """A run that was killed between a save and the removal after it leaves one file too many."""
    objects = made()
    trainer = objects["trainer"]
    saver = DiskSaver(tmp_path)
    killed = Checkpoint(objects, saver, n_saved=3)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), killed)
    trainer.run(BATCHES, max_epochs=1)
    assert names(tmp_path) == ["checkpoint_3.pt", "checkpoint_6.pt", "checkpoint_9.pt"]
    saver.close()
    later = Checkpoint(objects, DiskSaver(tmp_path, require_empty=False), n_saved=2)
    later.load_state_dict(killed.state_dict())
    later(trainer)
    assert names(tmp_path) == ["checkpoint_10.pt", "checkpoint_9.pt"]


def test_a_stand_in_for_a_saver_is_asked_for_names_only() -> None:
    """One that answers everything, as mocks do, is on no disk."""
    saver = MagicMock(spec=BaseSaveHandler)
    engine = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint({"model": torch.nn.Linear(1, 1)}, saver)
    checkpoint(engine)
    assert saver.call_args.args[1] == "model_0.pt"
    assert checkpoint.last_checkpoint == "model_0.pt"
