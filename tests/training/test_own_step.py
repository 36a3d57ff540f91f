"""A process function of one's own, written against the protocol: two optimizers, in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_runs import small_scaler
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from training_runs import DTYPES, assert_same, batches, state_of

from crosstrain import backends
from crosstrain.engine import Engine

judge = nn.functional.binary_cross_entropy_with_logits


def networks() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
    critic = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    models: list[nn.Module] = [generator, critic]
    return models, [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]


def losses_of(models: list[nn.Module], real: Tensor) -> Any:
    """Yields the critic's loss, and then, when the critic was stepped, the generator's."""
    generator, critic = models
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    fake = generator(torch.randn(len(real), 8))
    yield judge(critic(real), ones) + judge(critic(fake.detach()), zeros)
    yield judge(critic(fake), ones)


@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_two_optimizers_stepped_in_turns_equal_the_same_by_hand(spec: str) -> None:
    scaler = small_scaler() if spec == "cpu:fp16" else GradScaler("cpu", enabled=False)
    models, optimizers = networks()
    torch.manual_seed(11)
    for x, _ in batches(8):
        losses = losses_of(models, x)
        for optimizer in reversed(optimizers):
            optimizer.zero_grad()
            with torch.autocast("cpu", DTYPES[spec], enabled=spec != "cpu"):
                loss = next(losses)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        scaler.update()

    settings = {"scaler": small_scaler()} if spec == "cpu:fp16" else {}
    backend = backends.get(spec, **settings).open()
    ours, steppers = networks()
    backend.prepare(*ours, *steppers)

    def step(engine: Engine, batch: Any) -> None:
        losses = losses_of(ours, backend.put(batch[0]))
        for stepper in reversed(steppers):
            stepper.zero_grad()
            with backend.autocast():
                loss = next(losses)
            backend.backward(loss, stepper)
            assert backend.step(stepper).applied

    torch.manual_seed(11)
    Engine(step, backend).run(batches(8))
    assert_same(state_of(*ours, *steppers), state_of(*models, *optimizers))
    assert backend.state_dict() == scaler.state_dict()
