"""A training whose checkpoints go to a store in several parts; a child of a fork server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import get
from crosstrain.engine import (
    Checkpoint,
    CheckpointEvents,
    Events,
    create_supervised_trainer,
    resume_or_start,
)
from crosstrain.engine.spread import is_spread
from crosstrain.engine.stores import s3

# The smallest that S3 takes.
PART = 5 << 20
EPOCH = 10


def train_rank(
    url: str, place: str, iterations: int, every: int, rank: int, size: int, port: int
) -> None:
    """Trains as one of several processes that a sharded model is spread over.

    Args:
        url: see `train`, as for the next three.
        place: likewise; what it tells has the rank's number in its name.
        iterations: likewise.
        every: likewise.
        rank: of this process.
        size: how many there are.
        port: where they meet.
    """
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"})
    torch.set_num_threads(1)
    with get("cpu:fsdp") as backend:
        train(url, place, iterations, every, backend, f"-{rank}")


def train(
    url: str, place: str, iterations: int, every: int, backend: Any = None, own: str = ""
) -> None:
    """Trains with checkpoints of 16 MiB, which go in four parts.

    Args:
        url: of the checkpoints.
        place: a folder for what it tells: `saved`, the last iteration whose checkpoint is said to
            be saved; `losses`, a line for each iteration; `end`, a digest of the last weights.
        iterations: how many there are to be in all.
        every: after how many iterations to save.
        backend: what it trains on.
        own: what the names of what it tells end with.
    """
    s3.PIECE = PART
    told = Path(place)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1024, 2048),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(2048, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = torch.randn(4 * EPOCH, 1024, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), batch_size=4, shuffle=True)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        torch.nn.functional.cross_entropy,
        deterministic=True,
        backend=backend,
    )
    trainer.register_events(*CheckpointEvents)
    run = resume_or_start(trainer, {"model": model, "optimizer": optimizer}, url, every=every)
    (told / f"saved{own}").touch()

    @trainer.on(Checkpoint.SAVED_CHECKPOINT)
    def saved(engine: Any) -> None:
        last: Any = run.checkpoint.last_checkpoint
        _overwrite(told / f"saved{own}", last.name.partition("_")[2].partition(".")[0])

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Any) -> None:
        with (told / f"losses{own}").open("a") as file:
            file.write(f"{engine.state.iteration} {engine.state.output.hex()}\n")

    trainer.run(loader, max_epochs=iterations // EPOCH)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        value: Any = parameter.detach()
        digest.update((value.to_local() if is_spread(value) else value).numpy().tobytes())
    _overwrite(told / f"end{own}", digest.hexdigest())


def _overwrite(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)
