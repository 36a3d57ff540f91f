"""Models are put on a device with their optimizers and shared weights, whatever `to` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crosstrain.backends import BackendError
from crosstrain.backends.preparation import place


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.second = torch.nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(self.first(x))


def test_a_move_that_makes_new_parameters_keeps_ties_optimizers_and_state() -> None:
    # As for XLA, Module.to makes new parameters for the meta device.
    device = torch.device("meta")
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    old = list(model.parameters())
    place([model], [optimizer], device)
    assert model.second.weight is model.first.weight
    new = list(model.parameters())
    assert all(p.device == device for p in new)
    assert not any(a is b for a, b in zip(old, new, strict=True))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in new]
    assert set(optimizer.state) == set(new)
    assert all(values["exp_avg"].device == device for values in optimizer.state.values())


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(BackendError, match=r"SGD holds a parameter of shape \(2, 2\) on 'cpu'"):
        place([model], [optimizer], torch.device("meta"))


def test_a_second_placement_changes_nothing() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(p) for p in model.parameters()]
    for _ in range(2):
        place([model], [optimizer], torch.device("cpu"))
    assert [id(p) for p in model.parameters()] == before
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
