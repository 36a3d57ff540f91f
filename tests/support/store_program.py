"""A training whose checkpoints go to a store in several parts; a child of a fork server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import (
    Checkpoint,
    CheckpointEvents,
    Events,
    create_supervised_trainer,
    resume_or_start,
)
from crosstrain.engine.storage import s3

# The smallest that S3 takes.
PART = 5 << 20
EPOCH = 10


def train(url: str, place: str, iterations: int, every: int) -> None:
    """Trains with checkpoints of 16 MiB, which go in four parts.

    Args:
        url: of the checkpoints.
        place: a folder for what it tells: `saved`, the last iteration whose checkpoint is said to
            be saved; `losses`, a line for each iteration; `end`, a digest of the last weights.
        iterations: how many there are to be in all.
        every: after how many iterations to save.
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
        model, optimizer, torch.nn.functional.cross_entropy, deterministic=True
    )
    trainer.register_events(*CheckpointEvents)
    run = resume_or_start(trainer, {"model": model, "optimizer": optimizer}, url, every=every)
    (told / "saved").touch()

    @trainer.on(Checkpoint.SAVED_CHECKPOINT)
    def saved(engine: Any) -> None:
        last: Any = run.checkpoint.last_checkpoint
        _overwrite(told / "saved", last.name.removeprefix("checkpoint_").removesuffix(".pt"))

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Any) -> None:
        with (told / "losses").open("a") as file:
            file.write(f"{engine.state.iteration} {engine.state.output.hex()}\n")

    trainer.run(loader, max_epochs=iterations // EPOCH)
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    _overwrite(told / "end", digest.hexdigest())


def _overwrite(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)
