"""An S3 server that fails, hangs up, forgets and lags: nothing is lost, and nothing hangs."""

from __future__ import annotations

import random
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest
import torch
from s3_server import Proxy, Request, uploads
from store_storm import storm

from crosstrain.engine import (
    Checkpoint,
    CheckpointWarning,
    CheckpointWriteError,
    DiskSaver,
    StorePath,
    read_checkpoint,
)
from crosstrain.engine.stores import s3
from crosstrain.engine.stores.by_url import store_of

# 6 MiB: two parts, of the smallest size that S3 takes.
SIZE = 3 << 19
LOCK = ".crosstrain.lock."


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PIECE", 5 << 20)
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "20")


def state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((SIZE,), value), "other": {"value": value}}


def once(what: Any, wanted: Callable[[Request], bool]) -> Callable[[Request], Any]:
    """Disturbs the first request of a kind."""
    done: list[Request] = []

    def disturb(request: Request) -> Any:
        if not done and wanted(request):
            done.append(request)
            return what
        return None

    return disturb


def reads(request: Request) -> bool:
    return request.method == "GET" and "/checkpoint_" in request.path


# Of the requests of a save, and of a load.
FAULTS = {
    "a part is refused": once(500, lambda request: request.is_part),
    "a part is cut off": once("cut", lambda request: request.is_part),
    "a part's answer is lost": once("lost", lambda request: request.is_part),
    "the end is refused": once(503, lambda request: request.completes),
    "the answer to the end is lost": once("lost", lambda request: request.completes),
    "a read is refused": once(500, reads),
    "a read is cut off": once("short", reads),
    "the list is refused": once(500, lambda request: request.lists),
    "one in five of all": lambda request: 500 if Random(request.number).random() < 0.2 else None,
}


def test_a_fault_costs_nothing(proxy: Proxy, s3_url: str) -> None:
    before = random.getstate()
    proxy.disturb = once("lost", lambda request: request.method == "PUT" and LOCK in request.path)
    with DiskSaver(s3_url) as saver:
        for number, fault in enumerate(FAULTS, 1):
            proxy.disturb = FAULTS[fault]
            saver(state(number), f"checkpoint_{number}.pt")
            saver.remove(f"checkpoint_{number - 1}.pt")
            latest = Checkpoint.latest(s3_url)
            wanted = f"{s3_url}: newest good one: checkpoint_{number}.pt"
            assert latest.describe() == wanted, fault
            assert torch.equal(read_checkpoint(latest)["weights"], torch.full((SIZE,), number))
    # What the store's packages draw for their pauses is not the run's.
    assert random.getstate() == before


def test_a_server_without_conditional_puts_is_told_of(proxy: Proxy, s3_url: str) -> None:
    no = b"<Error><Code>NotImplemented</Code><Message>A header you gave</Message></Error>"
    proxy.disturb = once(
        (501, no), lambda request: request.method == "PUT" and LOCK in request.path
    )
    with (
        pytest.warns(CheckpointWarning, match="has no conditional put"),
        DiskSaver(s3_url) as saver,
    ):
        saver(state(1.0), "checkpoint_1.pt")
    assert Checkpoint.latest(s3_url)


def test_an_upload_that_has_expired_is_begun_anew(
    proxy: Proxy, s3_url: str, s3_address: str
) -> None:
    bucket = s3_url.split("/")[2]

    def expire(request: Request) -> Any:
        if not request.is_part:
            return None
        parts.append(request)
        upload = request.path.rpartition("uploadId=")[2].partition("&")[0]
        if not expired and len(parts) == 2:
            expired.append(upload)
            path = request.path.partition("?")[0]
            end = urllib.request.Request(f"{s3_address}{path}?uploadId={upload}", method="DELETE")
            with urllib.request.urlopen(end, timeout=30):
                pass
        # moto itself answers 500 to a part of an upload that it does not know.
        gone = b"<Error><Code>NoSuchUpload</Code><Message>It is gone.</Message></Error>"
        return (404, gone) if upload in expired else None

    parts: list[Request] = []
    expired: list[str] = []
    proxy.disturb = expire
    with DiskSaver(s3_url) as saver:
        saver(state(1.0), "checkpoint_1.pt")
    assert expired
    assert len(parts) > 2
    assert read_checkpoint(f"{s3_url}/checkpoint_1.pt")["other"]["value"] == 1.0
    assert uploads(s3_address, bucket) == 0


def test_a_list_that_lags_hides_nothing(proxy: Proxy, s3_url: str) -> None:
    lists: dict[str, tuple[int, bytes]] = {}

    def lag(request: Request) -> Any:
        # Each list is for ever what it was the first time.
        if request.lists:
            return lambda status, data: lists.setdefault(request.path, (status, data))
        return None

    with DiskSaver(s3_url) as saver:
        saver(state(1.0), "checkpoint_1.pt")
        proxy.disturb = lag
        assert store_of(StorePath(s3_url)).list()
        saver(state(2.0), "checkpoint_2.pt")
        saver.remove("checkpoint_1.pt")
    assert "checkpoint_2.pt" not in {one.name for one in store_of(StorePath(s3_url)).list()}
    # Not the one that is listed and gone; the one that is there and not listed.
    assert Checkpoint.latest(s3_url).describe() == f"{s3_url}: newest good one: checkpoint_2.pt"
    with DiskSaver(s3_url, require_empty=False) as saver:
        saver(state(3.0), "checkpoint_3.pt")
    assert Checkpoint.latest(s3_url).describe() == f"{s3_url}: newest good one: checkpoint_3.pt"


def test_a_store_that_is_gone_is_an_error_in_time(
    proxy: Proxy, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "1")
    saver = DiskSaver(s3_url, background=True)
    checkpoint = state(1.0)
    saver(checkpoint, "checkpoint_1.pt")
    saver.wait()
    proxy.disturb = lambda request: 500
    began = time.monotonic()
    saver(checkpoint, "checkpoint_2.pt")
    saver.remove("checkpoint_1.pt")
    with pytest.raises(CheckpointWriteError, match=r"checkpoint_2\.pt was not saved"):
        saver.wait()
    assert time.monotonic() - began < 60
    proxy.disturb = lambda request: None
    # It stays: the new one is not there.
    assert Checkpoint.latest(s3_url).describe() == f"{s3_url}: newest good one: checkpoint_1.pt"
    saver(checkpoint, "checkpoint_3.pt")
    saver.close()
    assert Checkpoint.latest(s3_url).describe() == f"{s3_url}: newest good one: checkpoint_3.pt"


def test_what_arrived_otherwise_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSTRAIN_STORE_TIMEOUT", "0.1")
    url = f"file://{tmp_path}/run"
    with DiskSaver(url) as saver:
        saver(state(1.0), "checkpoint_1.pt")
        local: Any = fsspec.get_filesystem_class("file")
        usual: Any = local.put_file

        def flip(self: Any, source: str, target: str, **kwargs: Any) -> None:
            usual(self, source, target, **kwargs)
            with Path(target).open("r+b") as file:
                file.seek(100_000)
                file.write(b"\xff")

        monkeypatch.setattr(local, "put_file", flip)
        with pytest.raises(CheckpointWriteError, match="other bytes"):
            saver(state(2.0), "checkpoint_2.pt")
    assert read_checkpoint(Checkpoint.latest(url))["other"]["value"] == 1.0


@pytest.mark.slow
def test_a_short_storm_of_kills(tmp_path: Path) -> None:
    result = storm(kills=3, folder=tmp_path, seed=1)
    assert result.problems == []
    assert result.kills == 3
