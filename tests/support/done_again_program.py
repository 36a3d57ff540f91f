"""A program that depends, or does not, on what no checkpoint holds, and kills itself.

Called with the folder of its checkpoints and its files, and a case as JSON: see `Case`. It writes
down what its resume told, unless it is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import get
from crosstrain.engine import (
    Checks,
    Events,
    ResumeError,
    create_supervised_trainer,
    resume_or_start,
)

_HASH = hashlib.sha256()
_TABLE = sqlite3.connect(":memory:", check_same_thread=False)
_TABLE.execute("create table seen (number integer)")


@dataclass
class Case:
    """What a run is like.

    Args:
        outside: what it depends on besides its state, one of `OUTSIDE`; empty: on nothing.
        place: what depends on it: `loss`, `rate`, `weights` or `log`.
        every: after how many iterations it is saved.
        kill: before which iteration it is killed; 0: it is not.
        workers: of its loader.
        background: whether a thread saves.
        strict: of the check.
        rate: its learning rate.
        threads: of torch.
    """

    outside: str = ""
    place: str = "loss"
    every: int = 3
    kill: int = 0
    workers: int = 0
    background: bool = True
    strict: Any = "warn"
    rate: float = 0.1
    threads: int = 1

    def text(self) -> str:
        """Returns it as the program takes it."""
        return json.dumps(asdict(self))


def _file(folder: Path) -> int:
    path = folder / f"count-{os.environ.get('RANK', 0)}.txt"
    count = int(path.read_text()) if path.exists() else 0
    path.write_text(str(count + 1))
    return count


def _many_files(folder: Path) -> int:
    count = len(list((folder / "kept").glob("*")))
    (folder / "kept").mkdir(exist_ok=True)
    (folder / "kept" / str(count)).touch()
    return count


def _environment(folder: Path) -> int:
    count = int(os.environ.get("COUNT", "0"))
    os.environ["COUNT"] = str(count + 1)
    return count


def _hash(folder: Path) -> int:
    _HASH.update(b"once more")
    return _HASH.digest()[0]


def _table(folder: Path) -> int:
    _TABLE.execute("insert into seen values (1)")
    return int(_TABLE.execute("select count(*) from seen").fetchone()[0])


OUTSIDE = {
    "a file": _file,
    "many files": _many_files,
    "the environment": _environment,
    "a hash": _hash,
    "a table in memory": _table,
}


class Rows(Dataset[Any]):
    """Rows of noise."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3) + index / 16, torch.tensor([index / 16])


def outside(case: Case, folder: Path) -> int:
    """Returns a number that the run gets from outside, and changes there."""
    return OUTSIDE[case.outside](folder) if case.outside else 0


def trainer_of(case: Case, folder: Path, backend: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a trainer and what is saved with it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), case.rate)

    def loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scale = 1 + (outside(case, folder) / 16 if case.place == "loss" else 0)
        return nn.functional.mse_loss(prediction, target) * scale

    trainer = create_supervised_trainer(model, optimizer, loss, backend=backend, deterministic=True)
    if case.place == "rate":

        @trainer.on(Events.ITERATION_STARTED)
        def decay() -> None:
            optimizer.param_groups[0]["lr"] = case.rate / (1 + outside(case, folder))

    if case.place == "weights":

        @trainer.on(Events.ITERATION_COMPLETED)
        def pull() -> None:
            with torch.no_grad():
                model[0].weight.mul_(1 - outside(case, folder) / 4096)

    if case.place == "log":

        @trainer.on(Events.ITERATION_COMPLETED)
        def wait_a_little() -> None:
            for _ in range(outside(case, folder)):
                random.random()

    return trainer, {"model": model, "optimizer": optimizer}


def main(folder: Path, case: Case) -> None:
    """Trains, and tells how."""
    rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(case.threads)
    with get("cpu") as backend, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, objects = trainer_of(case, folder, backend)
        run = resume_or_start(
            trainer,
            objects,
            folder / "saved",
            every=case.every,
            background=case.background,
            checks=Checks(done_again=case.strict),
        )

        @trainer.on(Events.ITERATION_STARTED(once=case.kill or 10**6))
        def die() -> None:
            run.checkpoint.wait()
            os.kill(os.getpid(), signal.SIGKILL)

        error = None
        try:
            trainer.run(DataLoader(Rows(), 2, num_workers=case.workers), max_epochs=3)
        except ResumeError as caught_error:
            error = str(caught_error)
    told = {
        "resumed": run.resumed_from is not None,
        "warnings": [str(one.message) for one in caught],
        "proof": str(run.proof),
        "error": error,
        "weights": [value.tolist() for value in objects["model"].state_dict().values()],
    }
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Case(**json.loads(sys.argv[2])))
