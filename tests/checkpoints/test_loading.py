"""Loading from the memory of the file: what is verified and read, and that nothing stays there."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from crosstrain.engine import Checkpoint, CheckpointCorrupt, DiskSaver, read_checkpoint
from crosstrain.engine.formats.safe_load import load_file
from crosstrain.engine.parts.read import own_states
from crosstrain.engine.storage.atomic import HashingFile
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.storage.tree_hash import LEAF, TreeCheck, TreeHash

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="files are mapped on Linux")


class Keeper:
    """Keeps whatever it is given."""

    def __init__(self, state: Any = None, on_load: Callable[[], None] = lambda: None) -> None:
        self.state = state
        self._on_load = on_load

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self._on_load()
        self.state = state


class Hooked(torch.nn.Linear):
    """Keeps the weights that it is given, by a hook, and something more."""

    def __init__(self) -> None:
        super().__init__(700, 700)
        self.kept: Any = None
        self.extra = torch.zeros(3)
        self.register_load_state_dict_pre_hook(self._keep)

    def _keep(self, module: Any, state: dict[str, Any], *_: Any) -> None:
        self.kept = state["weight"]

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def trained(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.BatchNorm1d(700))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 700)).square().sum().backward()
    optimizer.step()
    hooked = Hooked()
    hooked.extra = torch.ones(3)
    keeper = Keeper({"ema": [torch.randn(700, 700)], "n": 3})
    return {"model": model, "optimizer": optimizer, "hooked": hooked, "keeper": keeper}


def save(folder: Path, objects: dict[str, Any]) -> Path:
    states = {name: value.state_dict() for name, value in objects.items()}
    with DiskSaver(folder) as saver:
        saver(states, "state.pt")
    return folder / "state.pt"


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for item in value.values() for part in flat(item)]
    if isinstance(value, (list, tuple)):
        return [part for item in value for part in flat(item)]
    return [value]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def mapped_here(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def of_schema_1(file: bytes) -> bytes:
    """Returns a checkpoint as versions before the hashes of blocks wrote it."""
    at = file.rindex(b"PK\5\6") + 22
    payload = file[: at - 2]
    digest = hashlib.sha256(payload + b"\0\0").hexdigest()
    told = replace(Manifest.decode(file[at:]), sha256=digest, block_size=0, blocks=()).encode()
    return payload + len(told).to_bytes(2, "little") + told


# ------------------------------------------------------------------ nothing stays in the file


@linux
@pytest.mark.parametrize("kwargs", [{}, {"assign": True}, {"strict": False}])
def test_objects_are_the_same_when_the_file_is_gone(tmp_path: Path, kwargs: Any) -> None:
    saved = trained()
    path = save(tmp_path, saved)
    objects = trained(1)
    Checkpoint.load_objects(objects, path, **kwargs)
    assert not mapped_here(path)
    os.truncate(path, 0)
    for name, value in saved.items():
        assert same(value.state_dict(), objects[name].state_dict()), name
    assert torch.equal(objects["hooked"].kept, saved["hooked"].weight)
    # The optimizer's memory is its own: a step changes it.
    objects["model"](torch.randn(4, 700)).sum().backward()
    objects["optimizer"].step()


@linux
def test_an_object_that_refuses_its_state_leaves_nothing_in_the_file(tmp_path: Path) -> None:
    saved = trained()
    path = save(tmp_path, saved)
    objects = trained(1)

    def refuse() -> None:
        raise ValueError("not this one")

    objects["keeper"] = Keeper(None, refuse)
    with pytest.raises(RuntimeError, match="not this one"):
        Checkpoint.load_objects(objects, path)
    os.truncate(path, 0)
    assert same(saved["optimizer"].state_dict(), objects["optimizer"].state_dict())


def test_what_is_shared_and_looked_at_in_odd_ways_stays_so(tmp_path: Path) -> None:
    base = torch.randn(600_000)
    numbers = torch.randn(9, 5, dtype=torch.complex64)
    state = {
        "base": base,
        "again": base.view(600, 1000).T,
        "same": base,
        "conj": numbers.conj(),
        "neg": numbers.conj().imag,
        "expanded": torch.ones(1).expand(7),
        "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "key": {(1, "a"): torch.arange(3, dtype=torch.int16)},
    }
    path = save(tmp_path, {"keeper": Keeper(state), "other": Keeper({"base": base})})
    keeper, other = Keeper(), Keeper()
    Checkpoint.load_objects({"keeper": keeper, "other": other}, path)
    assert same(keeper.state, state)
    assert same(keeper.state, load_file(path).state["keeper"])
    keeper.state["base"].fill_(7)
    assert keeper.state["again"].eq(7).all()
    assert keeper.state["same"] is keeper.state["base"]
    assert other.state["base"].eq(7).all()
    assert not base.eq(7).any()


@linux
def test_a_load_takes_no_memory_beside_the_objects(tmp_path: Path) -> None:
    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    model = torch.nn.Linear(4096, 4096)
    path = save(tmp_path, {"model": model})
    used: list[int] = []
    # It is called while the state is still there.
    model.register_load_state_dict_post_hook(lambda *_: used.append(own_memory()))
    before = own_memory()
    Checkpoint.load_objects({"model": model}, path)
    assert used[0] - before < 0.1 * path.stat().st_size


@pytest.mark.parametrize("how", ["written", "cut", "longer"])
def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path: Path, how: str) -> None:
    saved = trained()
    path = save(tmp_path, saved)

    def interfere() -> None:
        with path.open("r+b") as file:
            if how == "cut":
                file.truncate(path.stat().st_size - 9)
            else:
                file.seek(0 if how == "written" else path.stat().st_size)
                file.write(b"PK\3\4")

    objects = trained(1)
    objects["keeper"] = Keeper(None, interfere)
    with pytest.raises(CheckpointCorrupt, match=r"state\.pt.*written to while"):
        Checkpoint.load_objects(objects, path)


def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path: Path) -> None:
    saved = trained()
    path = save(tmp_path, saved)
    order: list[str] = []

    def replace_it() -> None:
        order.append("replaced")
        with DiskSaver(tmp_path, atomic=False, require_empty=False) as saver:
            saver({"other": {"a": 1}}, "state.pt")

    objects = {"keeper": Keeper(None, replace_it), **{k: trained(1)[k] for k in ("model",)}}
    Checkpoint.load_objects(objects, path)
    assert order == ["replaced"]
    assert same(saved["model"].state_dict(), objects["model"].state_dict())
    assert load_file(path).state == {"other": {"a": 1}}


@pytest.mark.parametrize("whole", [True, False])
def test_parts_that_are_replaced_meanwhile_are_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    def write() -> None:
        with DiskSaver(tmp_path, parts=True, require_empty=False) as saver:
            saver({"model": torch.nn.Linear(2, 2).state_dict()}, "state.pt")

    def and_replace(*arguments: Any) -> Any:
        found = own_states(*arguments)
        write()
        return found

    write()
    monkeypatch.setattr("crosstrain.engine.checkpoints.loading.own_states", and_replace)
    monkeypatch.setattr("crosstrain.engine.checkpoints.layouts.own_states", and_replace)
    path = tmp_path / "state.sharded"
    load = partial(Checkpoint.load_objects, {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointCorrupt, match="replaced by another checkpoint"):
        (read_checkpoint if whole else load)(path)


# ------------------------------------------------------------------ what is verified


def test_damage_anywhere_is_found_and_what_is_not_needed_is_not_read(tmp_path: Path) -> None:
    draw = random.Random(5)
    big = {name: Keeper({"x": torch.randn(1_500_000)}) for name in ("first", "second", "third")}
    path = save(tmp_path, big)
    good = path.read_bytes()
    for name, keeper in big.items():
        number: Any = keeper.state["x"].numpy()
        at = good.index(number.tobytes()) + draw.randrange(2 * LEAF, 3 * LEAF)
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        for wanted in big:
            loaded = Keeper()
            if wanted == name:
                with pytest.raises(CheckpointCorrupt, match="have changed since it was saved"):
                    Checkpoint.load_objects({wanted: loaded}, path)
                assert loaded.state is None
            else:
                Checkpoint.load_objects({wanted: loaded}, path)
                assert same(loaded.state, big[wanted].state)
        with pytest.raises(CheckpointCorrupt, match="have changed since it was saved"):
            Checkpoint.load_objects({name: Keeper() for name in big}, path)
        with pytest.raises(CheckpointCorrupt, match="have changed since it was saved"):
            load_file(path)
    for at in draw.sample(range(len(good)), 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(CheckpointCorrupt):
            load_file(path, take=lambda state, _: state)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_kept_is_read_and_verified_in_one_pass_wherever_it_lies(
    tmp_path: Path, damaged: bool
) -> None:
    draw = random.Random(3)
    data = bytearray(draw.randbytes(LEAF) * 67 + draw.randbytes(5000))
    size = len(data)
    data[-2:] = b"\0\0"
    whole = TreeHash()
    whole.update(bytes(data))
    tree = whole.tree()
    data[-2:] = b"??"
    # Long and short, side by side and apart, over the bounds of pieces, leaves and blocks.
    cuts = {0, size - 4000, LEAF, 2 * LEAF - 3, 2 * LEAF + 3, 5 * LEAF + 70_000}
    cuts |= {draw.randrange(size - 4000) for _ in range(60)}
    cuts |= {30 * LEAF + 700 * i for i in range(200)}
    bounds = sorted(cuts)
    runs = [run for run in pairwise(bounds) if draw.random() < 0.7]
    draw.shuffle(runs)
    places = [(begin, memoryview(bytearray(end - begin))) for begin, end in runs]
    if damaged:
        data[runs[0][0]] ^= 1
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        check = TreeCheck(file.fileno(), tree)
        if damaged:
            with pytest.raises(CheckpointCorrupt, match="have changed since it was saved"):
                check.verify(None, places)
            return
        # Some of what is kept lies in blocks that were verified before.
        check.verify([(0, 10), (30 * LEAF, 30 * LEAF + 1)])
        check.verify(None, places)
    assert all(view == data[at : at + len(view)] for at, view in places)


def test_an_optimizer_with_a_state_and_one_without_load_the_same(tmp_path: Path) -> None:
    saved = trained()
    path = save(tmp_path, saved)
    fresh = trained(1)
    fresh["optimizer"] = torch.optim.AdamW(fresh["model"].parameters())
    for objects in (fresh, trained(2)):
        Checkpoint.load_objects(objects, path)
        assert same(saved["optimizer"].state_dict(), objects["optimizer"].state_dict())


def test_files_without_hashes_of_blocks_load(tmp_path: Path) -> None:
    saved = trained()
    path = save(tmp_path, saved)
    old = of_schema_1(path.read_bytes())
    path.write_bytes(old)
    loaded = load_file(path)
    assert loaded.manifest is not None
    assert loaded.manifest.tree is None
    objects = trained(1)
    Checkpoint.load_objects(objects, path)
    for name, value in saved.items():
        assert same(value.state_dict(), objects[name].state_dict())
    at = len(old) // 2
    path.write_bytes(old[:at] + bytes([old[at] ^ 1]) + old[at + 1 :])
    with pytest.raises(CheckpointCorrupt, match="have changed since it was saved"):
        Checkpoint.load_objects({"model": trained(1)["model"]}, path)


def test_a_schema_of_the_future_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, {"keeper": Keeper({"a": 1})})
    file = path.read_bytes()
    at = file.rindex(b"PK\5\6") + 22
    text = file[at:].rpartition(b"\nsha256:")[0].replace(b'"schema": 2', b'"schema": 3')
    told = text + b"\nsha256:" + hashlib.sha256(text).hexdigest().encode() + b"\n"
    path.write_bytes(file[: at - 2] + len(told).to_bytes(2, "little") + told)
    with pytest.raises(CheckpointCorrupt, match=r"schema 3 .* reads schemas 1 and 2: install"):
        load_file(path)


@pytest.mark.parametrize("size", [1, LEAF - 1, LEAF, LEAF + 1, 5 * LEAF, 64 * LEAF, 64 * LEAF + 1])
def test_the_writer_hashes_as_the_reader_does_in_pieces_of_any_size(
    tmp_path: Path, size: int
) -> None:
    draw = random.Random(size)
    data = draw.randbytes(min(size, LEAF + 1)) * (size // (LEAF + 1) + 1)
    data = data[:size]
    descriptor = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        made = TreeHash()
        file = HashingFile(descriptor, made)
        at = 0
        while at < size:
            piece = data[at : at + draw.choice([1, 1000, LEAF - 1, LEAF, 3 * LEAF + 7])]
            file.write(piece)
            at += len(piece)
        file.finish()
        tree = made.tree()
    finally:
        os.close(descriptor)
    leaves = [blake3(data[i : i + LEAF]).digest() for i in range(0, size, LEAF)]
    many = tree.block_size // LEAF
    blocks = [b"".join(leaves[i : i + many]) for i in range(0, len(leaves), many)]
    assert list(tree.blocks) == [hashlib.sha256(block).hexdigest() for block in blocks]
    assert (tmp_path / "x").read_bytes() == data
    assert tree.size == size
    assert len(blocks) <= 64
