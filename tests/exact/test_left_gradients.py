"""Gradients that a step has left behind are there for who looks at them, after a resume too."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.handlers.tensorboard_logger import GradsHistHandler
from torch import nn
from training_runs import assert_same, batches, loss_fn, network, state_of

from crosstrain import backends
from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    StepEvents,
    create_supervised_trainer,
    resume_or_start,
)

Norm = Callable[[nn.Module], float]


class Killed(BaseException):
    """Ends a run as a kill does."""


def by_attribute(model: nn.Module) -> float:
    return sum(float(one.grad.norm()) for one in model.parameters() if one.grad is not None)


def by_name(model: nn.Module) -> float:
    found = [getattr(one, "grad", None) for one in model.parameters()]
    return sum(float(one.norm()) for one in found if one is not None)


def by_torch(model: nn.Module) -> float:
    return float(nn.utils.clip_grad_norm_(model.parameters(), 1e9))


def by_another_function(model: nn.Module) -> float:
    return 2 * by_attribute(model)


class Measure:
    """Looks at gradients in a method that another one calls."""

    def _norm(self, model: nn.Module) -> float:
        return by_attribute(model)

    def __call__(self, model: nn.Module) -> float:
        return self._norm(model)


class Schedule:
    """A schedule that follows the last gradients, named in `to_save`."""

    def __init__(self, model: nn.Module, optimizer: Any, norm: Norm) -> None:
        self.model, self.optimizer, self.norm, self.steps = model, optimizer, norm, 0

    def step(self) -> float:
        self.steps += 1
        norm = self.norm(self.model)
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + norm + 0.01 * self.steps)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


READERS: dict[str, Norm] = {
    "attribute": by_attribute,
    "name": by_name,
    "torch": by_torch,
    "another function": by_another_function,
    "method": Measure(),
}
# Between two steps, and one in a step: that sees gradients which no optimizer clears.
EVENTS: list[Any] = [
    Events.ITERATION_STARTED,
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.EPOCH_COMPLETED,
    StepEvents.GRADIENTS_READY,
]


def trainer_of(how: str, model: Any, optimizer: Any) -> Engine:
    if how != "own":
        every = 3 if how == "window" else 1
        return create_supervised_trainer(
            model, optimizer, loss_fn, gradient_accumulation_steps=every, deterministic=True
        )

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        if engine.has_registered_events(StepEvents.GRADIENTS_READY):
            engine.fire_event(StepEvents.GRADIENTS_READY)
        optimizer.step()
        return float(loss)

    trainer = DeterministicEngine(step, backends.get("cpu").open(), seed=1)
    trainer.register_events(*StepEvents)
    return trainer


def play(folder: Path, rng: random.Random, killed_at: int | None) -> tuple[Any, dict[int, Any]]:
    """Plays a training that looks at gradients; returns all states and what it saw, by when."""
    how, event = rng.choice(["factory", "window", "own"]), rng.choice(EVENTS)
    norm, by_object = rng.choice([*READERS.values()]), rng.random() < 0.3
    model = network()
    # In some, the first layer is in no optimizer: its gradients grow from step to step.
    trained = [*model[2:].parameters()] if rng.random() < 0.4 else [*model.parameters()]
    optimizer = torch.optim.SGD(trained, 0.1, momentum=0.9)
    trainer = trainer_of(how, model, optimizer)
    schedule, seen = Schedule(model, optimizer, norm), dict[int, Any]()

    def look() -> None:
        seen[trainer.state.iteration] = schedule.step()

    def look_itself() -> None:
        seen[trainer.state.iteration] = found = norm(model)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + found)

    trainer.add_event_handler(event, look if by_object else look_itself)
    to_save: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    resume_or_start(trainer, to_save, folder, every=1)

    @trainer.on(Events.GET_BATCH_STARTED)
    def kill() -> None:
        if trainer.state.iteration == killed_at:
            raise Killed

    trainer.run(batches(5), max_epochs=3)
    return state_of(model, optimizer), seen


@pytest.mark.parametrize("seed", range(14))
def test_who_looks_at_gradients_of_the_step_before_finds_them(seed: int, tmp_path: Path) -> None:
    whole, seen = play(tmp_path / "whole", random.Random(seed), None)
    killed_at = random.Random(-seed).randint(1, 14)
    with pytest.raises(Killed):
        play(tmp_path / "killed", random.Random(seed), killed_at)
    resumed, again = play(tmp_path / "killed", random.Random(seed), None)
    assert again == {when: seen[when] for when in again}
    assert_same(resumed, whole)


def _saved(handler: Callable[[nn.Module, list[float]], Any], event: Any) -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(model, optimizer, loss_fn, deterministic=True)
    trainer.add_event_handler(event, handler(model, []))
    trainer.run(batches(2))
    gradients: dict[str, Any] = trainer.state_dict()["shown"]["gradients"]
    return gradients


def test_they_are_saved_where_somebody_looks_only() -> None:
    def shows(model: nn.Module, seen: list[float]) -> Any:
        return partial(GradsHistHandler(model), logger=None, event_name=None)

    def reads(model: nn.Module, seen: list[float]) -> Any:
        return lambda: seen.append(by_attribute(model))

    def weighs(model: nn.Module, seen: list[float]) -> Any:
        return lambda: seen.extend(float(one.sum()) for one in model.parameters())

    assert not _saved(weighs, Events.ITERATION_STARTED)
    assert not _saved(reads, Events.ITERATION_COMPLETED)
    assert not _saved(reads, StepEvents.GRADIENTS_READY)
    assert len(_saved(reads, Events.ITERATION_STARTED)) == 6
    assert len(_saved(shows, Events.EPOCH_COMPLETED(once=99))) == 6
