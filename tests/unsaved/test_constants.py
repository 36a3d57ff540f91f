"""What a script makes once, at random, and a run only reads is told where another start differs."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import random_split

from crosstrain.engine import (
    DeterministicEngine,
    Events,
    ModelPart,
    ResumeWarning,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

# What is made, and how it is read.
MADE: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor], Any]]] = {
    "a projection": (lambda: torch.randn(4, 4), lambda made, x: x @ made),
    "a large table": (lambda: torch.randn(2**19), lambda made, x: x * made[5]),
    "an array": (lambda: numpy.random.rand(4), lambda made, x: x * float(made.sum())),
    "indices": (lambda: torch.randperm(64), lambda made, x: x[made[:2] % 2]),
    "a split": (lambda: random_split(range(64), [16, 48])[0].indices, lambda made, x: x * made[0]),
    "files": (
        lambda: [f"/{random.random()}/{number}.png" for number in random.sample(range(64), 16)],
        lambda made, x: x * int(made[0].rpartition("/")[2][:-4]),
    ),
    "a number": (random.random, lambda made, x: x * made),
    "a tensor of one": (lambda: torch.rand(()), lambda made, x: x * made),
    "a few numbers": (lambda: [random.random() for _ in range(3)], lambda made, x: x * made[1]),
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


@pytest.mark.parametrize("decides", [False, True])
def test_a_number_that_is_only_shown_is_not_told(decides: bool, tmp_path: Path) -> None:
    """Such as how long the data took to load."""

    def run(took: float, epochs: int) -> bool:
        model = nn.Linear(2, 1)
        trainer = DeterministicEngine(lambda engine, batch: model(batch).sum().item())

        @trainer.on(Events.EPOCH_COMPLETED)
        def show() -> None:
            text = f"loaded in {took} s"
            print(text)

        def end(engine: Any) -> None:
            if took > 2:
                engine.terminate()

        if decides:
            trainer.add_event_handler(Events.EPOCH_COMPLETED, end)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResumeWarning)
            resume_or_start(trainer, {"model": model}, tmp_path, 2, signals=())
            trainer.run([torch.ones(2, 2)] * 2, max_epochs=epochs)
        return any("its 'took' with other contents" in str(one.message) for one in caught)

    assert not run(random.Random(1).random(), 1)
    assert run(random.Random(2).random(), 2) is decides


def test_settings_and_where_a_file_lies_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        start = random.random()
        parts = {"optimizer": {"lr": start}, "name": {"run": str(start)}}
        return [f"/{start}/{n}.png" for n in range(9)], [start, "a", *range(9)], [start], parts

    monkeypatch.setitem(MADE, "settings", (make, lambda made, x: x * len(made[1]) * len(made[3])))
    monkeypatch.setitem(MADE, "a setting", (lambda: round(random.random(), 4), MADE["a number"][1]))
    monkeypatch.setitem(MADE, "a time", (time.perf_counter, MADE["a number"][1]))
    for kind in ("settings", "a setting", "a time"):
        state, _ = start(1, kind)
        assert start(2, kind, state)[1] == ""


class Part(nn.Module):
    """Trains its head, and moves averages of what is frozen where it is asked to."""

    def __init__(self, averages: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4) if averages else nn.Identity()
        self.base = nn.Sequential(nn.Linear(4, 4), norm).requires_grad_(False)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.base(x))


@pytest.mark.parametrize("averages", [False, True])
def test_what_a_part_of_a_model_leaves_out_is_told_where_it_is_another(
    averages: bool, tmp_path: Path
) -> None:
    said: list[list[str]] = []
    for seed, epochs in ((1, 1), (1, 2), (2, 3)):
        manual_seed(seed)
        model = Part(averages)
        optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
        loss_fn = nn.functional.mse_loss
        trainer = create_supervised_trainer(model, optimizer, loss_fn, deterministic=True)
        to_save = {"model": ModelPart(model), "optimizer": optimizer}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ResumeWarning)
            resume_or_start(trainer, to_save, tmp_path, 2, signals=())
            trainer.run([(torch.ones(2, 4), torch.ones(2, 1))] * 3, max_epochs=epochs)
        said.append([str(one.message) for one in told if "not saved" in str(one.message)])
    if averages:
        assert ["begin without what has changed of model" in one for (one,) in said] == [True] * 3
    else:
        assert said[:2] == [[], []]
        assert "has made model" in said[2][0]


def test_what_the_run_has_changed_is_told_as_that_and_not_twice() -> None:
    state, told = start(1, "a projection", changes=True)
    assert "will begin without what has changed of the step, its 'made'" in told
    assert "other contents" not in start(2, "a projection", state, changes=True)[1]
