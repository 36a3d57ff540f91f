"""What is named like a checkpoint and is none is a documented error, and nothing waits for it."""

from __future__ import annotations

import errno
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
    Engine,
    resume_or_start,
)
from crosstrain.engine.formats.safe_load import load_file, load_part


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


class Holder:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


LACKS: dict[str, tuple[str, int, str]] = {
    "files for a file": ("open", errno.EMFILE, "checkpoint_2"),
    "files for the folder": ("listdir", errno.ENFILE, ""),
    "memory": ("stat", errno.ENOMEM, "checkpoint_2"),
}


@pytest.mark.parametrize("lack", LACKS)
@pytest.mark.parametrize("parts", [False, True])
def test_what_a_listing_lacks_is_an_error_and_no_older_checkpoint_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: str, parts: bool
) -> None:
    """To go on from an older one, or to begin anew, would lose what was trained since."""
    with DiskSaver(tmp_path, parts=parts) as saver:
        for number in (1, 2):
            states = {"trainer": {"a": 1}, "holder": {"a": torch.ones(2)}}
            saver(states, f"checkpoint_{number}.pt")
    function, number, where = LACKS[lack]
    real = getattr(os, function)

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if where in str(path) and str(tmp_path) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    for look in (
        lambda: Checkpoint.latest(tmp_path),
        lambda: resume_or_start(Engine(lambda *_: None), {"holder": Holder()}, tmp_path, every=1),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, function, refuse)
            with pytest.raises((CheckpointCorrupt, OSError), match=os.strerror(number)) as caught:
                look()
        assert not isinstance(caught.value, CheckpointNotFound)


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
