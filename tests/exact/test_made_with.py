"""A script that was changed between two starts: what it sets otherwise is told, and no more."""

from __future__ import annotations

import functools
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import (
    Checks,
    Events,
    ResumeError,
    ResumeWarning,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)


class Net(nn.Module):
    """A model of the user's, with a number that decides what it computes and some that do not."""

    def __init__(self, factor: float, drop: float, act: type[nn.Module], starts: int) -> None:
        super().__init__()
        self.factor, self.starts, self.name = factor, starts, f"start {starts}"
        self.body = nn.Sequential(nn.Linear(8, 16), act(), nn.Dropout(drop), nn.BatchNorm1d(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.body(x)) * self.factor


class Decay:
    """A schedule of the user's, whose state has what it was made with, as torch's have."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        self.optimizer, self.total, self.done = optimizer, total, 0
        # Another one in each start, as each process has another.
        self.port, self.since = int(os.environ["MASTER_PORT"]), time.monotonic()

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.done = state["total"], state["done"]


SCRIPT: dict[str, Any] = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "head_lr": 0.02,
    "step_size": 5,
    "warmup": 4,
    "total": 100,
    "smoothing": 0.0,
    "drop": 0.5,
    "act": nn.ReLU,
    "factor": 1.0,
    "optimizer": torch.optim.AdamW,
    "accumulation": 1,
    "max_norm": None,
}
# What is set instead, and how that is told; whether the checkpoint's goes on.
CHANGES: dict[str, tuple[Any, str, bool]] = {
    "lr": (0.001, "group 0 of optimizer: lr 0.001 in the script, 0.01 then", True),
    "weight_decay": (0.2, "and 1 more: weight_decay 0.2 in the script, 0.1 then", True),
    "head_lr": (0.03, "group 1 of optimizer: lr 0.03 in the script, 0.02 then", True),
    "step_size": (3, "steps: step_size 3 in the script, 5 then", True),
    "warmup": (6, "warmup.lr_lambdas[0] and 1 more: warmup 4 then, 6 now", False),
    "total": (200, "decay: total 200 in the script, 100 then", True),
    "smoothing": (0.1, "loss_fn: label_smoothing 0.0 then, 0.1 now", False),
    "drop": (0.2, "model.body.2: p 0.5 then, 0.2 now", False),
    "act": (nn.GELU, "model.body.1: class 'ReLU' then, 'GELU' now", False),
    "factor": (2.0, "model: factor 1.0 then, 2.0 now", False),
    "optimizer": (torch.optim.Adam, "class 'AdamW' then, 'Adam' now", False),
    "accumulation": (2, "the training step: gradient_accumulation_steps 1 then, 2 now", False),
    "max_norm": (1.0, "the training step: max_norm None then, 1.0 now", False),
}


@pytest.fixture(autouse=True)
def _port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what each start sets."""
    monkeypatch.setenv("MASTER_PORT", "29500")


def start(
    folder: Path,
    epochs: int,
    script: dict[str, Any],
    after: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
    checks: Checks | None = None,
) -> str:
    """Runs a script as it stands; returns all that it was told."""
    manual_seed(1)
    os.environ["MASTER_PORT"] = str(29500 + epochs)
    one = {**SCRIPT, **script}
    net = Net(one["factor"], one["drop"], one["act"], starts=epochs)
    groups = [
        {"params": net.body.parameters()},
        {"params": net.head.parameters(), "lr": one["head_lr"]},
    ]
    optimizer = one["optimizer"](groups, lr=one["lr"], weight_decay=one["weight_decay"])
    warmup = one["warmup"]
    schedulers = {
        "warmup": lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup)),
        "steps": lr_scheduler.StepLR(optimizer, one["step_size"]),
        "decay": Decay(optimizer, one["total"]),
    }
    trainer = create_supervised_trainer(
        net,
        optimizer,
        nn.CrossEntropyLoss(label_smoothing=one["smoothing"]),
        backend="cpu",
        deterministic=True,
        gradient_accumulation_steps=one["accumulation"],
        max_norm=one["max_norm"],
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedulers["warmup"].step())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedulers["steps"].step())
    data = TensorDataset(torch.randn(16, 8), torch.randint(0, 3, (16,)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResumeWarning)
        to_save = {"model": net, "optimizer": optimizer, **schedulers}
        resume_or_start(trainer, to_save, folder, every=3, background=False, checks=checks)
        after(optimizer)
        trainer.run(DataLoader(data, batch_size=4, shuffle=True), max_epochs=epochs)
    return "\n".join(str(one.message) for one in told if one.category is ResumeWarning)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_changed_script_sets_is_told_with_both_values(tmp_path: Path, seed: int) -> None:
    names = random.Random(seed).sample(list(CHANGES), 4)
    script = {name: CHANGES[name][0] for name in names}
    assert start(tmp_path, 1, {}) == ""
    assert start(tmp_path, 2, {}) == ""
    told = start(tmp_path, 3, script)
    for name, (_, text, stays) in CHANGES.items():
        # Of another class, the rest is not compared.
        of_other = "optimizer" in names and "optimizer" in text and name != "optimizer"
        if name in names and not of_other:
            head = (
                "those of the checkpoint go on" if stays else "The run goes on with other settings"
            )
            assert any(text in line and head in line for line in told.splitlines()), (text, told)
        else:
            assert text not in told
    assert start(tmp_path, 4, script) == ""


def test_a_rate_set_after_loading_is_not_told_and_one_set_too_early_is(tmp_path: Path) -> None:
    def set_rate(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.001

    start(tmp_path, 1, {})
    assert start(tmp_path, 2, {"lr": 0.001, "head_lr": 0.001}, after=set_rate) == ""
    off = functools.partial(start, tmp_path, 3, {"drop": 0.3})
    with pytest.raises(ResumeError, match=r"p 0\.5 then, 0\.3 now"):
        off(checks=Checks(settings="error"))
    assert off(checks=Checks(settings="off")) == ""
