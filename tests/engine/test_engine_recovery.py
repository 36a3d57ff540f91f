"""An engine that raised runs again, and does each iteration once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from differential import Expected, Unsized, nothing
from torch.utils.data import DataLoader

from crosstrain.engine import Engine, Events


class Failing:
    """A step that fails the first time that each of some iterations is done; keeps the batches.

    Args:
        iterations: the iterations that fail.
        error: what is raised.
    """

    def __init__(self, *iterations: int, error: type[BaseException] = Expected) -> None:
        self.left = set(iterations)
        self.error = error
        self.done: list[tuple[int, int, Any]] = []

    def __call__(self, engine: Engine, batch: Any) -> Any:
        iteration = engine.state.iteration
        if iteration in self.left:
            self.left.remove(iteration)
            raise self.error(f"iteration {iteration}")
        self.done.append((engine.state.epoch, iteration, batch))
        return batch

    @property
    def plan(self) -> list[tuple[int, int]]:
        """The epochs and iterations that were done."""
        return [(epoch, iteration) for epoch, iteration, _ in self.done]


PLAN = [(1 + number // 3, 1 + number) for number in range(9)]


# ---------------------------------------------------------------- an engine that raised


@pytest.mark.parametrize("error", [Expected, KeyboardInterrupt, SystemExit, StopIteration])
@pytest.mark.parametrize("iteration", range(1, 10))
def test_every_iteration_is_done_once(iteration: int, error: type[BaseException]) -> None:
    step = Failing(iteration, error=error)
    engine = Engine(step)
    with pytest.raises(error):
        engine.run([1, 2, 3], max_epochs=3)
    # What the handlers of the failure saw stays to be seen; what a state says is what is done.
    assert engine.state.iteration == iteration
    assert engine.state_dict()["iteration"] == iteration - 1
    engine.run([1, 2, 3])
    assert step.plan == PLAN


def test_several_failures_in_one_epoch() -> None:
    step = Failing(4, 5, 6)
    engine = Engine(step)
    for _ in range(3):
        with pytest.raises(Expected):
            engine.run([1, 2, 3], max_epochs=3)
    engine.run([1, 2, 3])
    assert step.plan == PLAN


def test_data_that_goes_on_is_gone_on_with() -> None:
    step = Failing(4)
    engine = Engine(step)
    numbers = iter(range(100))
    with pytest.raises(Expected):
        engine.run(numbers, max_epochs=3, epoch_length=3)
    engine.run(numbers)
    assert step.plan == PLAN
    # The batch of the failed iteration is used up; a list would have begun anew.
    assert [batch for _, _, batch in step.done] == [0, 1, 2, 4, 5, 6, 7, 8, 9]


# The rest end a run, which the next one does not go on with.
WITHIN = set(Events) - {Events.EXCEPTION_RAISED, Events.TERMINATE, Events.COMPLETED}


@pytest.mark.parametrize("event", sorted(WITHIN, key=str), ids=lambda event: event.name)
def test_a_handler_that_failed_loses_no_iteration(event: Events) -> None:
    step = Failing()
    engine = Engine(step)
    expected = PLAN
    calls: list[int] = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if event in (Events.STARTED, Events.INTERRUPT) else 2):
            raise Expected

    engine.add_event_handler(event, fail)
    if event is Events.INTERRUPT:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=4), engine.interrupt)
    if event is Events.TERMINATE_SINGLE_EPOCH:
        # The epochs are shorter; one that is left by the failed handler is over all the same.
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), engine.terminate_epoch)
        expected = [(1 + number // 2, 1 + number) for number in range(6)]
    with pytest.raises(Expected):
        engine.run([1, 2, 3], max_epochs=3)
    engine.run([1, 2, 3])
    assert step.plan == expected


def test_a_failure_after_shortened_epochs_stays_in_its_epoch() -> None:
    step = Failing(6)
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=[1, 3]), engine.terminate_epoch)
    with pytest.raises(Expected):
        engine.run(range(5), max_epochs=4)
    assert engine.state.epoch == 3
    engine.run(range(5))
    epochs = [epoch for epoch, _ in step.plan]
    assert [epochs.count(epoch) for epoch in (1, 2, 3, 4)] == [1, 2, 5, 5]
    assert [iteration for _, iteration in step.plan] == list(range(1, 14))


def test_a_failure_at_the_end_of_an_epoch_leaves_it_ended() -> None:
    engine = Engine(nothing)
    fired: list[str] = []
    for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        engine.add_event_handler(event, lambda name: fired.append(name), event.name)

    @engine.on(Events.ITERATION_COMPLETED(once=3) | Events.EPOCH_COMPLETED(once=2))
    def fail() -> None:
        raise Expected

    for _ in range(2):
        with pytest.raises(Expected):
            engine.run([1, 2, 3], max_epochs=3)
    assert engine.run([1, 2, 3], max_epochs=3).iteration == 9
    assert fired.count("EPOCH_STARTED") == 3
    assert fired[-3:] == ["EPOCH_STARTED", "EPOCH_COMPLETED", "COMPLETED"]


def test_a_failure_that_a_handler_deals_with_before_another() -> None:
    step = Failing(2, 7)
    engine = Engine(step)
    dealt: list[str] = []

    @engine.on(Events.EXCEPTION_RAISED)
    def deal(error: BaseException) -> None:
        dealt.append(str(error))
        if len(dealt) == 2:
            raise error

    with pytest.raises(Expected):
        engine.run([1, 2, 3], max_epochs=4)
    engine.run([1, 2, 3])
    assert dealt == ["iteration 2", "iteration 7"]
    # Iteration 2 was dealt with: it is not done again, and its epoch was over.
    assert [iteration for _, iteration in step.plan] == [1, *range(3, 12)]
    assert [epoch for epoch, _ in step.plan] == [1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


def test_an_interrupt_from_the_keyboard_that_a_handler_deals_with_ends_the_run() -> None:
    step = Failing(5, error=KeyboardInterrupt)
    engine = Engine(step)
    dealt: list[BaseException] = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: dealt.append(error))
    assert engine.run([1, 2, 3], max_epochs=3).iteration == 5
    assert [type(error) for error in dealt] == [KeyboardInterrupt]
    engine.run([1, 2, 3])
    assert step.plan == PLAN


def test_an_exit_in_a_handler_reaches_the_caller() -> None:
    engine = Engine(nothing)

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        engine.run([1, 2, 3], max_epochs=2)
    assert engine.run([1, 2, 3]).iteration == 6


def test_a_new_run_or_a_state_after_a_failure() -> None:
    step = Failing(4, 5)
    engine = Engine(step)
    with pytest.raises(Expected):
        engine.run([1, 2, 3], max_epochs=3)
    engine.load_state_dict({"iteration": 4, "max_epochs": 2, "epoch_length": 3})
    with pytest.raises(Expected):
        engine.run([1, 2, 3])
    engine.state.max_epochs = None
    assert engine.run([1, 2, 3]).iteration == 3
    assert step.plan == [(1, 1), (1, 2), (1, 3)] * 2


def test_a_failure_while_the_length_is_not_known() -> None:
    step = Failing(2)
    engine = Engine(step)
    with pytest.raises(Expected):
        engine.run(Unsized(3), max_epochs=2)
    state = engine.run(Unsized(3), max_epochs=2)
    assert state.epoch_length == 3
    assert [batch for _, _, batch in step.done] == [0, 0, 1, 2, 0, 1, 2]


class Broken(torch.utils.data.Dataset[int]):
    """A dataset of which one sample cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        if index == 2:
            raise Expected("sample 2")
        return index


def test_a_worker_that_fails_is_an_error_of_the_run() -> None:
    engine = Engine(nothing)
    with pytest.raises(Expected, match="sample 2"):
        engine.run(DataLoader(Broken(), batch_size=1, num_workers=1))
    assert engine.state.iteration == 2


# ---------------------------------------------------------------- the end of a run


def test_functions_called_at_the_end() -> None:
    engine = Engine(Failing(2))
    calls: list[str] = []
    engine.call_at_end(lambda: calls.append("end"))
    with pytest.raises(Expected):
        engine.run([1, 2, 3])
    assert calls == ["end"]
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run([1, 2, 3])
    assert calls == ["end"] * 2
    engine.run()
    assert calls == ["end"] * 3


def test_an_error_at_the_end_is_a_note_of_the_runs_own() -> None:
    engine = Engine(Failing(2))

    def fail() -> None:
        raise OSError("disk full")

    engine.call_at_end(fail)
    with pytest.raises(Expected) as caught:
        engine.run([1, 2, 3])
    assert caught.value.__notes__ == ["At the end of the run: disk full"]
    with pytest.raises(OSError, match="disk full"):
        engine.run([1, 2, 3])


# ---------------------------------------------------------------- the backend's step boundary


class Boundary:
    """Counts what the engine asks of a backend."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.fails_at = fails_at

    def sync(self) -> None:
        self.calls.append("sync")
        if len(self.calls) == self.fails_at:
            raise Expected("sync")


def test_the_backend_is_synced_between_the_step_and_its_end() -> None:
    backend = Boundary()
    engine = Engine(lambda engine, batch: backend.calls.append("step"), backend)  # type: ignore[arg-type]
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: backend.calls.append("end"))
    engine.run([1, 2])
    assert backend.calls == ["step", "sync", "end"] * 2


def test_an_iteration_whose_sync_failed_is_done_again() -> None:
    step = Failing()
    engine = Engine(step, Boundary(fails_at=5))  # type: ignore[arg-type]
    with pytest.raises(Expected, match="sync"):
        engine.run([1, 2, 3], max_epochs=3)
    engine.run([1, 2, 3])
    assert step.plan == [*PLAN[:5], *PLAN[4:]]
