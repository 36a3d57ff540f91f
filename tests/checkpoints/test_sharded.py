"""Sharded checkpoints: exact, in any number of processes, whole or absent, safe to load."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from processes import SUPPORT, run_program, run_world

from crosstrain.backends import get
from crosstrain.ci.cli import main
from crosstrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    DiskSaver,
    Engine,
    Events,
    Manifest,
    read_checkpoint,
)
from crosstrain.engine.checkpoints.save_handler import RunFacts

PROGRAM = "sharded_program.py"


def world(size: int, folder: Path, *tasks: str, program: str = PROGRAM) -> list[Any]:
    """Does tasks in a world of processes; returns what each rank tells of them."""
    if size == 1:
        run_program(program, str(folder), *tasks)
    else:
        run_world(size, program, str(folder), *tasks)
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(size)]


def distance(mine: Any, theirs: Any) -> float:
    pairs = [(a, b) for p, q in zip(mine, theirs, strict=True) for a, b in zip(p, q, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.slow
def test_runs_go_on_in_any_number_of_processes(tmp_path: Path) -> None:
    """In the same number bit for bit; in another, sharded or not, within 1e-10 in fp64."""
    two, three = "cpu:fsdp,-,6", "cpu-fsdp-2-sharded/checkpoint_3.sharded"
    told = world(2, tmp_path, f"{two},sharded", f"cpu:fsdp,{three},6,background")
    alone = told[0][0]
    for first, second in told:
        assert first["iteration"] == second["iteration"] == 6
        # This process's parts of parameters and optimizer states.
        assert first["digest"] == second["digest"]
        assert first["saved"] == ["checkpoint_3.sharded", "checkpoint_6.sharded"]
        assert second["saved"] == ["checkpoint_6.sharded"]
        assert first["latest"] == second["latest"] == "checkpoint_6.sharded"
    assert told[0][0]["digest"] != told[1][0]["digest"], "each has its own parts"
    told = world(4, tmp_path, f"cpu:fsdp,{three},6,sharded", "cpu,-,6,sharded", f"{two},background")
    for tasks in told:
        for one in tasks:
            assert distance(one["weights"], alone["weights"]) < 1e-10, one["task"]
    whole = "cpu-1-whole/checkpoint_3.pt"
    told = world(
        1,
        tmp_path,
        "cpu,-,6,whole",
        f"cpu,{three},6,whole",
        f"cpu:fsdp,{three},6,sharded",
        "cpu,cpu-fsdp-4-background/checkpoint_3.sharded,6,sharded",
        f"cpu:fsdp,{whole},6,sharded",
    )
    for one in told[0][1:]:
        assert distance(one["weights"], alone["weights"]) < 1e-10, one["task"]
    told = world(
        2,
        tmp_path,
        f"cpu:fsdp,{whole},6,sharded",
        "cpu:fsdp,cpu-fsdp-4-background/checkpoint_3.sharded,6,sharded",
        "cpu:fsdp,cpu-4-sharded/checkpoint_3.sharded,6,sharded",
    )
    for tasks in told:
        for one in tasks:
            assert distance(one["weights"], alone["weights"]) < 1e-10, one["task"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields a folder with two checkpoints of two processes."""
    folder = tmp_path_factory.mktemp("saved")
    world(2, folder, "cpu:fsdp,-,6,sharded")
    return folder / "cpu-fsdp-2-sharded"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Returns a copy of that folder."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


def sign(folder: Path) -> None:
    """Makes the manifest fit what the files are, as an attacker would."""
    manifest = Manifest.decode((folder / "manifest.json").read_bytes())
    files = {
        name: (len(data), hashlib.sha256(data).hexdigest())
        for name in manifest.files
        for data in [(folder / name).read_bytes()]
    }
    (folder / "manifest.json").write_bytes(replace(manifest, files=files).encode())


def test_reads_as_a_whole_checkpoint(folder: Path) -> None:
    """All states by name, as torch.load gives them; they load where nothing is sharded."""
    state = read_checkpoint(folder / "checkpoint_3.sharded")
    assert list(state) == ["model", "optimizer", "scheduler", "trainer"]
    assert state["model"]["0.weight"].shape == (40, 6)
    assert state["optimizer"]["state"][0]["exp_avg"].shape == (40, 6)
    assert state["trainer"]["iteration"] == 3
    assert type(state["model"]["0.weight"]) is torch.Tensor
    torch.save(state, folder / "whole.pt")
    again = torch.load(folder / "whole.pt", weights_only=True)
    assert torch.equal(again["model"]["3.bias"], state["model"]["3.bias"])


def test_parameters_in_another_order_get_their_own_states(folder: Path) -> None:
    """States of optimizers are found by the names of parameters."""

    def objects(order: list[int]) -> dict[str, Any]:
        torch.manual_seed(5)
        model = torch.nn.Linear(3, 3)
        parameters = list(model.parameters())
        return {
            "model": model,
            "optimizer": torch.optim.Adam([parameters[at] for at in order], lr=0.1),
        }

    def step(objects: dict[str, Any]) -> None:
        objects["model"](torch.arange(3.0)[None]).square().sum().backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()

    with get("cpu:fsdp") as backend:
        first = objects([0, 1])
        backend.prepare(*first.values())
        step(first)
        with DiskSaver(folder / "order") as saver:
            Checkpoint(first, saver)(Engine(lambda *_: None))
        second = objects([1, 0])
        Checkpoint.load_objects(second, folder / "order" / "checkpoint_0.sharded")
        step(first)
        step(second)
        for mine, theirs in zip(
            second["model"].parameters(), first["model"].parameters(), strict=True
        ):
            assert torch.equal(mine, theirs.full_tensor())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit": (lambda f: _flip(f / "__1_0.distcp"), r"__1_0\.distcp is damaged, or of another"),
    "rank bit": (lambda f: _flip(f / "rank-1.pt"), r"rank-1\.pt is damaged"),
    "metadata": (lambda f: _flip(f / ".metadata"), r"\.metadata is damaged"),
    "index": (lambda f: _flip(f / "index.json"), r"index\.json is damaged"),
    "manifest": (lambda f: _flip(f / "manifest.json"), r"manifest is damaged"),
    "missing": (lambda f: (f / "rank-1.pt").unlink(), r"rank-1\.pt is missing"),
    "missing shard": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json in it"),
    "cut": (
        lambda f: (f / "__0_0.distcp").write_bytes((f / "__0_0.distcp").read_bytes()[:-9]),
        r"has [0-9,]+ bytes and was written with",
    ),
    "mixed": (
        lambda f: shutil.copy(f.parent / "checkpoint_6.sharded" / "__1_0.distcp", f),
        r"__1_0\.distcp is damaged, or of another checkpoint",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No damaged checkpoint loads, and the newest good one is another."""
    newest = folder / "checkpoint_6.sharded"
    if name == "mixed":
        newest = folder / "checkpoint_3.sharded"
    damage, message = DAMAGES[name]
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(newest)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.load_objects({"model": torch.nn.Linear(1, 1)}, newest)
    latest = Checkpoint.latest(folder)
    if name != "mixed":
        assert latest.path == folder / "checkpoint_3.sharded"
        assert [over.path for over in latest.passed_over] == [newest]
        assert re.search(message, latest.passed_over[0].reason)
    assert main(["inspect", str(newest)]) == 1
    assert re.search(message, capsys.readouterr().out)


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_planted_code_does_not_run(folder: Path, tmp_path: Path) -> None:
    """Nothing in a signed, hostile checkpoint is called."""
    mark, target = tmp_path / "mark", folder / "checkpoint_3.sharded"
    planted = pickle.dumps(Planted(mark))
    pickle.loads(planted)
    assert mark.exists(), "the plant works"
    mark.unlink()

    (target / ".metadata").write_bytes(planted)
    sign(target)
    assert read_checkpoint(target)["trainer"]["iteration"] == 3, "torch's metadata are not read"

    shard = folder / "checkpoint_6.sharded" / "__0_0.distcp"
    size = shard.stat().st_size
    shard.write_bytes(planted + bytes(size - len(planted)))
    sign(shard.parent)
    with pytest.raises(CheckpointError, match="it is a bare pickle"):
        read_checkpoint(shard.parent)

    torch.save(
        {"states": Planted(mark), "same": [], "places": [], "names": []}, target / "rank-0.pt"
    )
    sign(target)
    with pytest.raises(CheckpointError, match="Path"):
        read_checkpoint(target)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["chunks"][0].__setitem__(2, "/etc/passwd"), "none of its files"),
        (lambda e: e["chunks"][0].__setitem__(2, "../other/__0_0.distcp"), "none of its files"),
        (lambda e: e["chunks"][0].__setitem__(2, "__7_0.distcp"), "none of its files"),
        (lambda e: e["chunks"][0].__setitem__(3, 10**9), "beyond __0_0.distcp"),
        (lambda e: e["chunks"][0].__setitem__(3, -1), "beyond __0_0.distcp"),
        (lambda e: e["chunks"].pop(), "do not make it up"),
        (lambda e: e["chunks"].append(e["chunks"][0]), "do not make it up"),
        (lambda e: e["chunks"].__setitem__(1, e["chunks"][0]), "do not make it up"),
        (lambda e: e.__setitem__("size", [10**9, 10**9]), "do not make it up"),
        (lambda e: e.__setitem__("dtype", "nn"), "no dtype"),
        (lambda e: e["chunks"][0].__setitem__(1, [10**9, 6]), "reaches beyond"),
    ],
)
def test_hostile_index_is_refused(folder: Path, change: Any, message: str) -> None:
    """An index leads to no other file, and makes nothing that the files do not hold."""
    target = folder / "checkpoint_3.sharded"
    index = json.loads((target / "index.json").read_text())
    change(index["model.0.weight"])
    (target / "index.json").write_text(json.dumps(index))
    sign(target)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(target)


def test_hostile_manifest_is_refused(folder: Path) -> None:
    """A manifest lists no file that is not in the folder."""
    target = folder / "checkpoint_3.sharded"
    manifest = Manifest.decode((target / "manifest.json").read_bytes())
    files = {**manifest.files, "../checkpoint_6.sharded/rank-0.pt": (1, "0" * 64)}
    (target / "manifest.json").write_bytes(replace(manifest, files=files).encode())
    with pytest.raises(CheckpointError, match="which none has"):
        read_checkpoint(target)


def test_inspect_tells_and_verifies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`crosstrain inspect` shows one sharded checkpoint, and those of a folder."""
    assert main(["inspect", str(folder / "checkpoint_3.sharded")]) == 0
    shown = capsys.readouterr().out
    for text in ("good", "iteration   3", "world size  2", "optimizer", "by its hash"):
        assert text in shown
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(one["path"]).name for one in found] == [
        "checkpoint_6.sharded",
        "checkpoint_3.sharded",
    ]
    assert all(one["verified"] for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["foreground", "background"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_write_that_fails_in_one_process_fails_in_all(
    tmp_path: Path, mode: str, size: int
) -> None:
    """All raise it in the same iteration, what was there stays good, and the next save is."""
    told = world(size, tmp_path, mode, program="sharded_fails_program.py")
    assert told[0]["iteration"] == told[-1]["iteration"]
    where = "rank 1: .*" if size == 2 else ""
    saying = f"CheckpointWriteError: .*checkpoint_6.sharded was not saved: {where}File too large"
    for one in told:
        assert re.match(saying, one["error"])
        assert one["after"] == "checkpoint_3.sharded"
        assert one["again"] == "checkpoint_7.sharded"
        visible = [name for name in one["left"] if not name.startswith(".")]
        assert visible == ["checkpoint_7.sharded"]


def test_folder_is_kept_in_order(tmp_path: Path) -> None:
    """Old ones go after the new one, leftovers at the next start; a name can be used again."""
    model = torch.nn.Linear(2, 2)
    engine = Engine(lambda *_: None)
    with DiskSaver(tmp_path / "run", background=True, parts=True) as saver:
        handler = Checkpoint({"model": model, "trainer": engine}, saver, n_saved=2)
        engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        engine.run([None] * 5)
        assert handler.last_checkpoint == tmp_path / "run" / "checkpoint_5.sharded"
    names = ["checkpoint_4.sharded", "checkpoint_5.sharded"]
    run = tmp_path / "run"
    assert sorted(p.name for p in run.glob("*.sharded")) == names
    (run / ".crosstrain-0.parts").mkdir()
    (run / "checkpoint_5.sharded").rename(run / ".crosstrain-aside-checkpoint_5.sharded")
    with pytest.raises(ValueError, match="already present"):
        DiskSaver(run)
    with DiskSaver(run, require_empty=False, parts=True) as saver:
        assert sorted(p.name for p in run.iterdir() if "lock" not in p.name) == names
        torch.nn.init.ones_(model.weight)
        saver.prepare(RunFacts(iteration=5))
        saver({"model": model.state_dict()}, "checkpoint_5.pt")
    assert sorted(p.name for p in run.iterdir() if "lock" not in p.name) == names
    assert Checkpoint.latest(run).path == run / "checkpoint_5.sharded"
    assert bool((read_checkpoint(run / "checkpoint_5.sharded")["model"]["weight"] == 1).all())


def test_what_cannot_be_removed_does_not_lose_what_took_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with DiskSaver(tmp_path, parts=True, background=True) as saver:
        saver({"model": {"value": 1}}, "best.pt")
        saver.wait()
        # As on NFS, while another process reads it.
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", refuse)
            for value in (2, 3):
                saver({"model": {"value": value}}, "best.pt")
                with pytest.warns(CheckpointWarning, match="best.sharded is saved, and the one"):
                    saver.wait()
                assert read_checkpoint(tmp_path / "best.sharded")["model"] == {"value": value}
        saver({"model": {"value": 4}}, "best.pt")
    DiskSaver(tmp_path, require_empty=False).close()
    assert [p.name for p in tmp_path.iterdir() if "lock" not in p.name] == ["best.sharded"]
    assert read_checkpoint(tmp_path / "best.sharded")["model"] == {"value": 4}


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """What cannot be saved safely is refused before anything is written."""
    with DiskSaver(tmp_path / "run", parts=True) as saver:
        with pytest.raises(CheckpointError, match="it is code"):
            saver({"model": {"function": print}}, "checkpoint_1.pt")
        assert [p.name for p in (tmp_path / "run").iterdir()] == []


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """A rank is killed in an accumulation window; torchrun starts all again, which ends alike."""
    digests: list[list[str]] = []
    for name, kill_at in (("whole", "99"), ("killed", "8")):
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
        command += ["--nproc-per-node", "2", "--max-restarts", "1"]
        command += [str(SUPPORT / "sharded_resume_program.py"), str(folder), kill_at]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = run(command, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]
        digests.append([one["digest"] for one in told])
        for one in told:
            assert one["iteration"] == 12
            assert one["saved"][-1] == "checkpoint_9.sharded"
            assert (one["from"] is None) == (name == "whole")
    assert digests[0] == digests[1]
