"""Checkpoints in parts that somebody has forged, and signed: documented errors, and no others."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from crosstrain.backends import get
from crosstrain.ci.cli import main
from crosstrain.engine import (
    Checkpoint,
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotFound,
    DiskSaver,
    Engine,
    Manifest,
    read_checkpoint,
    resume_or_start,
)
from crosstrain.engine.parts.read import Parts
from crosstrain.engine.storage.local_parts import LocalParts
from crosstrain.engine.storage.parts_files import has_hash

FORGERIES = 60


def objects() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    with get("cpu:fsdp") as backend:
        made = objects()
        backend.prepare(*made.values())
        made["model"](torch.ones(1, 4)).sum().backward()
        made["optimizer"].step()
        with DiskSaver(folder) as saver:
            Checkpoint(made, saver)(Engine(lambda *_: None))
    return folder / "checkpoint_0.sharded"


def sign(folder: Path) -> None:
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    files = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_bytes(replace(manifest, files=files).encode())


def forged(value: Any, draw: random.Random) -> Any:
    """Returns a nest of which one thing is another, missing, or twice there."""
    odd = [None, (), [], {}, "text", -1, 2**70, 1.5, True, [[1]], {"a": 1}, torch.zeros(2)]
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        changed = dict(value)
        if draw.random() < 0.2:
            del changed[key]
        else:
            changed[key] = forged(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        return [*value[:index], forged(value[index], draw), *value[index + 1 :]]
    return draw.choice(odd)


def forge_rank(folder: Path, draw: random.Random) -> None:
    state = torch.load(folder / "rank-0.pt")
    torch.save(forged(state, draw), folder / "rank-0.pt")
    sign(folder)


def forge_index(folder: Path, draw: random.Random) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(forged(index, draw), default=str))
    sign(folder)


def forge_manifest(folder: Path, draw: random.Random) -> None:
    text = (folder / "manifest.json").read_bytes().rpartition(b"\nsha256:")[0]
    made = json.dumps(forged(json.loads(text), draw), default=str).encode()
    digest = hashlib.sha256(made).hexdigest().encode()
    (folder / "manifest.json").write_bytes(made + b"\nsha256:" + digest + b"\n")


@pytest.mark.parametrize("forge", [forge_rank, forge_index, forge_manifest])
def test_forgeries_end_in_documented_errors(
    saved: Path, tmp_path: Path, forge: Callable[[Path, random.Random], None]
) -> None:
    refused = 0
    for seed in range(FORGERIES):
        folder = tmp_path / str(seed) / saved.name
        shutil.copytree(saved, folder)
        forge(folder, random.Random(seed))
        for use in (
            lambda folder=folder: read_checkpoint(folder),
            lambda folder=folder: Checkpoint.load_objects(objects(), folder),
            lambda folder=folder: Checkpoint.latest(folder.parent),
        ):
            try:
                use()
            except CheckpointError:
                refused += 1
        main(["inspect", str(folder)])
    assert refused > FORGERIES


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "rank-0.pt", "__0_0.distcp"])
def test_a_link_in_a_folder_of_parts_is_not_followed(
    saved: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    for use in (read_checkpoint, lambda path: Checkpoint.load_objects(objects(), path)):
        with pytest.raises(CheckpointError, match="link"):
            use(folder)
    assert main(["inspect", str(folder)]) == 1


def test_a_part_comes_in_by_the_door_of_a_file(saved: Path, tmp_path: Path) -> None:
    """Of a record that is marked as a folder torch reads nothing, and hands out other memory."""
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    part = bytearray((folder / "__0_0.distcp").read_bytes())
    entry = part.index(b"PK\1\2")
    while not part[entry + 46 :].startswith(b"archive/data/"):
        entry = part.index(b"PK\1\2", entry + 1)
    part[entry + 38] |= 0x10
    (folder / "__0_0.distcp").write_bytes(part)
    sign(folder)
    for use in (read_checkpoint, lambda path: Checkpoint.load_objects(objects(), path)):
        with pytest.raises(CheckpointError, match="is marked as a folder"):
            use(folder)


def test_each_process_verifies_what_it_has_written(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what it reads then; and together they verify everything, however many they are."""
    found = Parts.open(saved)
    names = [*found.manifest.files, "__1_0.distcp", "__1_1.distcp", "rank-1.pt", "__12_0.distcp"]
    name_of = {hashlib.sha256(name.encode()).hexdigest(): name for name in names}
    files = {name: (len(name), told) for told, name in name_of.items()}
    for name in names:
        (tmp_path / name).write_text(name)
    many = Parts(tmp_path, replace(found.manifest, files=files), LocalParts(tmp_path))
    looked: list[str] = []

    def watched(file: Any, told: str) -> bool:
        looked.append(name_of[told])
        return has_hash(file, told)

    monkeypatch.setattr("crosstrain.engine.storage.parts_files.has_hash", watched)
    many.verify((1, 2))
    assert sorted(looked) == ["__1_0.distcp", "__1_1.distcp", "rank-1.pt"]
    for size in (1, 2, 3, 20):
        looked.clear()
        for rank in range(size):
            many.verify((rank, size))
        assert sorted(looked) == sorted(names)


def test_parts_of_schema_1_load(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "saved"))
    assert b'"schema": 2' in (folder / "manifest.json").read_bytes()
    sign(folder)
    text = (folder / "manifest.json").read_bytes().rpartition(b"\nsha256:")[0]
    assert json.loads(text)["schema"] == 1
    Checkpoint.load_objects(objects(), folder)
    part = next(folder.glob("*.distcp"))
    data = part.read_bytes()
    part.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(CheckpointCorrupt, match="its hash is not the one"):
        Checkpoint.load_objects(objects(), folder)


def test_five_thousand_objects(tmp_path: Path) -> None:
    """What is saved can be loaded: the manifest of parts has room for any number of names."""
    many = {f"part_with_a_long_name_{index}": torch.nn.Identity() for index in range(5000)}
    with DiskSaver(tmp_path, parts=True) as saver:
        Checkpoint(many, saver)(Engine(lambda *_: None))
    assert len(read_checkpoint(tmp_path / "checkpoint_0.sharded")) == 5000
    assert Checkpoint.latest(tmp_path)


def test_a_file_of_the_far_future_is_no_obstacle(tmp_path: Path) -> None:
    """What is saved after it is newer than what is believed."""
    model, engine = torch.nn.Linear(1, 1), Engine(lambda *_: None)
    with DiskSaver(tmp_path) as saver:
        saver.follow(2**63 - 2)
        Checkpoint({"model": model}, saver, filename_pattern="one.pt")(engine)
        saver._newest_ns = None
        Checkpoint({"model": model}, saver, filename_pattern="two.pt")(engine)
    assert Checkpoint.latest(tmp_path)


@pytest.mark.parametrize("ending", ["pt", "sharded"])
def test_a_link_to_what_is_not_there_is_no_new_beginning(tmp_path: Path, ending: str) -> None:
    """As where the disk of the checkpoints is not mounted."""
    (tmp_path / f"checkpoint_5.{ending}").symlink_to("/mnt/nowhere/checkpoint_5")
    with pytest.raises(CheckpointNotFound, match="is that disk mounted"):
        resume_or_start(Engine(lambda *_: None), objects(), tmp_path, every=1)


def test_a_checkpoint_does_not_decide_what_is_deleted(tmp_path: Path) -> None:
    """Names that come from a file are names in the handler's own folder, or nothing."""
    other = tmp_path / "other.pt"
    other.write_text("mine")
    handler = Checkpoint({"model": torch.nn.Linear(1, 1)}, tmp_path / "run", n_saved=1)
    names = [str(other), "../other.pt", "", ".", "..", 3, "old.pt"]
    handler.load_state_dict({"_saved": [(-1, name) for name in names]})
    handler(Engine(lambda *_: None))
    assert other.read_text() == "mine"
    assert handler.last_checkpoint == tmp_path / "run" / "model_0.pt"
