"""EarlyStopping: what it does on our engine, and that pytorch-ignite's does the same on its own."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import ignite.engine
import ignite.handlers
import pytest
import torch
from differential import nothing
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

import crosstrain.engine
from crosstrain.engine import EarlyStopping, Engine, Events


def stopped_at(library: Any, handler: Any, scores: list[float], **options: Any) -> list[Any]:
    """Runs one evaluation with each score an epoch; returns the counters, and when it stopped."""
    trainer, evaluator = library.Engine(nothing), library.Engine(nothing)
    stopping = handler(
        score_function=lambda engine: scores[trainer.state.epoch - 1], trainer=trainer, **options
    )
    seen: list[Any] = []
    evaluator.add_event_handler(library.Events.COMPLETED, stopping)

    @trainer.on(library.Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        evaluator.run([1])
        seen.append((stopping.counter, stopping.best_score))

    trainer.run([1, 2], max_epochs=len(scores))
    return [*seen, trainer.state.epoch]


SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 3.0]), min_size=1, max_size=9)


@settings(max_examples=200, derandomize=True)
@given(
    scores=SCORES,
    patience=st.integers(1, 4),
    threshold=st.sampled_from([0.0, 0.1, 0.5]),
    cumulative=st.booleans(),
    threshold_mode=st.sampled_from(["abs", "rel"]),
    mode=st.sampled_from(["min", "max"]),
)
def test_it_stops_where_ignites_does(scores: list[float], **options: Any) -> None:
    ours = stopped_at(crosstrain.engine, EarlyStopping, scores, **options)
    theirs = stopped_at(ignite.engine, ignite.handlers.EarlyStopping, scores, **options)
    assert ours == theirs


@settings(max_examples=50, derandomize=True)
@given(scores=SCORES, min_delta=st.sampled_from([0.0, 0.1, 0.5]), cumulative_delta=st.booleans())
def test_the_older_names_mean_the_same(scores: list[float], **options: Any) -> None:
    ours = stopped_at(crosstrain.engine, EarlyStopping, scores, patience=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = stopped_at(
            ignite.engine, ignite.handlers.EarlyStopping, scores, patience=2, **options
        )
    assert ours == theirs


def test_patience_and_threshold() -> None:
    scores = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
    small = {"patience": 2, "threshold": 0.15}
    # Each step is too small, but the sum of two is not.
    *seen, epoch = stopped_at(crosstrain.engine, EarlyStopping, scores, **small)
    assert (seen[-1], epoch) == ((2, 1.2), 3)
    *seen, epoch = stopped_at(
        crosstrain.engine, EarlyStopping, scores, patience=2, threshold=0.15, cumulative=True
    )
    assert [counter for counter, _ in seen] == [0, 1, 0, 1, 0, 1, 0]
    assert epoch == 7


def test_a_score_that_is_not_a_number_is_no_improvement() -> None:
    nan = math.nan
    scores = [1, nan, 2, nan, nan, 3]
    *seen, epoch = stopped_at(crosstrain.engine, EarlyStopping, scores, patience=2)
    assert [counter for counter, _ in seen] == [0, 1, 0, 1, 2]
    assert (seen[-1][1], epoch) == (2.0, 5)
    *seen, epoch = stopped_at(crosstrain.engine, EarlyStopping, [nan, 1, nan, nan], patience=2)
    assert [counter for counter, _ in seen] == [1, 0, 1, 2]
    # pytorch-ignite takes NaN for an improvement, and what follows it too.
    scores = [1, nan, 0, nan, 0, nan]
    *seen, _ = stopped_at(ignite.engine, ignite.handlers.EarlyStopping, scores, patience=2)
    assert [counter for counter, _ in seen] == [0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("mode", "scores"), [("max", [-1.0, -1.05]), ("min", [-1.05, -1.0])])
def test_a_share_of_a_negative_score(mode: str, scores: list[float]) -> None:
    options = {"patience": 1, "threshold": 0.1, "threshold_mode": "rel", "mode": mode}
    *seen, _ = stopped_at(crosstrain.engine, EarlyStopping, scores, **options)
    assert seen[-1][0] == 1
    # A change for the worse is an improvement there.
    *seen, _ = stopped_at(ignite.engine, ignite.handlers.EarlyStopping, scores, **options)
    assert seen[-1][0] == 0


def test_a_state_survives_a_file() -> None:
    trainer = Engine(nothing)
    scores = iter([torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.5)])
    stopping = EarlyStopping(2, lambda engine: next(scores), trainer)
    stopping(trainer)
    stopping(trainer)
    file = io.BytesIO()
    torch.save(stopping.state_dict(), file)
    file.seek(0)
    other = EarlyStopping(2, lambda engine: 0.9, trainer, threshold_mode="rel")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.counter, other.best_score, other.threshold_mode) == (1, 1.0, "abs")
    other(trainer)
    assert trainer.should_terminate


def test_states_of_ignite_load() -> None:
    trainer = ignite.engine.Engine(nothing)
    theirs = ignite.handlers.EarlyStopping(2, lambda engine: 3.0, trainer)
    theirs(trainer)
    theirs(trainer)
    ours = EarlyStopping(2, lambda engine: 3.0, Engine(nothing))
    ours.load_state_dict(theirs.state_dict())
    assert (ours.counter, ours.best_score) == (1, 3.0)
    ours.load_state_dict({"counter": 0, "best_score": None})
    assert ours.best_score is None


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (None, TypeError, "should be a dictionary"),
        ({"counter": 1}, ValueError, r"\['best_score'\] are absent"),
        ({"counter": -1, "best_score": 1.0}, ValueError, "at least 0, got -1"),
        ({"counter": 1, "best_score": 1.0, "threshold_mode": "x"}, ValueError, "is 'x'"),
    ],
)
def test_states_that_do_not_load(state: Any, error: type[Exception], message: str) -> None:
    stopping = EarlyStopping(2, lambda engine: 3.0, Engine(nothing))
    with pytest.raises(error, match=message):
        stopping.load_state_dict(state)
    assert stopping.counter == 0


def test_a_new_run_forgets_and_a_resumed_one_does_not() -> None:
    def training(epochs: int, state: Any = None) -> tuple[Engine, EarlyStopping]:
        trainer, evaluator = Engine(nothing), Engine(nothing)
        scores = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        stopping = EarlyStopping(3, lambda engine: scores[trainer.state.epoch - 1], trainer)
        stopping.attach(evaluator)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run([1]))
        if state is not None:
            trainer.load_state_dict(state[0])
            stopping.load_state_dict(state[1])
        trainer.run([1, 2], max_epochs=epochs)
        return trainer, stopping

    trainer, stopping = training(6)
    assert (trainer.state.epoch, stopping.counter) == (5, 3)
    half, half_stopping = training(3)
    assert half_stopping.counter == 1
    again, _ = training(6, (half.state_dict(), half_stopping.state_dict()))
    assert again.state.epoch == 5
    trainer.state.max_epochs = None
    trainer.run([1, 2], max_epochs=2)
    assert (stopping.counter, stopping.best_score) == (0, 2.0)


def test_attached_ignites_forgets_at_each_evaluation() -> None:
    trainer, evaluator = ignite.engine.Engine(nothing), ignite.engine.Engine(nothing)
    theirs = ignite.handlers.EarlyStopping(2, lambda engine: 1.0, trainer)
    theirs.attach(evaluator)
    trainer.add_event_handler(ignite.engine.Events.EPOCH_COMPLETED, lambda: evaluator.run([1]))
    assert trainer.run([1, 2], max_epochs=9).epoch == 9


def test_another_event_makes_it_forget() -> None:
    trainer = Engine(nothing)
    stopping = EarlyStopping(2, lambda engine: 1.0, trainer)
    stopping.attach(
        trainer, Events.ITERATION_COMPLETED, trainer, Events.ITERATION_STARTED(once=[3, 5])
    )
    assert trainer.run(range(9)).iteration == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience should be positive integer.*is 0"),
        ({"patience": 1.5}, ValueError, "patience.*is 1.5"),
        ({"score_function": 3}, TypeError, "score_function should be a function.*got 3"),
        ({"trainer": 3}, TypeError, "trainer should be an instance of Engine.*int"),
        ({"threshold": -0.1}, ValueError, "threshold.*negative number.*is -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold.*is nan"),
        ({"threshold_mode": "x"}, ValueError, "'abs' or 'rel'.*'x'"),
        ({"mode": "x"}, ValueError, "'min' or 'max'.*'x'"),
        ({"threshold": 0.1, "min_delta": 0.2}, ValueError, "same thing: got 0.1 and 0.2"),
    ],
)
def test_bad_arguments(options: Any, error: type[Exception], message: str) -> None:
    good = {"patience": 1, "score_function": nothing, "trainer": Engine(nothing)}
    with pytest.raises(error, match=message):
        EarlyStopping(**{**good, **options})


def test_older_names_are_the_same_attributes() -> None:
    stopping = EarlyStopping(1, nothing, Engine(nothing), min_delta=0.1, cumulative_delta=True)
    assert (stopping.threshold, stopping.cumulative) == (0.1, True)
    stopping.min_delta, stopping.cumulative_delta, stopping.min_delta_mode = 0.2, False, "rel"
    assert (stopping.threshold, stopping.cumulative, stopping.threshold_mode) == (0.2, False, "rel")
    assert (stopping.min_delta, stopping.cumulative_delta, stopping.min_delta_mode) == (
        0.2,
        False,
        "rel",
    )
    with pytest.raises(ValueError, match="negative number"):
        stopping.min_delta = -1.0


def test_a_score_that_is_no_number_at_all() -> None:
    trainer = Engine(nothing)
    stopping = EarlyStopping(1, lambda engine: "good", trainer)
    with pytest.raises(TypeError, match="should return a number, got 'good'"):
        stopping(trainer)


def test_a_training_on_digits_stops() -> None:
    digits = load_digits()
    x = torch.tensor(digits.data / 16, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def step(engine: Engine, batch: Any) -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[:300]), y[:300])
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def loss_elsewhere(engine: Engine) -> float:
        return nn.functional.cross_entropy(model(x[1200:]), y[1200:]).item()

    trainer = Engine(step)
    stopping = EarlyStopping(3, loss_elsewhere, trainer, threshold=0.01, mode="min")
    stopping.attach(trainer, Events.EPOCH_COMPLETED)
    state = trainer.run(epoch_length=10, max_epochs=200)
    assert 5 < state.epoch < 200
    assert trainer.should_terminate
    assert state.output < 0.2
