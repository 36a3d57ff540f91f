"""A short training with a trace, for the tests of traces and of `crosstrain diff`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.ci import TraceRecorder, Training
from crosstrain.engine import create_supervised_trainer, manual_seed

ITERATIONS = 12


def build(spec: str = "cpu", *, seed: int = 3, dropout: float = 0.2, **options: Any) -> Training:
    """Returns a training of 12 iterations in 2 epochs."""
    manual_seed(seed)
    source = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(24, 8, generator=source), torch.randint(0, 3, (24,), generator=source)
    )
    # A bias before the batch norm would have no gradient but rounding, which Adam blows up.
    model = nn.Sequential(
        nn.Linear(8, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.Dropout(dropout),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend=spec, deterministic=True, **options
    )
    loader = DataLoader(data, batch_size=4, shuffle=True)
    return Training(trainer, loader, 2, {"model": model, "optimizer": optimizer})


def traced(
    path: Path,
    spec: str = "cpu",
    *,
    every_sync: int = 5,
    change: Callable[[Training], None] | None = None,
    **options: Any,
) -> Training:
    """Runs a training with a trace, after something in it was changed; returns it."""
    training = build(spec, **options)
    if change is not None:
        change(training)
    TraceRecorder(path, every_sync).attach(training.trainer)
    training.run()
    return training
