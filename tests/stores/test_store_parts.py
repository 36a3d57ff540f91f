"""Checkpoints in parts in a store: whole or absent, whoever dies, and nothing is left of them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from forked import ForkedPopen
from processes import SUPPORT
from s3_server import Proxy, Request, uploads

from crosstrain.ci.cli import main
from crosstrain.engine import (
    Checkpoint,
    CheckpointCorrupt,
    CheckpointNotFound,
    CheckpointWarning,
    CheckpointWriteError,
    DiskSaver,
    Engine,
    StorePath,
    read_checkpoint,
    resume_or_start,
)
from crosstrain.engine.stores.by_url import store_of
from crosstrain.engine.stores.store import Store
from crosstrain.engine.stores.store_parts import remove_parts

PROGRAM = SUPPORT / "sharded_store_program.py"


def names(url: str) -> list[str]:
    """Returns what is in a folder of a store, but for what is hidden."""
    found = store_of(StorePath(url)).list()
    return sorted(one.name for one in found if not one.name.startswith("."))


def state(value: float, size: int = 1000) -> dict[str, Any]:
    return {"weights": torch.full((size,), value), "other": {"value": value}}


def parts_of(url: str, name: str) -> Store:
    """Returns the folder with the files of a checkpoint."""
    (found,) = [one for one in names(url) if one.startswith(f"{name}.") and ".parts" in one]
    return store_of(StorePath(url) / found)


def saved(url: str, *values: int) -> None:
    with DiskSaver(url, parts=True, require_empty=False) as saver:
        for value in values:
            saver(state(value), f"checkpoint_{value}.pt")


def test_saved_found_read_and_removed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with DiskSaver(url, parts=True) as saver:
        saver(state(1), "checkpoint_1.pt")
        saver(state(2), "checkpoint_2.pt")
        # One of the same name takes its place, and shares no file with it.
        saver(state(3), "checkpoint_2.pt")
        assert str(saver.path_of("checkpoint_2.pt")) == f"{url}/checkpoint_2.sharded"
        assert [name.endswith(".parts") for name in names(url)] == [True, False] * 2
        latest = Checkpoint.latest(url)
        assert latest.describe() == f"{url}: newest good one: checkpoint_2.sharded"
        assert torch.equal(read_checkpoint(latest)["weights"], torch.full((1000,), 3.0))
        assert main(["inspect", url]) == 0
        assert f"{url}/checkpoint_1.sharded: good" in capsys.readouterr().out
        saver.remove("checkpoint_1.pt")
        saver.remove("checkpoint_2.pt")
        assert names(url) == []
        assert str(saver.path_of("checkpoint_2.pt")) == f"{url}/checkpoint_2.pt"
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint .*checkpoint_2\.sharded"):
        read_checkpoint(f"{url}/checkpoint_2.sharded")


def test_damage_is_found(url: str) -> None:
    saved(url, 1, 2, 3)
    changed, gone = parts_of(url, "checkpoint_3"), parts_of(url, "checkpoint_2")
    data = bytearray(changed.get("rank-0.pt"))
    data[len(data) // 2] ^= 1
    changed.put("rank-0.pt", bytes(data))
    gone.remove(".metadata")
    latest = Checkpoint.latest(url)
    assert latest.path is not None
    assert latest.path.name == "checkpoint_1.sharded"
    reasons = [over.reason for over in latest.passed_over]
    assert "rank-0.pt is damaged, or of another checkpoint" in reasons[0]
    assert ".metadata is missing" in reasons[1]
    with pytest.raises(CheckpointCorrupt, match="is damaged"):
        Checkpoint.load_objects({"other": Holder()}, f"{url}/checkpoint_3.sharded")
    store = store_of(StorePath(url))
    store.put("checkpoint_1.sharded", store.get("checkpoint_1.sharded")[:-9])
    with pytest.raises(CheckpointCorrupt, match="its manifest is damaged"):
        read_checkpoint(f"{url}/checkpoint_1.sharded")


@pytest.mark.parametrize("parts", [False, True])
def test_what_there_is_no_room_for_is_not_passed_over(
    tmp_path: Path, parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go on from an older one, for which there is, would lose what was trained since."""
    url = f"file://{tmp_path}"
    with DiskSaver(url, parts=parts) as saver:
        for number, size in ((1, 10), (2, 100_000)):
            states = {"trainer": {"a": 1}, "holder": {"a": torch.ones(size)}}
            saver(states, f"checkpoint_{number}.pt")
    told = list(os.statvfs("/"))
    # Bytes in a block, and blocks in all, free, and free for users.
    told[0:2], told[2:5] = [1, 1], [1 << 40, 50_000, 50_000]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(told))
    why = r"checkpoint_2\S+ cannot be read: ENOSPC: it takes .* 50,000 are free"
    with pytest.raises(CheckpointCorrupt, match=why):
        Checkpoint.latest(url)
    with pytest.raises(CheckpointCorrupt, match=why):
        resume_or_start(Engine(lambda *_: None), {"holder": Holder()}, url, every=1)


class Holder:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_start_removes_what_has_no_manifest(url: str) -> None:
    saved(url, 1, 2)
    before = names(url)
    store = store_of(StorePath(url))
    for name in (
        "checkpoint_2.1700000000000000000.parts",
        "checkpoint_9.1800000000000000000.parts",
    ):
        left = store_of(StorePath(url) / name)
        left.make()
        left.put("__0_0.distcp", b"left")
    store.put("mine.parts", b"of somebody else")
    assert Checkpoint.latest(url).describe().endswith("checkpoint_2.sharded")
    saved(url)
    assert names(url) == [*before, "mine.parts"]


def test_a_save_that_fails_leaves_nothing(
    proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "0.2")
    with DiskSaver(s3_url, parts=True, background=True) as saver:
        saver(state(1), "checkpoint_1.pt")
        saver.wait()
        before = names(s3_url)
        for refused in ("rank-0.pt", "checkpoint_2.sharded"):
            proxy.disturb = lambda request, name=refused: (
                500 if request.method == "PUT" and request.path.endswith(name) else None
            )
            saver(state(2), "checkpoint_2.pt")
            saver.remove("checkpoint_1.pt")
            with pytest.raises(CheckpointWriteError, match=r"checkpoint_2\.sharded was not saved"):
                saver.wait()
            proxy.disturb = lambda request: None
            assert Checkpoint.latest(s3_url).describe().endswith("checkpoint_1.sharded")
    saved(s3_url)
    assert names(s3_url) == before


class World:
    """Two ranks of the program, each told its place as torchrun does, and forked (see `forked`).

    Args:
        folder: for what they tell.
        tasks: what they do.
    """

    def __init__(self, folder: Path, *tasks: str) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.log = (folder / "log").open("wb")
        self.ranks: list[ForkedPopen] = []
        for rank in ("0", "1"):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, str(PROGRAM), str(folder), *tasks]
            environment = {**os.environ, **world}
            self.ranks.append(
                ForkedPopen(command, stdout=self.log, stderr=self.log, env=environment)
            )

    def end(self) -> list[int]:
        """Waits for the ranks; returns their exit codes."""
        try:
            return [rank.wait(timeout=120) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
                rank.wait()
            self.log.close()

    def told(self, task: str) -> list[Any]:
        """Returns what each rank tells of a task."""
        paths = [self.folder / f"told-{rank}.json" for rank in (0, 1)]
        return [json.loads(path.read_text())[task] for path in paths]

    def text(self) -> str:
        return (self.folder / "log").read_text()


@pytest.mark.parametrize("harm", ["changed", "gone", "manifest", "other", "none"])
def test_a_damaged_copy_is_put_again_by_the_next_start(
    url: str, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a copy in parts, what is damaged; all of it where its manifest is another."""
    disk, store = tmp_path / "disk", store_of(StorePath(url))
    parts: Any = {"holder": Holder()}

    def start() -> None:
        trainer = Engine(lambda *_: None)
        resume_or_start(trainer, parts, disk, every=1, remote=url).checkpoint.wait()
        trainer.run([0] * 3)

    saver_of = DiskSaver.__init__
    in_parts = functools.partialmethod(saver_of, parts=True)
    monkeypatch.setattr(DiskSaver, "__init__", in_parts)
    warnings.simplefilter("ignore")
    start()
    good = parts_of(url, "checkpoint_3")
    whole = {one.name: good.get(one.name) for one in good.list()}
    if harm == "changed":
        good.put("rank-0.pt", whole["rank-0.pt"][:-1] + b"?")
    elif harm == "gone":
        good.remove("index.json")
    elif harm == "manifest":
        store.put("checkpoint_3.sharded", b"nothing")
    elif harm == "other":
        remove_parts(store, "checkpoint_3.sharded", lambda: None)
        with DiskSaver(url, require_empty=False) as saver:
            saver(state(5), "checkpoint_3.pt")
    put, upload = [], type(store).upload

    def counted(self: Store, name: str, *args: Any) -> None:
        put.append(name)
        upload(self, name, *args)

    monkeypatch.setattr(type(store), "upload", counted)
    start()
    found = parts_of(url, "checkpoint_3")
    assert {one.name: found.get(one.name) for one in found.list()} == whole
    assert Checkpoint.latest(url).describe().endswith("checkpoint_3.sharded")
    once = {"changed": ["rank-0.pt"], "gone": ["index.json"], "none": []}
    assert sorted(put) == once.get(harm, sorted([*whole, "checkpoint_3.sharded"]))


@pytest.mark.slow
def test_a_rank_that_dies_while_it_uploads(
    proxy: Proxy, s3_url: str, s3_address: str, tmp_path: Path
) -> None:
    """Nothing is lost but the checkpoint that was not yet complete, and the bits are the same."""
    refused = f"{s3_url}-refused"
    killed: list[str] = []

    def kill(request: Request) -> Any:
        if "-refused/refused_1" in request.path and "__1_0" in request.path:
            return 500 if request.method == "PUT" else None
        if "-noted/.crosstrain.saved" in request.path:
            begun = any("-noted/good_2" in one.path for one in proxy.requests)
            return 500 if request.method == "PUT" and not begun else None
        own = request.is_part and "checkpoint_6" in request.path and "__0_0" in request.path
        if own and "partNumber=2" in request.path and not killed:
            killed.append(request.path)
            # The other one has uploaded its own by then, or will have.
            os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGKILL)
        return None

    proxy.disturb = kill
    noted = f"noted={s3_url}-noted"
    before = (f"run={tmp_path}/straight", f"refused={refused}", noted)
    first = World(tmp_path, *before, f"run={s3_url}")
    codes = first.end()
    assert codes[0] == -signal.SIGKILL, first.text()
    assert codes[1] not in (0, -signal.SIGKILL), first.text()
    # What the other one has uploaded is no checkpoint.
    assert (
        Checkpoint.latest(s3_url).describe() == f"{s3_url}: newest good one: checkpoint_3.sharded"
    )
    assert any(name.startswith("checkpoint_6.") for name in names(s3_url))

    straight = first.told(f"run={tmp_path}/straight")
    for one in first.told(f"refused={refused}"):
        assert "refused_1.sharded was not saved: rank 1: uploading __1_0.distcp" in one["error"]
        assert one["after"] == "good_2.sharded"
    assert [name.split(".")[0] for name in names(refused)] == ["good_2", "good_2"]
    for rank, one in enumerate(first.told(noted)):
        whose = "" if rank == 0 else "Rank 0: "
        why = rf"{whose}Checkpoint \S+refused_1\.sharded is saved, but noting its name"
        assert re.match(why, one["error"]), one
    assert "refused_1.sharded" in names(f"{s3_url}-noted")

    begun = len(proxy.requests)
    proxy.disturb = one_in_five_writes
    second = World(tmp_path, f"run={s3_url}")
    assert second.end() == [0, 0], second.text()
    resumed = second.told(f"run={s3_url}")
    assert [one["from"] for one in resumed] == ["checkpoint_3.sharded"] * 2
    assert [one["digest"] for one in resumed] == [one["digest"] for one in straight]
    assert straight[0]["digest"] != straight[1]["digest"], "each has its own parts"
    # Of what it went on from, each rank has fetched its own, once.
    read = [request for request in proxy.requests[begun:] if request.method == "GET"]
    for rank in (0, 1):
        of_rank = [one for one in read if f".parts/__{rank}_0" in one.path]
        assert len(of_rank) == 1
    # In one process, all of it; and nothing else is there.
    whole = read_checkpoint(Checkpoint.latest(s3_url))
    assert whole["model"]["0.bias"].tolist() == straight[0]["first"]
    assert [name.split(".")[0] for name in names(s3_url)] == [
        *["checkpoint_12"] * 2,
        *["checkpoint_9"] * 2,
    ]
    assert uploads(s3_address, s3_url.split("/")[2]) == 0


@pytest.mark.slow
def test_every_second_one_goes_from_the_disk_to_the_store(
    proxy: Proxy, s3_url: str, s3_address: str, tmp_path: Path
) -> None:
    """A rank that dies while it copies costs the copy only, and a lost disk what was not copied."""
    killed: list[str] = []

    def kill(request: Request) -> None:
        own = request.is_part and "checkpoint_12" in request.path and "__1_0" in request.path
        if own and not killed:
            killed.append(request.path)
            os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)

    proxy.disturb = kill
    disk, tiers = tmp_path / "disk", f"tiers={s3_url}"
    first = World(tmp_path, f"run={tmp_path}/straight", tiers)
    codes = first.end()
    assert codes[1] == -signal.SIGKILL, first.text()
    assert codes[0] not in (0, -signal.SIGKILL), first.text()
    digests = [one["digest"] for one in first.told(f"run={tmp_path}/straight")]
    newest = [Checkpoint.latest(place).describe() for place in (disk, s3_url)]
    assert newest[0].endswith("checkpoint_12.sharded")
    assert newest[1].endswith("checkpoint_6.sharded")

    # The machines are others, whose disk is empty.
    kept = disk.rename(tmp_path / "kept")
    second = World(tmp_path, tiers)
    assert second.end() == [0, 0], second.text()
    for rank, one in enumerate(second.told(tiers)):
        assert one["place"] == f"{s3_url}/checkpoint_6.sharded"
        assert one["digest"] == digests[rank]
    assert sorted(path.name for path in disk.iterdir()) == [
        "checkpoint_12.sharded",
        "checkpoint_9.sharded",
    ]
    both = [*["checkpoint_12"] * 2, *["checkpoint_6"] * 2]
    assert [name.split(".")[0] for name in names(s3_url)] == both

    # The same as the first, but for a disk that is there: what is on it only is copied then.
    store = store_of(StorePath(s3_url))
    remove_parts(store, "checkpoint_12.sharded", lambda: None)
    shutil.rmtree(disk)
    kept.rename(disk)
    third = World(tmp_path, tiers)
    assert third.end() == [0, 0], third.text()
    for rank, one in enumerate(third.told(tiers)):
        assert one["place"] == str(disk / "checkpoint_12.sharded")
        assert one["digest"] == digests[rank]
    assert [name.split(".")[0] for name in names(s3_url)] == both
    # File by file what was saved.
    copied = store_of(StorePath(s3_url) / names(s3_url)[0])
    for path in (disk / "checkpoint_12.sharded").iterdir():
        if path.name != "manifest.json":
            assert copied.get(path.name) == path.read_bytes()
    assert Checkpoint.latest(s3_url).describe().endswith("checkpoint_12.sharded")
    assert uploads(s3_address, s3_url.split("/")[2]) == 0


@pytest.mark.slow
def test_a_copy_that_one_rank_cannot_make_ends_the_run_on_all(
    proxy: Proxy, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "0.5")
    proxy.disturb = lambda request: 500 if request.is_part and "__1_0" in request.path else None
    odd = f"odd={tmp_path}/odd"
    world = World(tmp_path, odd, odd, f"tiers={s3_url}")
    assert world.end() == [1, 1], world.text()
    # Names that are no UTF-8 are told between the ranks, too: saved, and resumed from.
    for told in world.told(odd):
        assert os.fsencode(told["from"]) == b"\xe9\x1b[2J\n_checkpoint_12.sharded"
    assert "\x1b" not in world.text()
    why = "checkpoint_6.sharded was not saved: rank 1: uploading __1_0.distcp it failed with"
    for rank in (0, 1):
        told = rf"\[rank{rank}\]: crosstrain\.\S*CheckpointWriteError: .*{why}"
        assert re.search(told, world.text()), world.text()
    assert names(s3_url) == []
    assert not Checkpoint.latest(tmp_path / "disk").passed_over


def one_in_five_writes(request: Request) -> Any:
    writes = request.method in ("PUT", "POST")
    return 500 if writes and Random(request.number).random() < 0.2 else None


def test_what_cannot_be_removed_is_a_warning(
    proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "0.2")
    saved(s3_url, 1)
    with DiskSaver(s3_url, parts=True, require_empty=False) as saver:
        saver(state(2), "checkpoint_2.pt")
        saver(state(3), "checkpoint_3.pt")
        proxy.disturb = lambda request: 500 if request.method in ("DELETE", "POST") else None
        # The other ranks of a sharded model would wait for one that ends alone.
        for name in ("checkpoint_1", "checkpoint_2"):
            with pytest.warns(CheckpointWarning, match=f"{name}.* could not be removed"):
                saver.remove(f"{name}.pt")
        proxy.disturb = lambda request: None
    assert Checkpoint.latest(s3_url).describe().endswith("checkpoint_3.sharded")
