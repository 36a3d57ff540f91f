"""Which names a checkpoint can have: what would not be found by its name is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain.engine import (
    Checkpoint,
    CheckpointWarning,
    DiskSaver,
    Engine,
    Events,
    ModelCheckpoint,
    resume_or_start,
)

MODEL = torch.nn.Linear(1, 1)


def step_of(engine: Engine, _: Any) -> int:
    return engine.state.iteration


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"filename_prefix": "run/best"}, "run/best.* leads into another folder"),
        ({"filename_prefix": "../best"}, "leads into another folder"),
        ({"filename_pattern": "{name}/{global_step}.pt"}, "leads into another folder"),
        ({"filename_pattern": ""}, "it is empty"),
        ({"filename_prefix": "a\0b"}, "no file system has names"),
        ({"filename_prefix": ".best"}, "hidden, and no start would find it"),
        ({"filename_pattern": "{name}.sharded"}, r"as folders of sharded models.* ending \.pt"),
        ({"filename_prefix": "ä" * 120}, "it has .* bytes, and 255 are the most"),
    ],
)
def test_a_name_that_would_not_be_found_is_refused(
    tmp_path: Path, options: dict[str, str], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        Checkpoint({"model": MODEL}, tmp_path, global_step_transform=step_of, **options)
    with pytest.raises(ValueError, match=why):
        ModelCheckpoint(tmp_path, global_step_transform=step_of, **options)
    if "filename_prefix" in options:
        with pytest.raises(ValueError, match=why):
            resume_or_start(Engine(lambda *_: None), {"model": MODEL}, tmp_path, every=1, **options)
    # The folder is free again.
    DiskSaver(tmp_path).close()


def test_names_that_are_known_only_when_it_is_saved(tmp_path: Path) -> None:
    with DiskSaver(tmp_path) as saver:
        for name in ("a/b", "..", ""):
            with pytest.raises(ValueError, match="cannot be the name of a checkpoint"):
                saver({"a": 1}, name)
    handler = ModelCheckpoint(tmp_path, "best")
    engine = Engine(lambda *_: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler, {"net/a": MODEL})
    with pytest.raises(ValueError, match=r"'best_net/a_1\.pt' cannot be the name"):
        engine.run([0])
    with DiskSaver("memory://names/run") as saver, pytest.raises(ValueError, match=r"behind a \?"):
        saver({"a": 1}, "what?.pt")


def test_a_pattern_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    why = r"has the field \{epoch\}, and there are only filename_prefix, ext, name, .*global_step"
    with pytest.raises(KeyError, match=why):
        Checkpoint({"model": MODEL}, tmp_path, filename_pattern="{name}_{epoch}.{ext}")


@pytest.mark.parametrize("n_saved", [0, -1, 1.5, "2"])
def test_a_number_of_files_that_is_none_is_refused(tmp_path: Path, n_saved: Any) -> None:
    with pytest.raises(ValueError, match=f"n_saved must be a positive integer.*{n_saved!r}"):
        Checkpoint({"model": MODEL}, tmp_path, n_saved=n_saved)


def test_an_ending_that_no_listing_looks_for_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(CheckpointWarning, match=r"end with '\.pth', not \.pt.* do not see them"):
        handler = Checkpoint(
            {"model": MODEL}, tmp_path, filename_pattern="{name}_{global_step}.pth", n_saved=2
        )
    engine = Engine(lambda *_: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run([0] * 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_2.pth", "model_3.pth"]
    other = torch.nn.Linear(1, 1)
    Checkpoint.load_objects({"model": other}, tmp_path / "model_3.pth")
    assert torch.equal(other.weight, MODEL.weight)


def test_a_name_is_read_where_there_is_no_room_for_another_ending(tmp_path: Path) -> None:
    """The form of one in parts has a longer name, which is not there because it cannot be."""
    # The names of such as have a step of one digit.
    handler = ModelCheckpoint(tmp_path, "x" * 230, global_step_transform=lambda *_: "0" * 13)
    engine = Engine(lambda *_: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler, {"model": MODEL})
    engine.run([0] * 2)
    found = Checkpoint.latest(tmp_path).path
    assert found is not None
    assert found == handler.last_checkpoint
    Checkpoint.load_objects({"model": torch.nn.Linear(1, 1)}, found)
