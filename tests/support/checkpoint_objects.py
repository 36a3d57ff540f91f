"""Objects to save and load, and how to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine import Engine

BATCHES = [torch.randn(5, 3) for _ in range(10)]


def made(seed: int = 0) -> dict[str, Any]:
    """Returns a trainer, its model, optimizer and scheduler."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def step(engine: Engine, batch: Any) -> None:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        scheduler.step()

    return {
        "trainer": Engine(step),
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
    }


def same(one: Any, other: Any) -> bool:
    """Tells whether two states are equal, every bit of their tensors."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def names(folder: Path) -> list[str]:
    """Returns what `ls` shows of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
