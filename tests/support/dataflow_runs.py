"""Runs the cases of `dataflow_cases`, straight through and resumed, in a fork server's children."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataflow_cases import CASES
from resume_harness import Record, differences, read, restore, saved
from torch import nn

from crosstrain import backends
from crosstrain.engine import DeterministicEngine, Events, ResumeWarning, manual_seed


class Training:
    """An autoencoder with dropout, trained on whatever data a case gives.

    Its step draws from Python's and NumPy's generators too, an odd number of normal variates.
    """

    def __init__(self, case: str, seed: int) -> None:
        manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.2), nn.Linear(8, 64))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.engine = DeterministicEngine(self._step, backends.get("cpu").open())
        self.case = CASES[case]
        self.case.attach(self.engine)
        self.record = Record(self.engine)
        self.objects: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "engine": self.engine,
        }

    def _step(self, engine: Any, batch: Any) -> float:
        x = torch.ones(2, 64) if batch is None else torch.as_tensor(batch).view(-1, 64)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(x), x) * (1 + random.random())
        (loss * (1 + float(np.random.normal()) ** 2)).backward()
        self.optimizer.step()
        return loss.item()

    def run(self, workers: int, start: int = 0) -> None:
        self.engine.run(self.case.make(workers, start), **self.case.limits)


def run_straight(file: str, case: str, workers: int, seed: int) -> None:
    """Trains to the end; writes a snapshot of each iteration of the first epoch, and of its end."""
    training, kept = Training(case, seed), {}
    engine = training.engine

    @engine.on(Events.ITERATION_COMPLETED)
    def keep() -> None:
        if "epoch 1" not in kept:
            kept[f"{engine.state.iteration}"] = saved(training.objects)

    @engine.on(Events.EPOCH_COMPLETED(once=1))
    def keep_epoch() -> None:
        kept["epoch 1"] = saved(training.objects)

    training.run(workers)
    end = read(saved(training.objects))
    torch.save({"snapshots": kept, "rows": training.record.rows, "end": end}, file)


def run_on(file: str, case: str, snapshot: str, workers: int, seed: int, report: str) -> None:
    """Goes on from a snapshot to the end; writes what differs from the straight run."""
    straight = torch.load(file, weights_only=True)
    training = Training(case, seed)
    restore(training.objects, straight["snapshots"][snapshot])
    start = training.engine.state.iteration
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        training.run(workers, start)
    wanted = {key: row for key, row in straight["rows"].items() if key > start}
    found = differences(wanted, training.record.rows)
    found += differences(straight["end"], read(saved(training.objects)))
    ours = [str(w.message) for w in caught if issubclass(w.category, ResumeWarning)]
    Path(report).write_text(json.dumps({"differences": found, "warnings": ours}))
