"""Supervised training on real data, by the factory and by hand, for the tests of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from step_runs import Batch, digits
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from crosstrain.engine import Engine, Events, create_supervised_trainer

loss_fn = nn.functional.cross_entropy

DTYPES = {"cpu": None, "cpu:bf16": torch.bfloat16, "cpu:fp16": torch.float16}
SEED = 11


def batches(number: int) -> list[Batch]:
    """The first batches of scikit-learn's digits: images (32, 64) and labels (32,)."""
    return digits()[:number]


def network(seed: int = 3) -> nn.Sequential:
    """A small network with dropout and batch norm for the digits."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
    )


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def trainer_of(model: nn.Module, **arguments: Any) -> Engine:
    """A factory's trainer for a network, with SGD."""
    return create_supervised_trainer(model, sgd(model), loss_fn, **arguments)


def outputs_of(trainer: Engine) -> list[Any]:
    """Returns the list to which each iteration's output will be added, read."""
    outputs: list[Any] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output)
    )
    return outputs


def train(trainer: Engine, data: Any, **limits: Any) -> list[Any]:
    """Runs a trainer with a seeded dropout, and returns its outputs."""
    outputs = outputs_of(trainer)
    torch.manual_seed(SEED)
    trainer.run(data, **limits)
    return outputs


def train_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Batch],
    windows: Sequence[int],
    spec: str = "cpu",
    max_norm: float | None = None,
    scaler: GradScaler | None = None,
    seed: int | None = SEED,
) -> list[float]:
    """Trains as a user would without any library, and returns the losses.

    Args:
        model: the model.
        optimizer: its optimizer.
        data: the batches of all iterations.
        windows: over how many iterations each step's gradients are accumulated.
        spec: the precision, as the spec of the backend that does the same.
        max_norm: the norm that gradients are clipped to.
        scaler: the loss scaler, for fp16.
        seed: of the dropout.
    """
    assert seed is not None
    torch.manual_seed(seed)
    model.train()
    stream, losses, dtype = iter(data), list[float](), DTYPES[spec]
    for size in windows:
        optimizer.zero_grad()
        for x, y in islice(stream, size):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_fn(model(x), y)
            losses.append(loss.item())
            share = loss / size
            (share if scaler is None else scaler.scale(share)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return losses


def state_of(*objects: Any) -> list[Tensor]:
    """Every tensor in the states of models and optimizers, copied."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            # Sparse momentum cannot be compared as it is.
            found.append(value.detach().to_dense().clone())
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    for thing in objects:
        collect(thing.state_dict())
    assert found
    return found


def assert_same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Fails where two lists of tensors differ in a bit."""
    assert len(ours) == len(theirs)
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(one, other), f"tensor {number} differs by {(one - other).abs().max()}"


def assert_near(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Fails where two lists of tensors differ by more than rounding."""
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-4, atol=1e-6)
