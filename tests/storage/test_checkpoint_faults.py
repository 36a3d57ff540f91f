"""A save that the file system refuses leaves what was there, and says which file and why."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fork_server import ForkServer
from saving_programs import Saver, load_newest, save_and_fail

from crosstrain.engine import CheckpointError, CheckpointWriteError, DiskSaver


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("saving_programs") as server:
        yield server


@pytest.mark.parametrize(
    ("scheme", "mode", "code", "short"),
    [
        ("", "sync", errno.EIO, False),
        ("", "named", errno.ENOSPC, True),
        ("", "background", errno.ENOSPC, False),
        ("", "same-name", errno.EIO, False),
        ("file://", "background", errno.ENOSPC, False),
        ("file://", "same-name", errno.ENOSPC, True),
    ],
)
def test_each_system_call_fails_by_turns(
    server: ForkServer, tmp_path: Path, scheme: str, mode: str, code: int, short: bool
) -> None:
    folder, told = f"{scheme}{tmp_path}/checkpoints", tmp_path / "told"
    Saver(folder, mode if mode == "same-name" else "sync").save(1)
    saved = 1
    seen: set[str] = set()
    moment = 0
    while True:
        moment += 1
        value = saved + 1
        arguments = (folder, mode, value, moment, code, str(told), short)
        assert server.run(save_and_fail, *arguments) == 0
        failed, raised = told.read_text().splitlines()
        saved_now = load_newest(folder)
        if not failed:
            break
        seen.add(failed)
        if scheme and not raised:
            # What fails once is tried again.
            assert saved_now == value, failed
            saved = saved_now
            continue
        kind, name, message = raised.split("|", 2)
        assert (kind, name) == ("CheckpointWriteError", errno.errorcode[code])
        assert folder in message
        assert os.strerror(code) in message
        # From its name on, the new one is there, whole, whatever fails afterwards.
        assert saved_now in (saved, value)
        saved = saved_now
    named = {"named": {"replace"}, "same-name": {"link", "replace"}}.get(mode, {"link"})
    if scheme:
        named = {"replace"}
    assert seen >= {"open", "write", "pwrite", "fsync", "close", *named}
    assert saved_now == value
    assert not list((tmp_path / "checkpoints").glob(".crosstrain-*.tmp"))


def test_file_size_limit_at_many_sizes(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path), "sync")
    saver.save(1)
    size = (tmp_path / "checkpoint_1.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for value, limit in enumerate([0, 1, 4095, *range(size // 40, size, size // 40), size - 1], 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointWriteError, match=rf"checkpoint_{value}\.pt.*EFBIG"):
                saver.save(value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert load_newest(tmp_path) == 1
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["checkpoint_1.pt"]
        assert not list(tmp_path.glob("*.tmp"))
    saver.save(100)
    assert load_newest(tmp_path) == 100


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory whose size can be changed by mounting it again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root and mount; test_file_size_limit covers this part")
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounting.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here ({mounting.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


@pytest.mark.parametrize("mode", ["sync", "background", "same-name"])
def test_full_disk_at_many_sizes(
    small_disk: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(str(small_disk), mode)
    saver.save(1)
    (file,) = small_disk.glob("*.pt")
    size = file.stat().st_size
    page = resource.getpagesize()
    told_free = os.statvfs

    def unlimited(path: Path) -> os.statvfs_result:
        # As with a quota, or when another process takes the space meanwhile: the check says there
        # is room, and the disk is full in the middle of a write.
        values = list(told_free(path))
        values[2] = values[3] = values[4] = 1 << 30
        return os.statvfs_result(values)

    for value, room in enumerate(range(0, size, size // 25), 2):
        _resize(small_disk, (size // page + 1) * page + room // page * page)
        with pytest.raises(CheckpointWriteError, match="ENOSPC") as checked:
            saver.save(value)
        assert "are free in" in str(checked.value)
        monkeypatch.setattr(os, "statvfs", unlimited)
        with pytest.raises(CheckpointWriteError, match="No space left on device") as full:
            saver.save(value)
        monkeypatch.undo()
        assert full.value.errno == errno.ENOSPC
        assert str(small_disk) in str(full.value)
        assert load_newest(small_disk) == 1
    _resize(small_disk, 16 << 20)
    saver.save(100)
    assert load_newest(small_disk) == 100


@pytest.mark.parametrize("full", ["store", "staging"])
def test_a_store_on_a_full_disk(
    small_disk: Path, tmp_path: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = small_disk if full == "store" else tmp_path / "store"
    saver = Saver(f"file://{place}", "background")
    saver.save(1)
    (file,) = place.glob("*.pt")
    size, page = file.stat().st_size, resource.getpagesize()
    there = size if full == "store" else 0
    if full == "staging":
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    for value, room in enumerate(range(0, size, size // 8), 2):
        # The lock is written again meanwhile.
        _resize(small_disk, (there // page + 4) * page + room // page * page)
        why = (
            "uploading it failed" if full == "store" else "staging it failed.* are free in .*TMPDIR"
        )
        with pytest.raises(
            CheckpointWriteError, match=rf"{value}\.pt was not saved: {why}"
        ) as told:
            saver.save(value)
        assert told.value.errno == errno.ENOSPC
        if full == "store":
            assert load_newest(f"file://{place}") == 1
    if full == "staging":
        _resize(small_disk, 4 * page)
        with pytest.raises(CheckpointError, match=r"cannot be read: ENOSPC: it takes .* are free"):
            load_newest(f"file://{place}")
    _resize(small_disk, 16 << 20)
    saver.save(100)
    assert load_newest(f"file://{place}") == 100


def test_retention_keeps_its_count_after_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(str(tmp_path), "background")
    saver.save(1)

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointWriteError):
        saver.save(2)
    monkeypatch.undo()
    assert saver.checkpoint.last_checkpoint == tmp_path / "checkpoint_1.pt"
    saver.save(3)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_3.pt"]


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointWriteError, match="file"):
        DiskSaver(tmp_path / "file" / "checkpoints")
    with pytest.raises(ValueError, match=r"not found.*create_dir=True"):
        DiskSaver(tmp_path / "nothing", create_dir=False)


def test_in_place_writing_is_whole_too_if_nothing_stops_it(tmp_path: Path) -> None:
    DiskSaver(tmp_path, atomic=False)({"weight": torch.ones(3)}, "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt")["weight"], torch.ones(3))
