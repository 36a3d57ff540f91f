"""A script that calls `run` several times, of one trainer or of several, resumes exactly."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import exit_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import (
    DeterministicEngine,
    Events,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)
from crosstrain.engine.digest import digest

Between = Callable[[Any, Any, Any], None]


class _Killed(BaseException):
    """Ends a program as a kill does."""


def _halves(trainer: Any, model: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def _draws(trainer: Any, model: Any, optimizer: Any) -> None:
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn_like(model[0].weight))


def _freezes(trainer: Any, model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(requires_grad=False)


def _adds_a_group(trainer: Any, model: Any, optimizer: Any) -> None:
    optimizer.add_param_group({"params": [model[2].bias], "lr": 0.01})


def _turns(trainer: Any, model: Any, optimizer: Any) -> None:
    trainer.state.factor *= 0.5


def _program(folder: Path, between: Between, kill: int | None = None) -> str:
    """Trains 2 epochs of 4 iterations, then up to 3, then up to 5; returns what has come of it."""
    manual_seed(7)
    last = nn.Linear(4, 1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), last)
    named = [one for name, one in model.named_parameters() if name != "2.bias"]
    optimizer = torch.optim.SGD(named, 0.1, momentum=0.9)
    loss = nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)
    trainer.state.factor = 1.0  # type: ignore[attr-defined]
    trainer.state_dict_user_keys.append("factor")
    # What handlers of a run's end draw and change, they do again as well.
    trainer.add_event_handler(Events.COMPLETED, lambda: torch.rand(3))

    @trainer.on(Events.ITERATION_COMPLETED)
    def end(engine: Any) -> None:
        with torch.no_grad():
            last.weight.mul_(1 - 0.01 * engine.state.factor)
        if engine.state.iteration == kill:
            raise _Killed

    run = resume_or_start(
        trainer, {"model": model, "optimizer": optimizer}, folder, 1, signals=(), background=False
    )
    x = torch.arange(36.0).reshape(12, 3) / 36
    data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=3, shuffle=True)
    assert run is not None
    for number, epochs in enumerate((2, 3, 5)):
        if number:
            between(trainer, model, optimizer)
        trainer.run(data, max_epochs=epochs)
    return digest([model.state_dict(), optimizer.state_dict()])


@pytest.mark.parametrize("between", [_halves, _draws, _freezes, _adds_a_group, _turns])
def test_what_is_done_between_runs_is_done_once(between: Between, tmp_path: Path) -> None:
    if between is _adds_a_group:
        groups: list[int] = []

        def between_once(trainer: Any, model: Any, optimizer: Any) -> None:
            # Only once in a whole run, so before its second part.
            if trainer.state.max_epochs == 2:
                _adds_a_group(trainer, model, optimizer)
            groups.append(len(optimizer.param_groups))

        between = between_once
    straight = _program(tmp_path / "straight", between)
    # At the end of the first part, and within the second and the third.
    for kill in (9, 10, 14):
        folder = tmp_path / str(kill)
        with pytest.raises(_Killed):
            _program(folder, between, kill)
        assert _program(folder, between) == straight, kill


@pytest.mark.parametrize("kind", ["fine_tune", "take_turns"])
def test_a_signal_ends_what_would_go_on_from_a_run(
    kind: str, tmp_path: Path, forked_programs: None
) -> None:
    """Also of one that never looks at an exit code: what comes later would begin on half of it."""
    program = "several_trainers_program.py"
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    assert exit_of(program, str(straight), kind, "0") == 0
    assert exit_of(program, str(stopped), kind, "5") == 128 + signal.SIGTERM
    assert not (stopped / "end").exists()
    assert exit_of(program, str(stopped), kind, "0") == 0
    assert (stopped / "end").read_text() == (straight / "end").read_text()


def test_a_script_may_start_a_stopped_run_again(tmp_path: Path, forked_programs: None) -> None:
    for name, stop in (("straight", "0"), ("stopped", "5")):
        (tmp_path / name).mkdir()
        assert (
            exit_of("several_trainers_program.py", str(tmp_path / name), "start_again", stop) == 0
        )
    assert (tmp_path / "stopped/end").read_text() == (tmp_path / "straight/end").read_text()


def test_a_run_that_has_nothing_to_do_with_the_stopped_one_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a test does after another, in one process; the log tells it."""
    for name in ("one", "two"):
        caplog.clear()
        trainer = DeterministicEngine(lambda engine, batch: None)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: signal.raise_signal(signal.SIGTERM)
        )
        run = resume_or_start(trainer, {"model": nn.Linear(1, 1)}, tmp_path / name, 1)
        trainer.run([torch.ones(1)] * 4)
        assert (trainer.state.iteration, run.exit_code) == (2, 143)
    assert caplog.text.count("has ended another run of this program") == 1


def test_ctrl_c_at_a_prompt_ends_one_run_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss_fn, deterministic=True)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=2), lambda: signal.raise_signal(signal.SIGINT)
    )
    run = resume_or_start(trainer, {"model": model, "optimizer": optimizer}, tmp_path, 1)
    data = [(torch.ones(2, 3), torch.ones(2, 1))] * 4
    trainer.run(data, max_epochs=2)
    assert (trainer.state.iteration, run.exit_code) == (2, 130)
    trainer.run(data)
    assert (trainer.state.epoch, run.exit_code) == (2, 0)
