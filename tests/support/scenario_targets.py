"""Users' trainings, sound and faulty, that the scenarios are played with."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.ci.trials.target import Training
from crosstrain.engine import DeterministicEngine, Events, create_supervised_trainer


class Drifting(torch.nn.Module):
    """A layer with a state that is in no state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scales[0] *= 0.99
        return x * self.scales[0]


def _training(
    backend: str, workers: int, *layers: torch.nn.Module, epochs: int = 2, rows: int = 60
) -> Training:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), *layers, torch.nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    trainer: Any = create_supervised_trainer(
        model, optimizer, torch.nn.functional.cross_entropy, backend=backend, deterministic=True
    )
    assert isinstance(trainer, DeterministicEngine)
    data = TensorDataset(x, (x[:, 0] > 0).long())
    loader = DataLoader(data, batch_size=6, shuffle=True, num_workers=workers)
    return Training(trainer, loader, epochs, {"model": model, "optimizer": optimizer})


def sound(backend: str, workers: int = 0) -> Training:
    # What a script prints is no answer to those who watch it.
    print("Training on", backend)
    return _training(backend, workers, torch.nn.Dropout(0.2))


def without_workers(backend: str) -> Training:
    return _training(backend, 0)


def drifting(backend: str) -> Training:
    return _training(backend, 0, Drifting())


def short(backend: str) -> Training:
    return _training(backend, 0, epochs=1, rows=12)


def failing(backend: str) -> Training:
    training = _training(backend, 0)

    @training.trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail() -> None:
        raise OSError("the disk is on fire")

    return training
