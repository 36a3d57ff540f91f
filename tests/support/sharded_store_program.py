"""A rank of a world of sharded trainings, whose checkpoints go to a store in several parts each.

Called with a folder for what it tells, and tasks of the form `NAME=PLACE`: `run` trains with
checkpoints in a folder or at a URL; `odd` likewise, with names that are no UTF-8; `tiers` with a
folder beside what it tells, and every second checkpoint at a URL; `refused` saves where the store
refuses it, then where it does not; `noted` likewise, where only the noting of it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from crosstrain.backends import get
from crosstrain.engine import (
    Checkpoint,
    CheckpointWriteError,
    DiskSaver,
    create_supervised_trainer,
    resume_or_start,
)
from crosstrain.engine.stores import s3

# The smallest that S3 takes.
PART = 5 << 20
ITERATIONS = 12


def build(backend: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Makes a model whose checkpoint has 6 MiB of each of two ranks: two parts of an upload."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(512, 3072), torch.nn.ReLU(), torch.nn.Linear(3072, 2)
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def run(backend: Any, place: str, **options: Any) -> dict[str, Any]:
    """Trains, or goes on; tells a digest of this rank's parts."""
    model, optimizer = build(backend)
    trainer = create_supervised_trainer(
        model, optimizer, torch.nn.functional.mse_loss, backend=backend, deterministic=True
    )
    objects = {"model": model, "optimizer": optimizer}
    resumed = resume_or_start(trainer, objects, place, every=3, **options)
    x = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x[:, :2])
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    trainer.run(loader, max_epochs=2)
    values = [*model.state_dict().values()]
    values += [one["momentum_buffer"] for one in optimizer.state_dict()["state"].values()]
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.to_local().numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "from": None if resumed.resumed_from is None else resumed.resumed_from.name,
        "place": str(resumed.resumed_from),
        "iteration": trainer.state.iteration,
        "first": model.state_dict()["0.bias"].full_tensor().tolist(),
    }


def refused(backend: Any, place: str) -> dict[str, Any]:
    """Saves twice; tells what the first save has met, and what is there after each."""
    os.environ["CROSSTRAIN_STORE_TIMEOUT"] = "0.5"
    model, optimizer = backend.prepare(*build(backend))
    told: dict[str, Any] = {}
    with DiskSaver(place) as saver:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        try:
            saver(states, "refused_1.pt")
        except CheckpointWriteError as error:
            told["error"] = str(error)
        saver(states, "good_2.pt")
        latest = Checkpoint.latest(place)
        told["after"] = None if latest.path is None else latest.path.name
    return told


def main(folder: Path, tasks: list[str]) -> None:
    """Does all tasks in one process group."""
    s3.PIECE = PART
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    with get("cpu:fsdp") as backend:
        told: dict[str, Any] = {}
        for task in tasks:
            name, _, place = task.partition("=")
            if name == "odd":
                told[task] = run(backend, place, filename_prefix=os.fsdecode(b"\xe9\x1b[2J\n"))
            elif name == "tiers":
                disk = str(folder / "disk")
                told[task] = run(backend, disk, remote=place, every_remote=6)
            else:
                told[task] = (run if name == "run" else refused)(backend, place)
            # At once: it may be killed in the next one.
            (folder / f"told-{backend.world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
