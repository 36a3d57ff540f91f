"""Accumulation: each window's gradients are averaged over the window's true size, wherever it ends.

The trainer's windows are of 4 iterations unless said. Where a run turns out shorter than was
planned, a test lets 2 be left of 4: halving and doubling are exact, so the bits still tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from step_runs import OPTIMIZERS, Batch, every_optimizer, small_scaler
from torch import nn
from training_runs import (
    assert_near,
    assert_same,
    batches,
    loss_fn,
    network,
    sgd,
    state_of,
    train,
    train_by_hand,
    trainer_of,
)

from crosstrain import backends
from crosstrain.engine import Engine, Events, StepEvents, create_supervised_trainer


class Unsized:
    """Data that can be iterated anew and does not tell its length."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.data)


def expected(data: list[Batch], windows: list[int], **arguments: Any) -> tuple[Any, Any]:
    """The losses, and the state after training by hand over these windows."""
    assert len(data) == sum(windows)
    model = network()
    optimizer = sgd(model)
    losses = train_by_hand(model, optimizer, data, windows, **arguments)
    return losses, state_of(model, optimizer)


def accumulating(steps: int = 4, **arguments: Any) -> tuple[Engine, Callable[[], Any]]:
    """A trainer that accumulates, and what returns the state of what it trains."""
    model = network()
    trainer = trainer_of(model, gradient_accumulation_steps=steps, **arguments)
    return trainer, lambda: state_of(model, trainer.objects["optimizer"])


def on(trainer: Engine, event: Any, request: str, **arguments: Any) -> None:
    """Has a request (`terminate`, `interrupt`, ...) made at an event."""
    trainer.add_event_handler(event, lambda: getattr(trainer, request)(**arguments))


# Where the length of the run is known


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_windows_cross_epochs_and_the_last_has_its_own_size(
    spec: str, max_norm: float | None
) -> None:
    data, fp16 = batches(5), spec == "cpu:fp16"
    losses, state = expected(
        data * 3,
        [4, 4, 4, 3],
        spec=spec,
        max_norm=max_norm,
        scaler=small_scaler() if fp16 else None,
    )
    settings = {"scaler": small_scaler()} if fp16 else {}
    trainer, ours = accumulating(backend=backends.get(spec, **settings), max_norm=max_norm)
    assert train(trainer, data, max_epochs=3) == losses
    assert_same(ours(), state)
    assert trainer.state.optim_steps == trainer.state.applied_steps == 4


@pytest.mark.parametrize(
    ("limits", "windows"),
    [
        ({"max_iters": 7}, [4, 3]),
        ({"max_iters": 3}, [3]),
        ({"max_epochs": 1}, [4, 1]),
        ({"max_epochs": 2, "epoch_length": 3}, [4, 2]),
        ({"max_epochs": 4, "epoch_length": 1}, [4]),
        ({"max_iters": 9, "epoch_length": 4}, [4, 4, 1]),
    ],
)
def test_the_limits_of_a_run_decide_its_last_window(
    limits: dict[str, int], windows: list[int]
) -> None:
    data = batches(5)
    losses, state = expected((data * 3)[: sum(windows)], windows)
    trainer, ours = accumulating()
    assert train(trainer, data, **limits) == losses
    assert_same(ours(), state)


def test_a_window_that_is_longer_than_the_run() -> None:
    losses, state = expected(batches(3), [3])
    trainer, ours = accumulating(100)
    assert train(trainer, batches(3)) == losses
    assert_same(ours(), state)


def test_a_run_that_is_made_longer_goes_on_with_a_new_window() -> None:
    losses, state = expected(batches(6) * 2, [4, 2, 4, 2])
    trainer, ours = accumulating()
    first = train(trainer, batches(6))
    trainer.run(batches(6), max_epochs=2)
    assert first == losses
    assert_same(ours(), state)


# Where it turns out


def test_data_that_does_not_tell_its_length() -> None:
    losses, state = expected(batches(6), [4, 2])
    trainer, ours = accumulating()
    assert train(trainer, (batch for batch in batches(6))) == losses
    assert_same(ours(), state)


def test_any_size_of_the_last_window_is_averaged_to_rounding() -> None:
    losses, state = expected(batches(7), [4, 3], max_norm=0.5)
    trainer, ours = accumulating(max_norm=0.5)
    assert train(trainer, Unsized(batches(7))) == losses
    assert_near(ours(), state)


def test_the_length_that_the_first_epoch_tells_is_used() -> None:
    # Of the window over iterations 13 and 14 it is known where it ends.
    losses, state = expected(batches(7) * 2, [4, 4, 4, 2])
    trainer, ours = accumulating()
    assert train(trainer, Unsized(batches(7)), max_epochs=2) == losses
    assert_same(ours(), state)


@pytest.mark.parametrize("skip_completed", [False, True])
def test_terminate_steps_the_open_window(skip_completed: bool) -> None:
    losses, state = expected(batches(6), [4, 2])
    trainer, ours = accumulating()
    seen: list[Any] = []
    on(trainer, Events.ITERATION_COMPLETED(once=6), "terminate", skip_completed=skip_completed)
    trainer.add_event_handler(Events.TERMINATE, lambda: seen.extend(ours()))
    assert train(trainer, batches(10)) == losses
    assert_same(ours(), state)
    # The handlers of the run's end see what it has led to.
    assert_same(seen, state)


def test_terminate_between_two_iterations_steps_the_open_window() -> None:
    losses, state = expected(batches(6), [4, 2])
    trainer, ours = accumulating()
    on(trainer, Events.ITERATION_STARTED(once=7), "terminate")
    outputs = train(trainer, batches(10))
    assert outputs == losses
    assert_same(ours(), state)


def test_terminate_where_no_window_is_open_steps_nothing() -> None:
    trainer, _ = accumulating()
    on(trainer, Events.ITERATION_COMPLETED(once=4), "terminate")
    trainer.run(batches(10))
    assert trainer.state.optim_steps == 1


def test_a_window_goes_on_behind_an_epoch_that_is_ended_early() -> None:
    losses, state = expected([*batches(3), *batches(5)], [4, 4])
    trainer, ours = accumulating()
    on(trainer, Events.ITERATION_COMPLETED(once=3), "terminate_epoch")
    assert train(trainer, batches(5), max_epochs=2) == losses
    assert_same(ours(), state)


@pytest.mark.parametrize("skip_epoch_completed", [False, True])
def test_the_last_epoch_ended_early_steps_the_open_window(skip_epoch_completed: bool) -> None:
    losses, state = expected([*batches(5), batches(1)[0]], [4, 2])
    trainer, ours = accumulating()
    on(
        trainer,
        Events.ITERATION_COMPLETED(once=6),
        "terminate_epoch",
        skip_epoch_completed=skip_epoch_completed,
    )
    last = Events.COMPLETED if skip_epoch_completed else Events.EPOCH_COMPLETED(once=2)
    seen: list[Any] = []
    trainer.add_event_handler(last, lambda: seen.extend(ours()))
    assert train(trainer, batches(5), max_epochs=2) == losses
    assert_same(ours(), state)
    assert_same(seen, state)


def test_a_window_left_in_fp16_is_stepped_unscaled() -> None:
    losses, state = expected(batches(6), [4, 2], spec="cpu:fp16", scaler=small_scaler())
    trainer, ours = accumulating(backend=backends.get("cpu:fp16", scaler=small_scaler()))
    assert train(trainer, Unsized(batches(6))) == losses
    assert_same(ours(), state)


@every_optimizer
def test_each_optimizer_steps_a_window_left(kind: str) -> None:
    plain, model = network(), network()
    other, optimizer = (OPTIMIZERS[kind](m.parameters()) for m in (plain, model))
    losses = train_by_hand(plain, other, batches(6), [4, 2])
    trainer = create_supervised_trainer(model, optimizer, loss_fn, gradient_accumulation_steps=4)
    assert train(trainer, Unsized(batches(6))) == losses
    assert_same(state_of(model, optimizer), state_of(plain, other))


# Pauses and errors


def test_an_interruption_in_a_window_changes_nothing() -> None:
    losses, state = expected(batches(5) * 2, [4, 4, 2])
    trainer, ours = accumulating()
    on(trainer, Events.ITERATION_COMPLETED(every=3), "interrupt")
    outputs = train(trainer, batches(5), max_epochs=2)
    while trainer.state.iteration < 10:
        trainer.run(batches(5), max_epochs=2)
    assert outputs == losses
    assert_same(ours(), state)


class Failure(Exception):
    """What the tests raise in the middle of an iteration."""


def failing(trainer: Engine, event: Any, data: list[Batch]) -> Failure:
    """Runs over the data, fails at an event, and runs on over what is left of the data."""

    def fail() -> None:
        raise Failure

    handle = trainer.add_event_handler(event, fail)
    torch.manual_seed(11)
    with pytest.raises(Failure) as raised:
        trainer.run(data)
    handle.remove()
    trainer.run(data[trainer.state.iteration - 1 :], epoch_length=len(data))
    return raised.value


def plain_trainer(**arguments: Any) -> tuple[nn.Module, Engine]:
    """A trainer of a model whose forward pass leaves no trace."""
    torch.manual_seed(3)
    model = nn.Linear(64, 10)
    return model, trainer_of(model, gradient_accumulation_steps=4, **arguments)


def plain_expected(data: list[Batch], windows: list[int]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Linear(64, 10)
    train_by_hand(model, sgd(model), data, windows)
    return state_of(model)


def test_an_iteration_that_fails_before_its_backward_pass_leaves_the_window_whole() -> None:
    model, trainer = plain_trainer()
    failing(trainer, Events.ITERATION_STARTED(once=3), batches(8))
    assert trainer.state.iteration == 8
    assert_same(state_of(model), plain_expected(batches(8), [4, 4]))

    broken = [*batches(2), (batches(1)[0][0], "no labels"), *batches(8)[3:]]
    model, trainer = plain_trainer()
    with pytest.raises(TypeError, match="argument 'target'"):
        trainer.run(broken)
    trainer.run(batches(8)[2:], epoch_length=8)
    assert_same(state_of(model), plain_expected(batches(8), [4, 4]))


@pytest.mark.parametrize(
    "event", [StepEvents.BACKWARD_STARTED(once=3), StepEvents.BACKWARD_COMPLETED(once=3)]
)
def test_an_iteration_that_fails_in_its_backward_pass_drops_the_window(event: Any) -> None:
    model, trainer = plain_trainer()
    error = failing(trainer, event, batches(8))
    assert "2 earlier iterations of this accumulation window are dropped" in error.__notes__[0]
    # Iterations 1 and 2 are lost; 3 is done anew.
    assert_same(state_of(model), plain_expected(batches(8)[2:], [4, 2]))
    assert trainer.state.optim_steps == 2


def test_an_iteration_that_fails_before_its_optimizer_steps_drops_the_window() -> None:
    model, trainer = plain_trainer()
    failing(trainer, StepEvents.OPTIM_STEP_STARTED(once=1), batches(8))
    assert_same(state_of(model), plain_expected(batches(8)[3:], [4, 1]))


def test_one_that_fails_when_it_has_stepped_begins_a_new_window() -> None:
    model, trainer = plain_trainer()
    error = failing(trainer, StepEvents.OPTIM_STEP_APPLIED(once=1), batches(8))
    assert not hasattr(error, "__notes__")
    assert_same(state_of(model), plain_expected([*batches(4), *batches(8)[3:]], [4, 4, 1]))


def test_a_failing_output_transform_drops_the_window() -> None:
    fail = [False, True, *[False] * 20]

    def output_transform(*_: Any) -> None:
        if fail.pop(0):
            raise Failure

    model, trainer = plain_trainer(output_transform=output_transform)
    with pytest.raises(Failure):
        trainer.run(batches(8))
    trainer.run(batches(8)[1:], epoch_length=8)
    assert_same(state_of(model), plain_expected(batches(8)[1:], [4, 3]))


def test_a_new_run_does_not_take_over_the_window_of_one_that_failed() -> None:
    model, trainer = plain_trainer()

    def fail() -> None:
        raise Failure

    with (
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), fail),
        pytest.raises(Failure),
    ):
        trainer.run(batches(8))
    assert trainer.state.applied_steps == 1
    trainer.state.max_epochs = None
    trainer.run(batches(5))
    assert_same(state_of(model), plain_expected([*batches(4), *batches(5)], [4, 4, 1]))
    assert trainer.state.applied_steps == 2
