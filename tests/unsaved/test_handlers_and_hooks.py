"""Handlers, hooks and modules that handlers attach, remove or exchange in mid-run are told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from crosstrain.engine import (
    Checks,
    Events,
    ResumeError,
    ResumeWarning,
    create_supervised_trainer,
    resume_or_start,
)

Case = Callable[[Any, nn.Sequential, Any], None]


def _decay(optimizer: Any) -> Callable[[], None]:
    def decay() -> None:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9

    return decay


def _halved(module: Any, given: Any, found: Any) -> Any:
    return found * 0.5


def _handler_added(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    decay = _decay(optimizer)

    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def add() -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, decay)


def _handler_removes_itself(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    decay = _decay(optimizer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def warm_up() -> None:
        decay()
        if trainer.state.iteration == 3:
            trainer.remove_event_handler(warm_up, Events.ITERATION_COMPLETED)


def _hook_added(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    @trainer.on(Events.EPOCH_STARTED(once=2))
    def add() -> None:
        model[0].register_forward_hook(_halved)


def _hook_removed(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    handle = model[0].register_forward_hook(_halved)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: handle.remove())


def _module_exchanged(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def exchange() -> None:
        model[1] = nn.GELU()


def _parametrized(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def normalize() -> None:
        parametrizations.weight_norm(model[0])


TOLD = [
    (_handler_added, "decay (a handler of ITERATION_COMPLETED), which was added"),
    (_handler_removes_itself, "warm_up (a handler of ITERATION_COMPLETED), which was removed"),
    (_hook_added, "a forward hook of model.0, which was added"),
    (_hook_removed, "a forward hook of model.0, which was removed"),
    (_module_exchanged, "model.1 (a ReLU), which was removed"),
    (_parametrized, "model.0 (a ParametrizedLinear), which was added"),
]


def _run(folder: Path, attach: Case, checks: Checks | None = None) -> list[str]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    model(torch.ones(1, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer: Any = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )
    if checks is not None:
        trainer.checks = checks
    attach(trainer, model, optimizer)
    data = [(torch.ones(2, 3) * i, torch.ones(2, 1)) for i in range(3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_save = {"model": model, "optimizer": optimizer}
        resume_or_start(trainer, to_save, folder, 1, signals=())
        trainer.run(data, max_epochs=3)
    return [str(item.message) for item in caught if item.category is ResumeWarning]


@pytest.mark.parametrize(("attach", "told"), TOLD)
def test_what_handlers_attach_remove_or_exchange_is_told_once(
    attach: Case, told: str, tmp_path: Path
) -> None:
    (said,) = _run(tmp_path, attach)
    assert told in said
    assert "handler of STARTED" in said


def test_it_is_an_error_where_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="decay"):
        _run(tmp_path, _handler_added, Checks(unnamed="error"))
    assert _run(tmp_path, _handler_added, Checks(unnamed="off")) == []


def _within_an_epoch(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    handle: Any = None

    @trainer.on(Events.EPOCH_STARTED)
    def add() -> None:
        nonlocal handle
        handle = model[0].register_forward_hook(_halved)

    @trainer.on(Events.EPOCH_COMPLETED)
    def remove() -> None:
        handle.remove()


def _anew_each_epoch(trainer: Any, model: nn.Sequential, optimizer: Any) -> None:
    handles: list[Any] = []

    @trainer.on(Events.STARTED | Events.EPOCH_STARTED)
    def add() -> None:
        while handles:
            handles.pop().remove()
        handles.append(trainer.add_event_handler(Events.ITERATION_STARTED, _decay(optimizer)))


@pytest.mark.parametrize("attach", [_within_an_epoch, _anew_each_epoch])
def test_what_each_epoch_does_again_is_not_told(attach: Case, tmp_path: Path) -> None:
    assert _run(tmp_path, attach) == []


def test_what_a_script_does_between_runs_is_not_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(1))
    model(torch.ones(1, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer: Any = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, backend="cpu", deterministic=True
    )
    data = [(torch.ones(2, 3), torch.ones(2, 1))] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        resume_or_start(trainer, {"model": model, "optimizer": optimizer}, tmp_path, 1, signals=())
        trainer.run(data, max_epochs=1)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, _decay(optimizer))
        trainer.run(data, max_epochs=2)
