"""A folder of checkpoints: one writer at a time, leftovers removed, the newest good one found."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_objects import BATCHES, made, names
from fork_server import ForkServer
from saving_programs import refusing

from crosstrain.engine import (
    Checkpoint,
    CheckpointBusy,
    CheckpointNotFound,
    CheckpointWarning,
    CheckpointWriteError,
    DiskSaver,
    Engine,
    Events,
    read_checkpoint,
)
from crosstrain.engine.storage import lock


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer("crosstrain.engine") as server:
        yield server


# The kinds of lock: on the folder itself, or, as on a network file system, on a file in it.
KINDS = pytest.mark.parametrize("on_file", [False, True], ids=["folder", "file"], indirect=True)


@pytest.fixture
def on_file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether folders are locked by a file in them, as where other machines see them, too."""
    monkeypatch.setattr(lock, "_is_of_this_machine", lambda folder: not request.param)
    return bool(request.param)


def set_kind(on_file: bool) -> None:
    """Does the same for good: in a process that ends."""
    lock._is_of_this_machine = lambda folder: not on_file


def hold_folder(folder: str, told: str, on_file: bool) -> None:
    """Holds a folder until it is killed."""
    set_kind(on_file)
    saver = DiskSaver(folder, require_empty=False)
    Path(told).write_text(str(os.getpid()))
    signal.pause()
    saver.close()


def hold_folder_with_a_worker(folder: str, told: str, on_file: bool) -> None:
    """Holds a folder, with a child that is forked off meanwhile and lives on."""
    set_kind(on_file)
    saver = DiskSaver(folder, require_empty=False)
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    Path(told).write_text(str(os.getpid()))
    signal.pause()
    saver.close()


def save_in_fork(folder: str, told: str, on_file: bool) -> None:
    """Tries to save into the folder of the process that it was forked off."""
    set_kind(on_file)
    saver = DiskSaver(folder)
    if os.fork() == 0:
        try:
            DiskSaver(folder, require_empty=False)
        except CheckpointBusy as error:
            Path(told).write_text(str(error))
        os._exit(0)
    os.wait()
    saver({"a": 1}, "a.pt")


def _when_written(path: Path) -> str:
    while not (path.exists() and path.read_text()):
        time.sleep(0.005)
    return path.read_text()


@KINDS
@pytest.mark.parametrize("program", [hold_folder, hold_folder_with_a_worker])
def test_a_second_process_is_told_of_the_first(
    server: ForkServer, tmp_path: Path, program: object, on_file: bool
) -> None:
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    pid = server.start(program, str(folder), str(told), on_file)  # type: ignore[arg-type]
    assert _when_written(told) == str(pid)
    with pytest.raises(CheckpointBusy, match=rf"process {pid} on host .* {folder}"):
        DiskSaver(folder)
    # Reading needs no lock.
    assert not Checkpoint.latest(folder)
    os.kill(pid, signal.SIGKILL)
    server.wait(pid)
    DiskSaver(folder).close()


@pytest.mark.parametrize("on_file", [False, True])
def test_a_forked_child_is_another_process(
    server: ForkServer, tmp_path: Path, on_file: bool
) -> None:
    told = tmp_path / "told"
    assert server.run(save_in_fork, str(tmp_path / "checkpoints"), str(told), on_file) == 0
    assert "is saving checkpoints into" in told.read_text()
    assert names(tmp_path / "checkpoints") == ["a.pt"]


@KINDS
def test_two_savers_of_one_process_share_the_folder(
    server: ForkServer, tmp_path: Path, on_file: bool
) -> None:
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    first = DiskSaver(folder)
    second = DiskSaver(folder, require_empty=False)
    first.close()
    del first
    second({"a": 1}, "a.pt")
    # Closing the first has not given up the second's lock.
    pid = server.start(hold_folder, str(folder), str(told), on_file)
    assert server.wait(pid) == 1
    assert not told.exists()
    second.close()


@pytest.mark.parametrize("on_file", [True], indirect=True)
def test_a_copy_of_the_folder_gives_it_to_nobody(
    server: ForkServer, tmp_path: Path, on_file: bool
) -> None:
    """To close any descriptor of the lock's file drops the lock; the next save takes it again."""
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    with DiskSaver(folder) as saver:
        shutil.copytree(folder, tmp_path / "backup")
        saver({"a": 1}, "a.pt")
        pid = server.start(hold_folder, str(folder), str(told), on_file)
        assert server.wait(pid) == 1
        shutil.copytree(folder, tmp_path / "another")
        # Now another process has taken it: the next save is told of that.
        pid = server.start(hold_folder, str(folder), str(told), on_file)
        assert _when_written(told) == str(pid)
        with pytest.raises(CheckpointBusy, match=rf"process {pid} on host .* {folder}"):
            saver({"a": 2}, "b.pt")
        assert names(folder) == ["a.pt"]
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)


def test_a_second_saver_leaves_alone_what_the_first_one_writes(tmp_path: Path) -> None:
    with DiskSaver(tmp_path):
        at_work = tmp_path / ".crosstrain-0123456789abcdef.tmp"
        at_work.write_bytes(b"half")
        DiskSaver(tmp_path, require_empty=False).close()
        assert at_work.exists()


@contextlib.contextmanager
def listed(folder: Path) -> Iterator[set[tuple[str, ...]]]:
    """Lists a folder again and again, in a thread; yields all that was ever seen."""
    seen: set[tuple[str, ...]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            # A list may be read in two parts: what is in one part of it was there at one time.
            seen.add(tuple(sorted(os.listdir(folder))))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


# What of the unfinished is seen where it cannot be hidden: hidden from `ls`, and never the last.
NAMED = re.compile(r"\.crosstrain-.*\.(tmp|parts)")
OPTIONS: dict[str, dict[str, bool]] = {
    "at once": {},
    "background": {"background": True},
    "overlap": {"background": True, "overlap": True},
    "named": {},
    "parts": {"parts": True},
    "background parts": {"parts": True, "background": True},
}


@pytest.mark.parametrize("mode", OPTIONS)
def test_a_folder_holds_checkpoints_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Also while a run goes on and saves: whoever lists it and takes the last has a checkpoint."""
    if not lock._is_of_this_machine(tmp_path):
        pytest.skip("a network file system: its lock is a file in the folder")
    if mode == "named":
        monkeypatch.setattr(os, "open", refusing("open", errno.EOPNOTSUPP))
    objects = made()
    handler = Checkpoint(objects, DiskSaver(tmp_path, **OPTIONS[mode]), n_saved=2)
    objects["trainer"].add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    with listed(tmp_path) as seen:
        objects["trainer"].run(BATCHES, max_epochs=4)
        handler.wait()
    assert len(seen) > 3
    assert len(os.listdir(tmp_path)) == 2
    hidden_too = mode == "named" or "parts" in mode
    for found in seen:
        whole = [name for name in found if name.startswith("checkpoint_")]
        assert len(whole) <= 3
        assert all(name in whole or (hidden_too and NAMED.fullmatch(name)) for name in found)
        assert not whole or found[-1] in whole


def test_where_no_link_is_allowed_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refusing("link", errno.EPERM))
    with DiskSaver(tmp_path) as saver:
        saver({"weight": torch.arange(3000.0)}, "a.pt")
        saver({"weight": torch.arange(5000.0)}, "a.pt")
    assert torch.equal(read_checkpoint(tmp_path / "a.pt")["weight"], torch.arange(5000.0))
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_folder_that_was_made_anew_is_locked_anew(server: ForkServer, tmp_path: Path) -> None:
    folder, told = tmp_path / "checkpoints", tmp_path / "told"
    with DiskSaver(folder) as saver:
        shutil.rmtree(folder)
        folder.mkdir()
        saver({"a": 1}, "a.pt")
        assert server.wait(server.start(hold_folder, str(folder), str(told), False)) == 1
        shutil.rmtree(folder)
        folder.mkdir()
        pid = server.start(hold_folder, str(folder), str(told), False)
        assert _when_written(told) == str(pid)
        with pytest.raises(CheckpointBusy, match=f"process {pid} "):
            saver({"a": 2}, "b.pt")
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)


@pytest.mark.parametrize("ending", [".tmp", ".parts"])
@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling", "fifo"])
def test_leftovers_of_any_kind_are_removed(tmp_path: Path, ending: str, kind: str) -> None:
    folder, somebodys = tmp_path / "checkpoints", tmp_path / "somebodys"
    left = folder / f".crosstrain-0123456789abcdef{ending}"
    folder.mkdir()
    somebodys.mkdir()
    (somebodys / "file").touch()
    if kind == "folder":
        left.mkdir()
        (left / "in it").touch()
    elif kind in ("link", "dangling"):
        left.symlink_to(somebodys if kind == "link" else tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(left)
    else:
        left.touch()
    with DiskSaver(folder):
        assert not left.exists()
        assert not left.is_symlink()
    assert (somebodys / "file").exists()


@pytest.mark.parametrize("on_file", [True], indirect=True)
@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "folder", "fifo"])
def test_a_lock_that_is_no_file_is_not_written_to(tmp_path: Path, kind: str, on_file: bool) -> None:
    folder, somebodys = tmp_path / "checkpoints", tmp_path / "somebodys"
    folder.mkdir()
    name = folder / ".crosstrain.lock"
    if kind != "dangling":
        somebodys.write_text("not to be written over")
    if kind in ("link", "dangling"):
        name.symlink_to(somebodys)
    elif kind == "hard link":
        name.hardlink_to(somebodys)
    elif kind == "folder":
        name.mkdir()
    else:
        os.mkfifo(name)
    with pytest.raises(CheckpointWriteError, match="has not made"):
        DiskSaver(folder)
    if kind == "dangling":
        assert not somebodys.exists()
    else:
        assert somebodys.read_text() == "not to be written over"


def test_what_a_killed_process_left_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".crosstrain-0123456789abcdef.tmp"
    left.write_bytes(b"half")
    others = [".hidden", "notes.tmp", ".crosstrain-other"]
    for name in others:
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO), DiskSaver(tmp_path):
        assert not left.exists()
    assert "had not finished" in caplog.text
    assert all((tmp_path / name).exists() for name in others)


@KINDS
def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_file: bool
) -> None:
    import fcntl

    left = tmp_path / ".crosstrain-0123456789abcdef.tmp"
    left.touch()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf" if on_file else "flock", refuse)
    with pytest.warns(CheckpointWarning, match=r"has no locks \(No locks available\)"):
        saver = DiskSaver(tmp_path)
    # It may be another's, at work.
    assert left.exists()
    saver({"a": 1}, "a.pt")
    saver.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five checkpoints of a run, saved one after the other."""
    objects = made()
    with DiskSaver(tmp_path) as saver:
        handler = Checkpoint(objects, saver, n_saved=None)
        objects["trainer"].add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
        objects["trainer"].run(BATCHES)
    return tmp_path


def test_latest_walks_back_to_the_newest_good_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Checkpoint.latest(folder).path == folder / "checkpoint_10.pt"
    (folder / "checkpoint_10.pt").write_bytes((folder / "checkpoint_10.pt").read_bytes()[:-1])
    data = bytearray((folder / "checkpoint_8.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "checkpoint_8.pt").write_bytes(data)
    torch.save({"model": {}}, folder / "foreign.pt")
    (folder / "checkpoint_6.pt").rename(folder / "best.pt")
    (folder / "empty.pt").touch()
    (folder / "folder.pt").mkdir()
    (folder / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        found = Checkpoint.latest(folder)
    assert found.path == folder / "checkpoint_4.pt"
    assert found
    reasons = {item.path.name: item.reason for item in found.passed_over}
    assert set(reasons) == {
        "checkpoint_10.pt",
        "checkpoint_8.pt",
        "best.pt",
        "foreign.pt",
        "empty.pt",
    }
    assert "cut off" in reasons["checkpoint_10.pt"]
    assert "have changed since it was saved" in reasons["checkpoint_8.pt"]
    assert "was saved as checkpoint_6.pt" in reasons["best.pt"]
    assert "no manifest" in reasons["foreign.pt"]
    assert "empty" in reasons["empty.pt"]
    assert all(name in caplog.text for name in reasons)
    with pytest.warns(CheckpointWarning, match=r"was saved as checkpoint_6\.pt \(iteration 6\)"):
        Checkpoint.load_objects(made(), folder / "best.pt")


def test_swapped_files_are_noticed(folder: Path) -> None:
    first, second = folder / "checkpoint_10.pt", folder / "checkpoint_8.pt"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert Checkpoint.latest(folder).path == folder / "checkpoint_6.pt"


def test_latest_with_certain_objects(folder: Path) -> None:
    with DiskSaver(folder, require_empty=False) as saver:
        Checkpoint({"model": torch.nn.Linear(1, 1)}, saver, "best")(Engine(lambda *_: None))
    assert Checkpoint.latest(folder).path == folder / "best_model_0.pt"
    found = Checkpoint.latest(folder, objects=["trainer"])
    assert found.path == folder / "checkpoint_10.pt"
    assert found.passed_over[0].reason == "it does not hold trainer"


def test_latest_of_nothing(tmp_path: Path) -> None:
    found = Checkpoint.latest(tmp_path)
    assert not found
    assert found.path is None
    with pytest.raises(CheckpointNotFound, match="no good checkpoint"):
        Checkpoint.load_objects(made(), found)
    with pytest.raises(CheckpointNotFound, match="no folder"):
        Checkpoint.latest(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointNotFound, match="cannot be read as a folder"):
        Checkpoint.latest(tmp_path / "file")


def test_the_newest_is_the_last_one_saved_whatever_the_clock_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The clock is set back, and the run was taken up again from an earlier iteration.
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    with DiskSaver(folder, require_empty=False) as saver:
        for iteration in (5, 7):
            trainer = made()["trainer"]
            trainer.state.iteration, trainer.state.epoch_length = iteration, 10
            objects = made() | {"trainer": trainer}
            Checkpoint(objects, saver)(trainer)
            assert Checkpoint.latest(folder).path == folder / f"checkpoint_{iteration}.pt"


def test_times_of_files_that_were_copied_do_not_matter(folder: Path) -> None:
    os.utime(folder / "checkpoint_2.pt", (2**31, 2**31))
    os.utime(folder / "checkpoint_10.pt", (1, 1))
    assert Checkpoint.latest(folder).path == folder / "checkpoint_10.pt"


def test_an_unreadable_file_is_passed_over(folder: Path) -> None:
    (folder / "checkpoint_10.pt").unlink()
    (folder / "checkpoint_10.pt").symlink_to(folder / "gone")
    assert Checkpoint.latest(folder).path == folder / "checkpoint_8.pt"


def test_a_relative_folder_is_where_it_was_whatever_the_program_does_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step, a handler or a library may go to another folder in the middle of a run."""
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with DiskSaver("run", background=True) as saver:
        handler = Checkpoint({"model": torch.nn.Linear(1, 1)}, saver, n_saved=2)
        engine = Engine(lambda *_: None)
        engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: os.chdir(tmp_path / "elsewhere")
        )
        engine.run([0] * 4)
    assert names(tmp_path / "run") == ["model_3.pt", "model_4.pt"]
    assert names(tmp_path / "elsewhere" / "run") == []
    assert handler.last_checkpoint == tmp_path / "run" / "model_4.pt"


def test_what_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for place, why in {
        "link": "link is a link to nowhere, where nothing is: is that disk mounted",
        "link/run": "link is a link to nowhere",
        "file": "file is no folder",
        "file/run": "file is no folder",
    }.items():
        with pytest.raises(CheckpointWriteError, match=why):
            DiskSaver(tmp_path / place)
    with pytest.raises(TypeError, match="should be text, got b'run'"):
        DiskSaver(b"run")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with DiskSaver(tmp_path / "run") as saver:
        (tmp_path / "run").rmdir()
        with pytest.raises(CheckpointWriteError, match="The folder is gone") as caught:
            saver({"a": 1}, "a.pt")
        assert "as they were" not in str(caught.value)
