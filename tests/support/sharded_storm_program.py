"""A program for torchrun: saves a counter and its multiples, over and over, until it is killed.

Each save is of one value everywhere: so a checkpoint of two saves mixed would show.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from crosstrain.backends import get
from crosstrain.engine import Checkpoint, DiskSaver
from crosstrain.engine.checkpoints.save_handler import RunFacts


def main(folder: Path, background: bool) -> None:
    """Goes on from the newest checkpoint and saves until it is killed."""
    with get("cpu:fsdp") as backend:
        model: Any = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = backend.prepare(model, optimizer)
        backend.backward(model(torch.ones(2, 64)).sum(), optimizer)
        backend.step(optimizer)
        saver = DiskSaver(folder, require_empty=False, background=background, parts=True)
        latest = Checkpoint.latest(folder)
        count = 0
        if latest.path is not None:
            assert latest.manifest is not None
            count = latest.manifest.iteration or 0
            Checkpoint.load_objects({"model": model, "optimizer": optimizer}, latest)
            for value in [*model.state_dict().values(), *momenta(optimizer)]:
                assert bool((value.to_local() == count).all()), f"{latest.path} is not {count}"
        (folder / f"pid-{backend.world.rank}").write_text(str(os.getpid()))
        while True:
            count += 1
            for value in [*model.state_dict().values(), *momenta(optimizer)]:
                value.to_local().fill_(count)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            objects = {"model": model, "optimizer": optimizer}
            saver.prepare(RunFacts(iteration=count, names=tuple(objects), objects=objects))
            saver(states, f"checkpoint_{count}.pt")
            if count > 2:
                saver.remove(f"checkpoint_{count - 2}.pt")


def momenta(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Returns what the optimizer has of each parameter."""
    return [values["momentum_buffer"] for values in optimizer.state.values()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "background")
