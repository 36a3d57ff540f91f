"""A small training on real data, step by step on a backend, for the tests of backends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch.amp.grad_scaler import GradScaler

from crosstrain import backends
from crosstrain.backends import StepResult
from crosstrain.backends.torch_backend import TorchBackend

Batch = tuple[torch.Tensor, torch.Tensor]


@functools.cache
def digits() -> list[Batch]:
    """Scikit-learn's digits in batches of 32: images (32, 64) in [0, 1] and labels (32,)."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    return list(zip(x.split(32), y.split(32), strict=True))


@dataclass
class Run:
    """A small training: what a user would have in a script of his own."""

    backend: TorchBackend
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: Any, max_norm: float | None = None) -> StepResult:
        x, y = self.backend.put(batch)
        self.optimizer.zero_grad()
        with self.backend.autocast():
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
        self.backend.backward(loss, self.optimizer)
        result = self.backend.step(self.optimizer, max_norm)
        self.backend.sync()
        return result

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def state(self) -> dict[str, Any]:
        objects = {"backend": self.backend, "model": self.model, "optimizer": self.optimizer}
        return {name: thing.state_dict() for name, thing in objects.items()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.backend.load_state_dict(state["backend"])


Optimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def small_scaler(**settings: Any) -> GradScaler:
    """A scaler whose scale grows within the few steps of a test."""
    return GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 3, **settings})


def make(spec: str, kind: str = "sgd", scaler: GradScaler | None = None) -> Run:
    settings = {} if scaler is None else {"scaler": scaler}
    backend = backends.get(spec, **settings).open()
    assert isinstance(backend, TorchBackend)
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 10)
    )
    optimizer = OPTIMIZERS[kind](model.parameters())
    model, optimizer = backend.prepare(model, optimizer)
    return Run(backend, model, optimizer)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def overflowing(batch: Any) -> Any:
    """The batch with images so bright that fp16 gradients are infinite, the loss being finite."""
    x, y = batch
    return x * 2e4, y
