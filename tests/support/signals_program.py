"""A training that says when it has come to a moment, and waits there a little for a signal.

`python signals_program.py FOLDER MOMENT`, alone or under torchrun. It saves into FOLDER/run. At the
moment it makes the file FOLDER/at, and at its end each rank writes what it ended with.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import (
    Engine,
    Events,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

MOMENTS = ("loader", "first", "last", "evaluation", "save", "write", "between")
LENGTH, EPOCHS, EVERY = 6, 2, 4
# How long it stays in the moment.
_STAY = 0.4


class Numbers(Dataset[Any]):
    """Points that take a millisecond each."""

    def __len__(self) -> int:
        return 4 * LENGTH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.001)
        return torch.randn(4) + index, index % 2


class Moment:
    """Says that the moment has come, once, in whichever process and thread."""

    def __init__(self, folder: Path, wanted: str) -> None:
        self._mark, self._wanted = folder / "at", wanted

    def __call__(self, name: str) -> None:
        if name == self._wanted and not self._mark.exists():
            self._mark.write_text(str(os.getpid()))
            time.sleep(_STAY)


class Slow(nn.Module):
    """Has a state that takes a while to get."""

    def __init__(self, at: Moment) -> None:
        super().__init__()
        self._at = at

    def get_extra_state(self) -> torch.Tensor:
        self._at("save")
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        pass


def slow_flush(at: Moment) -> None:
    """Makes the disk slow, as far as a checkpoint is concerned."""
    flush: Callable[[int], None] = os.fsync

    def slowly(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            at("write")
        flush(descriptor)

    os.fsync = slowly  # type: ignore[assignment]


def make(folder: Path, at: Moment) -> tuple[Engine, Any]:
    """Returns a trainer that evaluates after each epoch, and its run."""
    manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 2), nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend="cpu", deterministic=True
    )
    evaluator = create_supervised_evaluator(model, backend="cpu")
    evaluator.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: at("evaluation"))

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        evaluator.run(DataLoader(Numbers(), batch_size=4))

    trainer.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: at("first"))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=LENGTH * EPOCHS), lambda: at("last"))
    slow_flush(at)
    to_save = {"model": model, "optimizer": optimizer, "slow": Slow(at)}
    return trainer, resume_or_start(trainer, to_save, folder / "run", every=EVERY)


def main() -> int:
    """Trains; returns what to exit with."""
    folder, wanted = Path(sys.argv[1]), sys.argv[2]
    at = Moment(folder, wanted)
    trainer, run = make(folder, at)
    data = DataLoader(
        Numbers(),
        batch_size=4,
        shuffle=True,
        num_workers=2,
        worker_init_fn=lambda worker: at("loader"),
    )
    trainer.run(data, max_epochs=1)
    if run.exit_code == 0:
        at("between")
        trainer.run(data, max_epochs=EPOCHS)
    told = {"iteration": trainer.state.iteration, "code": run.exit_code}
    rank = os.environ.get("RANK", "0")
    (folder / f"end-{rank}.json").write_text(json.dumps(told))
    return int(run.exit_code)


if __name__ == "__main__":
    sys.exit(main())
