"""Names that are no UTF-8, or that a terminal would obey: told, escaped, and nothing else."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain.ci.cli import main
from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWarning,
    DiskSaver,
    Engine,
    read_checkpoint,
    resume_or_start,
)

ODD = {
    "no UTF-8": os.fsdecode(b"caf\xe9"),
    "escape sequence": "\x1b[2J\x1b]0;title\x07",
    "line": "line\nWARNING a line of somebody else",
    "carriage return": "line\rover",
    "right to left": "\u202egpj\u200f",
    "C1": "\x9b2J",
}
odd = pytest.mark.parametrize("name", ODD.values(), ids=ODD)
KINDS = ("file", "sharded", "file in a store", "sharded in a store")


def harmless(text: str, lines: bool = True) -> None:
    """Makes sure that a terminal, and a log in UTF-8, takes a text as it is."""
    assert all(part.isprintable() for part in (text.split("\n") if lines else [text])), ascii(text)
    text.encode()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Returns what was logged, each message of which is one line."""
    caplog.set_level(logging.INFO)

    def told() -> str:
        for record in caplog.records:
            harmless(record.getMessage(), lines=False)
        return caplog.text

    return told


def place_of(folder: Path, kind: str) -> str:
    return f"file://{folder}" if "store" in kind else str(folder)


@odd
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_checkpoints(
    tmp_path: Path,
    name: str,
    kind: str,
    log: Callable[[], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = place_of(tmp_path, kind)
    with DiskSaver(place, parts="sharded" in kind) as saver:
        for number in (1, 2):
            saver({"a": torch.full((2,), float(number))}, f"{name}_{number}.pt")
        newest = saver.path_of(f"{name}_2.pt")
    latest = Checkpoint.latest(place)
    assert latest.path == newest
    harmless(latest.describe(), lines=False)
    assert torch.equal(read_checkpoint(latest)["a"], torch.full((2,), 2.0))
    assert main(["inspect", place]) == 0
    shown = capsys.readouterr().out
    harmless(shown)
    assert shown.count(": good") == 2
    assert main(["inspect", place, "--json"]) == 0
    listed = capsys.readouterr().out
    harmless(listed)
    assert listed.isascii()
    assert next(one["path"] for one in json.loads(listed)) == str(newest)

    damage(newest)
    latest = Checkpoint.latest(place)
    assert latest.path is not None
    assert "_1" in latest.path.name
    harmless(latest.describe(), lines=False)
    harmless(latest.passed_over[0].reason)
    assert main(["inspect", place]) == 1
    shown = capsys.readouterr().out
    harmless(shown)
    assert "_2" in shown
    assert "Passed over" in log()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(newest)
    harmless(str(caught.value))
    with DiskSaver(place, require_empty=False) as saver:
        saver.remove(f"{name}_1.pt")
        saver.remove(f"{name}_2.pt")
    assert not Checkpoint.latest(place).passed_over


def damage(newest: Any) -> None:
    path = Path(os.fspath(newest).removeprefix("file://"))
    if path.is_dir():
        path = path / "rank-0.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@odd
def test_a_run_beside_them_goes_on(
    tmp_path: Path, name: str, log: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of such a name, with files of such names, and a link that leads to one."""
    folder = tmp_path / name
    for _ in range(2):
        trainer, model = Engine(lambda engine, batch: None), torch.nn.Linear(1, 1)
        run = resume_or_start(trainer, {"model": model}, folder, every=1, filename_prefix=name)
        trainer.run([0] * 2, max_epochs=1)
    assert run.resumed_from is not None
    assert run.resumed_from.name == f"{name}_checkpoint_2.pt"
    run.resumed_from.write_bytes(b"damaged")
    (folder / f"{name}_checkpoint_3.pt").symlink_to(f"nowhere {name}")
    (folder / f"{name}_checkpoint_4.sharded").mkdir()
    (folder / f"{name}_checkpoint_5.pt").mkdir()
    trainer, model = Engine(lambda engine, batch: None), torch.nn.Linear(1, 1)
    run = resume_or_start(trainer, {"model": model}, folder, every=1, filename_prefix=name)
    assert run.resumed_from is not None
    assert run.resumed_from.name == f"{name}_checkpoint_1.pt"
    trainer.run([0] * 2, max_epochs=1)
    run.resumed_from.write_bytes(b"damaged")
    for path in folder.glob("*_2.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointNotFound) as caught:
        resume_or_start(
            Engine(lambda *_: None), {"model": model}, folder, every=1, filename_prefix=name
        )
    harmless(str(caught.value))
    assert main(["inspect", str(folder)]) == 1
    harmless(capsys.readouterr().out)
    assert "Passed over" in log()


@odd
def test_names_in_a_file(
    tmp_path: Path, name: str, log: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Module()
    model.register_parameter(name.replace(".", ""), torch.nn.Parameter(torch.ones(2)))
    handler = Checkpoint({name: model, "other": torch.nn.Linear(1, 1)}, tmp_path)
    handler(Engine(lambda *_: None))
    assert handler.last_checkpoint is not None
    path = str(handler.last_checkpoint)
    assert main(["inspect", path]) == 0
    harmless(capsys.readouterr().out)
    Checkpoint.load_objects({name: model}, path)
    for wrong in ({"odder": model}, {f"{name}!": model}, {name: torch.nn.Linear(1, 1)}):
        with pytest.raises(CheckpointMismatch) as caught:
            Checkpoint.load_objects(wrong, path)
        harmless(str(caught.value).replace("\t", ""))
    part = torch.nn.Linear(1, 1)
    part.register_parameter("more", torch.nn.Parameter(torch.ones(2)))
    saved = {name: torch.ones(2), "weight": torch.ones(1, 1)}
    with pytest.warns(CheckpointWarning) as warned:
        Checkpoint.load_objects({"model": part}, {"model": saved}, strict=False)
    for warning in warned:
        harmless(str(warning.message))
    log()


def test_an_encoding_that_has_not_all_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal in ASCII gets é escaped."""
    with DiskSaver(tmp_path) as saver:
        saver({"ö": torch.ones(2)}, "café_1.pt")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["inspect", str(tmp_path)]) == 0
    stream.flush()
    assert b"caf\\xe9_1.pt: good" in stream.buffer.getvalue()  # type: ignore[attr-defined]
