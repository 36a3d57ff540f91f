"""A run that is started again: what handlers draw and reset as it begins; runs that had ended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine import (
    DeterministicEngine,
    Events,
    ResumeWarning,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

BATCHES, EPOCHS = 4, 3


class Stopped(Exception):
    """Ends a process, as far as its run can tell."""


class Negatives(Dataset[Any]):
    """Samples that are drawn anew when an epoch begins."""

    def draw(self) -> None:
        self.values = numpy.random.rand(8) + torch.rand(8).numpy()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index / 8, self.values[index]], dtype=torch.float32), torch.ones(1)


class Total:
    """A metric of an epoch, which keeps its state in what it hands out."""

    def __init__(self) -> None:
        self.state = {"losses": torch.zeros(1), "count": 0}

    def reset(self) -> None:
        self.state["losses"].zero_()
        self.state["count"] = 0

    def update(self, engine: Any) -> None:
        self.state["losses"] += engine.state.output
        self.state["count"] += 1

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Process:
    """One start of a training whose handlers draw and reset as an epoch begins."""

    def __init__(self, folder: Path, seed: int) -> None:
        manual_seed(seed)
        self.data, self.total, self.seen = Negatives(), Total(), {}  # type: ignore[var-annotated]
        # What no state has: it is what it was only if the beginning draws it again.
        self.drawn: dict[int, float] = {}
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.model.register_buffer("hidden", torch.zeros(1))
        self.optimizer = torch.optim.Adam(self.trained(), 0.1)
        loss = nn.functional.mse_loss
        self.trainer = create_supervised_trainer(
            self.model, self.optimizer, loss, deterministic=True
        )
        self.trainer.state_dict_user_keys.extend(["of_run", "of_epoch"])
        self.reset("of_run")
        self.reset("of_epoch")
        self.trainer.add_event_handler(Events.STARTED, self.reset, "of_run")
        self.trainer.add_event_handler(Events.EPOCH_STARTED, self.begin)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.note)
        objects = {"model": self.model, "optimizer": self.optimizer, "total": self.total}
        self.run = resume_or_start(self.trainer, objects, folder, every=1, background=False)

    def trained(self) -> Any:
        return self.model.parameters()

    def reset(self, key: str) -> None:
        setattr(self.trainer.state, key, [0, ()])

    def begin(self) -> None:
        self.data.draw()
        self.reset("of_epoch")
        self.drawn[self.trainer.state.epoch] = numpy.random.rand() + float(torch.rand(()))
        self.total.reset()
        self.model.hidden.zero_()  # type: ignore[operator,union-attr]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1

    def note(self, engine: Any) -> None:
        self.total.update(engine)
        for key in ("of_run", "of_epoch"):
            setattr(engine.state, key, [getattr(engine.state, key)[0] + 1, (engine.state.output,)])
        self.model.hidden += engine.state.output  # type: ignore[operator]
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9
        self.seen[engine.state.iteration] = (
            engine.state.batch[0].tolist(),
            engine.state.output,
            self.model.hidden.item(),  # type: ignore[operator,union-attr]
            copy.deepcopy(self.total.state),
            copy.deepcopy([engine.state.of_run, engine.state.of_epoch]),
        )

    def start(self, batch_size: int = 2, epochs: int = EPOCHS) -> Process:
        self.trainer.run(DataLoader(self.data, batch_size, shuffle=True), max_epochs=epochs)
        return self

    def weights(self) -> list[float]:
        return [value for each in self.model.parameters() for value in each.flatten().tolist()]


def stop_at(process: Process, iteration: int) -> None:
    def stop() -> None:
        raise Stopped

    process.trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration + 1), stop)
    with pytest.raises(Stopped):
        process.start()


class Unfreezing(Process):
    """Its second layer gets a group of its own when the second epoch begins."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, seed)
        self.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), self.add)

    def trained(self) -> Any:
        return self.model[0].parameters()

    def add(self) -> None:
        second: Any = self.model[2]
        self.optimizer.add_param_group({"params": second.parameters(), "lr": 0.05})


@pytest.mark.parametrize("stopped", [2, 4, 5, 7, 11])
def test_a_group_that_a_beginning_adds_is_there_once(tmp_path: Path, stopped: int) -> None:
    straight = Unfreezing(tmp_path / "straight", 1).start()
    process = Unfreezing(tmp_path / "stopped", 1)
    stop_at(process, stopped)
    again = Unfreezing(tmp_path / "stopped", 2).start()
    assert {**process.seen, **again.seen} == straight.seen
    assert again.weights() == straight.weights()
    assert (
        again.optimizer.state_dict()["param_groups"]
        == (straight.optimizer.state_dict()["param_groups"])
    )
    assert "add_param_group" not in vars(again.optimizer)


@pytest.mark.parametrize("stopped", [2, 4, 5, 7, 11])
def test_what_handlers_of_an_epochs_beginning_draw_and_reset_is_as_it_was(
    tmp_path: Path, stopped: int
) -> None:
    straight = Process(tmp_path / "straight", 1).start()
    process = Process(tmp_path / "stopped", 1)
    stop_at(process, stopped)
    again = Process(tmp_path / "stopped", 2).start()
    assert again.run.resumed_from is not None
    assert again.drawn
    assert again.drawn.items() <= straight.drawn.items()
    assert {**process.seen, **again.seen} == straight.seen
    assert again.weights() == straight.weights()


class Unknown:
    """A state that is no number yet."""

    def __init__(self) -> None:
        self.state = {"best": float("nan"), "mean": torch.tensor([float("nan"), -0.0])}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def test_what_no_handler_changes_is_not_put_back(tmp_path: Path) -> None:
    def start() -> DeterministicEngine:
        engine, same, other = DeterministicEngine(step, seed=3), Unknown(), Unknown()
        others.append(other)
        engine.add_event_handler(Events.STARTED, lambda: other.state.update(best=1.0))
        resume_or_start(engine, {"same": same, "other": other}, tmp_path, every=1, background=False)
        engine.run(range(4), max_epochs=2)
        return engine

    def step(engine: Any, batch: int) -> None:
        others[-1].state["best"] = float("nan")
        if engine.state.iteration == 3 and not stopped:
            stopped.append(batch)
            raise Stopped

    stopped: list[int] = []
    others: list[Unknown] = []
    with pytest.raises(Stopped):
        start()
    said = [one for one in start().proof.checked if "put back" in one]
    assert len(said) == 1, said
    assert said[0].startswith("other: put back")


def test_a_state_without_the_epochs_beginning_says_so() -> None:
    def engine_of(states: dict[int, Any]) -> DeterministicEngine:
        engine = DeterministicEngine(lambda engine, batch: None, seed=3)
        engine.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda: states.update({engine.state.iteration: engine.state_dict()}),
        )
        return engine

    states: dict[int, Any] = {}
    engine_of(states).run(range(4), max_epochs=2)
    for iteration, handlers, warns in ((6, 1, True), (6, 0, False), (8, 1, True)):
        engine = engine_of({})
        old = {key: value for key, value in states[iteration].items() if key != "epoch_rng_states"}
        engine.load_state_dict(old)
        if handlers:
            engine.add_event_handler(Events.EPOCH_STARTED, lambda: None)
        if warns:
            with pytest.warns(ResumeWarning, match="does not hold the random states"):
                engine.run(range(4))
        else:
            engine.run(range(4))


def ends_on_purpose(process: Process) -> None:
    process.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=6), lambda: process.trainer.terminate()
    )


def ends_for_now(process: Process) -> None:
    process.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=6), lambda: process.trainer.terminate(goes_on=True)
    )


@pytest.mark.parametrize(("end", "last"), [(ends_on_purpose, 6), (ends_for_now, 12)])
def test_a_run_that_has_ended_is_started_again(
    tmp_path: Path, end: Callable[[Process], None], last: int
) -> None:
    process = Process(tmp_path / "run", 1)
    end(process)
    process.start()
    for seed in (2, 3):
        again = Process(tmp_path / "run", seed).start()
        assert again.trainer.state.iteration == last
        if last == 6:
            assert not again.seen
            assert again.trainer.state.epoch == process.trainer.state.epoch
            assert again.weights() == process.weights()
        else:
            assert again.weights() == Process(tmp_path / "straight", 1).start().weights()


@pytest.mark.parametrize("stopped", [2, 4, 6, 8, 11])
def test_a_training_of_several_runs_goes_on_in_any_of_them(tmp_path: Path, stopped: int) -> None:
    def phases(process: Process) -> None:
        for epochs, batch_size in enumerate((2, 4, 1), 1):
            process.start(batch_size, epochs)

    straight = Process(tmp_path / "straight", 1)
    phases(straight)
    process = Process(tmp_path / "stopped", 1)

    def stop() -> None:
        raise Stopped

    process.trainer.add_event_handler(Events.ITERATION_STARTED(once=stopped + 1), stop)
    with pytest.raises(Stopped):
        phases(process)
    again = Process(tmp_path / "stopped", 2)
    phases(again)
    assert {**process.seen, **again.seen} == straight.seen
    assert again.weights() == straight.weights()
