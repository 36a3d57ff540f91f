"""What is named like a checkpoint and is none is a documented error, and nothing waits for it."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import MARK, attacks, bombs

from crosstrain.engine import (
    Checkpoint,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    DiskSaver,
)
from crosstrain.engine.storage.safe_load import load_file, load_part


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        # A path of a socket may not be long.
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def _link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


ODD: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "link to a fifo": _link_to_fifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nowhere.pt"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_and_passed_over(tmp_path: Path, kind: str) -> None:
    with DiskSaver(tmp_path) as saver:
        saver({"a": torch.ones(2)}, "good_1.pt")
    ODD[kind](tmp_path / "odd_2.pt")
    with pytest.raises(CheckpointError, match="odd_2"):
        load_file(tmp_path / "odd_2.pt")
    found = Checkpoint.latest(tmp_path)
    assert found.path == tmp_path / "good_1.pt"
    # A saver looks at what is there already.
    with DiskSaver(tmp_path, require_empty=False) as saver:
        saver({"a": torch.zeros(2)}, "good_3.pt")
    assert Checkpoint.latest(tmp_path).path == tmp_path / "good_3.pt"


def test_a_link_to_a_good_checkpoint_is_read(tmp_path: Path) -> None:
    with DiskSaver(tmp_path / "there") as saver:
        saver({"a": torch.ones(2)}, "good.pt")
    (tmp_path / "here.pt").symlink_to(tmp_path / "there" / "good.pt")
    assert torch.equal(load_file(tmp_path / "here.pt").state["a"], torch.ones(2))
    with pytest.raises(CheckpointNotFound, match="no checkpoint"):
        load_file(tmp_path / "nothing.pt")


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_parts_of_a_file_have_the_same_door(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    tensors = [torch.randn(5), torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16)]
    hostile = [data for _, data in (*list(attacks())[:12], *list(bombs())[3:12])]
    parts = [*map(_saved, tensors), *hostile]
    path.write_bytes(b"".join(parts))
    at = 0
    with path.open("rb") as file:
        for number, part in enumerate(parts):
            if number < len(tensors):
                assert torch.equal(load_part(file, at, len(part), path), tensors[number])
                with pytest.raises(CheckpointCorrupt, match="__0_0"):
                    load_part(file, at, len(part) - 1, path)
                with pytest.raises(CheckpointCorrupt, match="__0_0"):
                    load_part(file, at + 1, len(part), path)
            else:
                with pytest.raises(CheckpointError, match="__0_0"):
                    load_part(file, at, len(part), path)
            at += len(part)
        with pytest.raises(CheckpointCorrupt, match="__0_0"):
            load_part(file, at - 5, 500, path)
    assert not Path(MARK).exists()
