"""Checkpoints of several processes: one of them writes, all of them take part."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoint_objects import names
from fork_server import ForkServer

from crosstrain.engine import Checkpoint, DiskSaver, Engine

pytestmark = pytest.mark.usefixtures("forked_programs")


def join(rank: int, port: int) -> None:
    """Joins a process group of two."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
    }
    dist.init_process_group("gloo")


def save_together(rank: int, port: int, folder: str, background: bool) -> None:
    """Trains a replicated model and a spread optimizer for some steps, and saves each of them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Before there is a process group, the environment tells the rank.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    saver = DiskSaver(folder, save_on_rank=1, background=background)
    join(rank, port)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    engine = Engine(lambda engine, batch: None)
    told: list[int] = []
    engine.register_events(*type(Checkpoint.SAVED_CHECKPOINT))
    engine.add_event_handler(Checkpoint.SAVED_CHECKPOINT, lambda: told.append(rank))
    handler = Checkpoint({"model": model, "optimizer": optimizer}, saver, save_on_rank=1)
    for step in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        engine.state.iteration = step + 1
        handler(engine)
        handler.wait()
    assert told == [rank] * 3
    other = torch.nn.Linear(3, 2)
    dist.barrier()
    Checkpoint.load_objects({"model": other}, Path(folder) / "checkpoint_3.pt")
    assert torch.equal(other.weight, model.module.weight)
    dist.destroy_process_group()


@pytest.mark.parametrize("background", [False, True])
def test_one_rank_writes(tmp_path: Path, background: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ForkServer("crosstrain.engine", "torch._dynamo") as server:
        ranks = [
            server.start(save_together, rank, port, str(tmp_path), background) for rank in (0, 1)
        ]
        assert [server.wait(pid) for pid in ranks] == [0, 0]
    assert names(tmp_path) == ["checkpoint_3.pt"]
    found = Checkpoint.latest(tmp_path).manifest
    assert found is not None
    assert (found.rank, found.world_size) == (1, 2)
    saved = torch.load(tmp_path / "checkpoint_3.pt")
    assert set(saved["model"]) == {"weight", "bias"}
    assert len(saved["optimizer"]["state"]) == 2


def test_ranks_that_do_not_write_hold_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    saver = DiskSaver(tmp_path / "checkpoints")
    saver({"a": 1}, "a.pt")
    saver.remove("a.pt")
    assert not (tmp_path / "checkpoints").exists()
