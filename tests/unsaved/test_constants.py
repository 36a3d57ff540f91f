"""What a script makes once, at random, and a run only reads is told where another start differs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from crosstrain.engine import DeterministicEngine, Events, ResumeWarning, manual_seed

# What is made, and how it is read.
MADE: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor], Any]]] = {
    "a projection": (lambda: torch.randn(4, 4), lambda made, x: x @ made),
    "a large table": (lambda: torch.randn(2**19), lambda made, x: x * made[5]),
    "an array": (lambda: numpy.random.rand(4), lambda made, x: x * float(made.sum())),
    "indices": (lambda: torch.randperm(64), lambda made, x: x[made[:2] % 2]),
    "a target network": (lambda: nn.Linear(4, 4).requires_grad_(False), lambda made, x: made(x)),
}


def start(seed: int, kind: str, state: Any = None, *, changes: bool = False) -> tuple[Any, str]:
    """Runs a script that is seeded so; returns the state after three iterations, what was told."""
    manual_seed(seed)
    make, read = MADE[kind]
    made = make()
    weight = nn.Parameter(torch.ones(()))

    def step(engine: Any, batch: torch.Tensor) -> float:
        with torch.no_grad():
            weight.add_(read(made, batch).mean())
            if changes and isinstance(made, torch.Tensor):
                made.add_(1)
        return weight.item()

    engine = DeterministicEngine(step)
    engine.objects = {"weight": nn.ParameterList([weight])}
    states: dict[int, Any] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResumeWarning)
        if state is not None:
            engine.load_state_dict(state)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED(every=3),
            lambda: states.update({engine.state.iteration: engine.state_dict()}),
        )
        engine.run([torch.ones(2, 4)] * 3, max_epochs=1 if state is None else 2)
    said = [str(one.message) for one in told if one.category is ResumeWarning]
    return states[max(states)], "\n".join(said)


@pytest.mark.parametrize("kind", list(MADE))
def test_what_was_made_at_random_is_told_once_where_it_is_another(kind: str) -> None:
    state, told = start(1, kind)
    assert told == ""
    assert start(1, kind, state)[1] == ""
    told = start(2, kind, state)[1]
    assert told.count("its 'made' with other contents than those that the run was saved with") == 1
    assert told.count("\n") == 0


def test_what_the_run_has_changed_is_told_as_that_and_not_twice() -> None:
    state, told = start(1, "a projection", changes=True)
    assert "will begin without what has changed of the step, its 'made'" in told
    assert "other contents" not in start(2, "a projection", state, changes=True)[1]
