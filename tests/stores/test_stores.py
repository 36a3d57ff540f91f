"""Checkpoints in a store, by URL: what a folder does, a store does too."""

from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from resumable_program import ITERATIONS, train

from crosstrain.engine import (
    Checkpoint,
    CheckpointBusy,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    CheckpointStoreMissing,
    CheckpointWriteError,
    DiskSaver,
    Engine,
    Events,
    ModelCheckpoint,
    StorePath,
    read_checkpoint,
)
from crosstrain.engine.checkpoints.remote import RemoteCopies
from crosstrain.engine.stores import lease
from crosstrain.engine.stores.by_url import store_of
from crosstrain.engine.stores.store import Store

LOCK = ".crosstrain.lock"


def names(url: str) -> list[str]:
    """Returns what is in a folder of a store, but for what is hidden."""
    found = store_of(StorePath(url)).list()
    return sorted(one.name for one in found if not one.name.startswith("."))


def outcome(url: str, place: Path, **options: Any) -> dict[str, Any]:
    """Trains with checkpoints in a store; returns what became of it."""
    result = place / "result.json"
    train(url, str(result), options)
    return dict(json.loads(result.read_text()))


def state(value: float, size: int = 1000) -> dict[str, Any]:
    return {"weights": torch.full((size,), value), "other": {"value": value}}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("straight")
    return outcome(str(place / "checkpoints"), place)


def test_a_run_goes_on_from_a_store(
    url: str,
    tmp_path: Path,
    straight: dict[str, Any],
) -> None:
    first = outcome(url, tmp_path, signals={"7": ["SIGTERM"]})
    assert (first["iteration"], first["exit_code"]) == (7, 143)
    assert names(url) == ["checkpoint_4.pt", "checkpoint_7.pt"]
    second = outcome(url, tmp_path, seed=9)
    assert second["resumed_from"] == "checkpoint_7.pt"
    assert second["iteration"] == ITERATIONS
    assert first["losses"] + second["losses"] == straight["losses"]
    assert second["weights"] == straight["weights"]
    assert names(url) == ["checkpoint_20.pt", "checkpoint_24.pt"]


def test_saved_found_and_read(
    url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from crosstrain.ci.cli import main

    with DiskSaver(url) as saver:
        for value in (1.0, 2.0):
            saver(state(value), f"checkpoint_{value:.0f}.pt")
    latest = Checkpoint.latest(url)
    assert isinstance(latest.path, StorePath)
    assert str(latest.path) == f"{url}/checkpoint_2.pt"
    assert read_checkpoint(latest)["other"]["value"] == 2.0
    assert torch.equal(read_checkpoint(f"{url}/checkpoint_1.pt")["weights"], torch.ones(1000))
    assert main(["inspect", url]) == 0
    assert f"{url}/checkpoint_2.pt: good" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint_1\.pt.*already present"):
        DiskSaver(url)
    saver = DiskSaver(url, require_empty=False)
    saver.remove("checkpoint_2.pt")
    assert names(url) == ["checkpoint_1.pt"]
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint .*checkpoint_2\.pt.*_1\.pt"):
        read_checkpoint(f"{url}/checkpoint_2.pt")
    saver.close()


def test_what_is_damaged_is_passed_over(url: str) -> None:
    with DiskSaver(url) as saver:
        for value in (1.0, 2.0, 3.0):
            saver(state(value), f"checkpoint_{value:.0f}.pt")
    store = store_of(StorePath(url))
    whole = store.get("checkpoint_3.pt")
    at = whole.index(torch.full((20,), 3.0).numpy().tobytes())
    store.put("checkpoint_3.pt", whole[:at] + b"\x01" + whole[at + 1 :])
    whole = store.get("checkpoint_2.pt")
    store.put("checkpoint_2.pt", whole[: len(whole) // 2])
    latest = Checkpoint.latest(url)
    assert latest.path is not None
    assert latest.path.name == "checkpoint_1.pt"
    reasons = {item.path.name: item.reason for item in latest.passed_over}
    assert "contents have changed" in reasons["checkpoint_3.pt"]
    assert "cut off" in reasons["checkpoint_2.pt"]


def test_model_checkpoint_keeps_the_best(url: str) -> None:
    model = torch.nn.Linear(2, 2)
    scores = iter([0.1, 0.5, 0.3, 0.7])
    handler = ModelCheckpoint(
        url, "best", score_function=lambda _: next(scores), score_name="accuracy", n_saved=2
    )
    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler, {"model": model})
    engine.run([0] * 4)
    assert names(url) == ["best_model_accuracy=0.5000.pt", "best_model_accuracy=0.7000.pt"]
    assert str(handler.last_checkpoint) == f"{url}/best_model_accuracy=0.7000.pt"


def test_a_failed_upload_surfaces_at_the_next_iteration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "0.1")
    url = f"memory://{tmp_path.name}-fails/run"
    engine = Engine(lambda engine, batch: failed.wait(10) if engine.state.iteration == 3 else None)
    saver = DiskSaver(url, background=True)
    failed = threading.Event()

    store: Any = saver._folder
    filesystem: Any = store._store.fs

    def refuse(*args: Any, **kwargs: Any) -> None:
        failed.set()
        raise OSError(28, "the store is full")

    checkpoint = Checkpoint({"model": torch.nn.Linear(2, 2)}, saver)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), checkpoint)
    monkeypatch.setattr(filesystem, "put_file", refuse)
    with pytest.raises(CheckpointWriteError, match="the store is full") as caught:
        engine.run([0] * 10)
    assert engine.state.iteration in (2, 3, 4)
    assert url in str(caught.value)


# ------------------------------------------------------------------ two tiers


def test_a_run_goes_on_from_the_newest_good_one_of_both_tiers(
    url: str, tmp_path: Path, straight: dict[str, Any]
) -> None:
    disk = tmp_path / "disk"
    tiers = {"every": 2, "remote": url, "every_remote": 6}
    first = outcome(str(disk), tmp_path, signals={"9": ["SIGTERM"]}, **tiers)
    # Every third, and what the run has ended with.
    assert names(url) == ["checkpoint_6.pt", "checkpoint_9.pt"]
    assert sorted(path.name for path in disk.glob("*.pt")) == ["checkpoint_8.pt", "checkpoint_9.pt"]
    # The machine is another one, whose disk is empty.
    shutil.rmtree(disk)
    second = outcome(str(disk), tmp_path, seed=3, signals={"15": ["SIGTERM"]}, **tiers)
    assert second["resumed_place"] == f"{url}/checkpoint_9.pt"
    assert names(url) == ["checkpoint_12.pt", "checkpoint_15.pt"]
    # The newest on the disk is damaged, and the copy is not.
    newest = disk / "checkpoint_15.pt"
    newest.write_bytes(newest.read_bytes()[:-9])
    third = outcome(str(disk), tmp_path, seed=4, signals={"19": ["SIGTERM"]}, **tiers)
    assert third["resumed_place"] == f"{url}/checkpoint_15.pt"
    # The disk has a newer one than the store, as after a kill.
    store_of(StorePath(url)).remove("checkpoint_19.pt")
    last = outcome(str(disk), tmp_path, seed=5, **tiers)
    assert last["resumed_place"] == str(disk / "checkpoint_19.pt")
    losses = first["losses"] + second["losses"] + third["losses"] + last["losses"]
    assert losses == straight["losses"]
    assert last["weights"] == straight["weights"]
    # What was on the disk only was copied at the start.
    assert names(url) == ["checkpoint_19.pt", "checkpoint_24.pt"]


def test_a_copy_that_fails_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "the store is full")

    monkeypatch.setattr(Store, "_upload", refuse)
    url = f"memory://{tmp_path.name}-full/run"
    with pytest.raises(CheckpointWriteError, match=r"checkpoint_4\.pt was not saved.*full"):
        outcome(str(tmp_path / "disk"), tmp_path, remote=url)
    assert Checkpoint.latest(tmp_path / "disk")


def flipped(whole: bytes) -> bytes:
    """Returns a checkpoint of `state` with one byte of its tensor changed."""
    at = whole.index(torch.full((20,), 3.0).numpy().tobytes())
    return whole[:at] + b"\x01" + whole[at + 1 :]


@pytest.mark.parametrize("parts", [False, True])
def test_what_is_damaged_on_the_disk_is_not_copied(tmp_path: Path, parts: bool) -> None:
    url = f"memory://{tmp_path.name}-{parts}/run"
    with DiskSaver(tmp_path / "run", parts=parts) as saver:
        saver(state(3.0), "checkpoint_3.pt")
    path = tmp_path / "run" / ("checkpoint_3.sharded" if parts else "checkpoint_3.pt")
    damaged = path / "rank-0.pt" if parts else path
    damaged.write_bytes(flipped(damaged.read_bytes()))
    copies = RemoteCopies(StorePath(url), 1)
    copies.copy(path, 3)
    with pytest.raises(CheckpointCorrupt, match=damaged.name):
        copies.close()
    assert names(url) == []


def test_a_damaged_copy_is_put_again_by_the_next_start(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "disk"
    with DiskSaver(folder) as saver:
        saver(state(3.0), "checkpoint_3.pt")
    latest = Checkpoint.latest(folder)
    assert latest.manifest is not None
    told = latest.manifest.__class__(**{**vars(latest.manifest), "iteration": 3})
    latest = latest.__class__(latest.folder, latest.path, told, ())
    store, whole = store_of(StorePath(url)), (folder / "checkpoint_3.pt").read_bytes()
    put: list[str] = []
    upload = type(store).upload

    def counted(self: Store, name: str, *args: Any) -> None:
        put.append(name)
        upload(self, name, *args)

    monkeypatch.setattr(type(store), "upload", counted)
    store.make()
    store.put("checkpoint_3.pt", flipped(whole))
    for _ in range(2):
        copies = RemoteCopies(StorePath(url), 2)
        copies.keeps([Checkpoint.Item(3, "checkpoint_3.pt")])
        copies.catch_up(latest)
        copies.close()
        assert store.get("checkpoint_3.pt") == whole
    # The second start has found it good.
    assert put == ["checkpoint_3.pt"]


def test_what_is_saved_and_not_noted_is_not_told_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Store.put

    def refuse(store: Store, name: str, data: bytes) -> None:
        if name == ".crosstrain.saved":
            raise OSError(5, "the store is out of order")
        put(store, name, data)

    monkeypatch.setattr(Store, "put", refuse)
    url = f"memory://{tmp_path.name}-unnoted/run"
    why = r"checkpoint_1\.pt is saved, but noting its name.*out of order"
    with DiskSaver(url) as saver, pytest.raises(CheckpointWriteError, match=why):
        saver(state(1.0), "checkpoint_1.pt")
    assert read_checkpoint(f"{url}/checkpoint_1.pt")["other"]["value"] == 1.0


def test_an_old_copy_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, refused = Store.remove, ["checkpoint_4.pt", "checkpoint_8.pt"]

    def refuse(store: Store, name: str) -> None:
        if name in refused:
            refused.remove(name)
            raise OSError(5, "the store is out of order")
        remove(store, name)

    monkeypatch.setattr(Store, "remove", refuse)
    url = f"memory://{tmp_path.name}-stays/run"
    copies = RemoteCopies(StorePath(url), 1)
    with DiskSaver(tmp_path) as saver, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in (4, 8, 12, 16):
            saver(state(float(number)), f"checkpoint_{number}.pt")
            copies.copy(tmp_path / f"checkpoint_{number}.pt", number)
    copies.close()
    assert [str(one.message).split("/")[-1] for one in told] == [
        "checkpoint_4.pt could not be removed: the store is out of order",
        "checkpoint_8.pt could not be removed: the store is out of order",
    ]
    # They went with the next one.
    assert names(url) == ["checkpoint_16.pt"]


def test_tiers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"every_remote=4 says when.*remote=None"):
        outcome(str(tmp_path / "disk"), tmp_path, every_remote=4)
    with pytest.raises(ValueError, match="first tier is a folder on the disk"):
        outcome("memory://run", tmp_path, remote="memory://other")


# ------------------------------------------------------------------ two runs in one folder


class Other:
    """Another run that holds a folder, as far as its lock tells, on this machine or another."""

    def __init__(self, url: str, **told: Any) -> None:
        self.store = store_of(StorePath(url))
        self.store.make()
        values = {"token": "t", "pid": 77, "host": "elsewhere", "machine": "m", "began": "1"}
        self.told = {**values, "beat": 0, "released": False, **told}
        self.write()

    def write(self) -> None:
        self.store.put(f"{LOCK}.3", json.dumps(self.told).encode())

    def live(self, ended: threading.Event) -> None:
        while not ended.wait(0.05):
            self.told["beat"] += 1
            self.write()


def test_a_second_run_is_told_of_the_first(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.4)
    other, ended = Other(url), threading.Event()
    thread = threading.Thread(target=other.live, args=(ended,))
    thread.start()
    try:
        with pytest.raises(CheckpointBusy, match=r"process 77 on host elsewhere is saving"):
            DiskSaver(url)
    finally:
        ended.set()
        thread.join()
    # Nobody writes to it any more: it is taken over.
    with DiskSaver(url) as saver:
        saver(state(1.0), "checkpoint_1.pt")
    # It was given up in order: nobody waits.
    monkeypatch.setattr(lease, "BEAT", 1000.0)
    with DiskSaver(url, require_empty=False) as saver:
        # Who was taken for dead, and was not, learns of it before it saves.
        Other(url, released=False).store.put(f"{LOCK}.6", json.dumps(other.told).encode())
        with pytest.raises(CheckpointBusy, match="process 77 on host elsewhere has taken over"):
            saver(state(2.0), "checkpoint_2.pt")
    assert names(url) == ["checkpoint_1.pt"]


def test_of_several_that_begin_at_once_one_does(url: str) -> None:
    store = store_of(StorePath(url))
    store.make()
    made: list[int] = []
    together = threading.Barrier(4)

    def begin(number: int) -> None:
        together.wait()
        try:
            store.create("one", b"%d" % number)
            made.append(number)
        except FileExistsError:
            return

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("one") == b"%d" % made[0]
    assert len(made) == 1


# ------------------------------------------------------------------ credentials and packages

SECRET = "user:pass/word@"


def test_credentials_are_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    place = StorePath(f"sftp://{SECRET}host/runs/one?token=abcdef") / "checkpoint_1.pt"
    assert place.url == f"sftp://{SECRET}host/runs/one/checkpoint_1.pt?token=abcdef"
    shown = [str(place), repr(place), f"{place}", str(place.parent), repr([place])]
    shown += [repr(pickle.loads(pickle.dumps(place))), place.name]
    shown.append(place.hide(f"cannot reach sftp://{SECRET}host with token=abcdef, word/pass"))
    assert str(place) == "sftp://host/runs/one/checkpoint_1.pt"
    for text in shown:
        assert not any(secret in text for secret in ("user", "pass/", "abcdef")), text
    # What looks alike, and is none.
    for plain in ("sftp://host:22/a@b/c", "abfs://box@account.dfs.core.windows.net/run"):
        assert str(StorePath(plain)) == plain


Memory: Any = fsspec.get_filesystem_class("memory")


class Leaky(Memory):  # type: ignore[misc]
    """A store whose errors tell all that it knows."""

    protocol = ("leaky",)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.rpartition("@")[2].partition("?")[0].strip("/")

    def put_file(self, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, f"leaky://{SECRET}host/run?sig=signature refused user")


def test_an_error_of_the_store_gives_no_credentials_away(caplog: pytest.LogCaptureFixture) -> None:
    fsspec.register_implementation("leaky", Leaky, clobber=True)
    url = f"leaky://{SECRET}host/run?sig=signature"
    caplog.set_level(logging.DEBUG)
    saver = DiskSaver(url)
    with pytest.raises(CheckpointWriteError) as caught:
        saver(state(1.0), "checkpoint_1.pt")
    assert "leaky://host/run/checkpoint_1.pt was not saved" in str(caught.value)
    error: BaseException | None = caught.value
    told = [caplog.text, repr(saver.dirname)]
    while error is not None:
        told += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    locks = [store_of(StorePath(url)).get(f"{LOCK}.1").decode()]
    for text in told + locks:
        assert not any(secret in text for secret in ("pass/word", "signature")), text


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CheckpointStoreMissing, match="pip install gcsfs"):
        DiskSaver("gs://bucket/run")
    with pytest.raises(CheckpointError, match="pip install adlfs"):
        Checkpoint.latest("az://box/run")
    with pytest.raises(ValueError, match="no place to save to"):
        DiskSaver("nothing-of-the-kind://run")
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as caught:
        DiskSaver("s3://AKIA123:secret@bucket/run")
    assert "secret@" not in str(caught.value)


def test_a_store_takes_nothing_of_the_runs_random_numbers(
    s3_url: str,
) -> None:
    before = random.getstate()
    with DiskSaver(s3_url) as saver:
        saver(state(1.0, 10_000_000), "checkpoint_1.pt")
    read_checkpoint(f"{s3_url}/checkpoint_1.pt")
    assert random.getstate() == before
