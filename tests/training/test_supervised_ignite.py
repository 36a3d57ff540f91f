"""The factories beside pytorch-ignite's own: same weights, outputs and metrics where both agree.

They differ, on purpose, in what `docs/training_step.md` lists: the last partial window of a run,
whole-number windows over epochs, the unread output, and the reduced copy of a divided loss.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ignite.engine
import pytest
import torch
from ignite.metrics import Accuracy, Loss
from torch import Tensor, nn
from training_runs import assert_same, batches, loss_fn, network, sgd, state_of, train

import crosstrain.engine
from crosstrain.engine import Engine, Events, create_supervised_evaluator

OURS: Any = crosstrain.engine
IGNITE: Any = ignite.engine


def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> tuple[Tensor, Tensor]:
    return batch[0] * 2, batch[1]


ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "device": {"device": "cpu"},
    "prepare_batch": {"prepare_batch": prepare_batch, "non_blocking": True},
    "model_fn": {"model_fn": lambda model, x: model(x * 0.5)},
    "model_transform": {"model_transform": lambda output: output * 2},
    "output_transform": {"output_transform": lambda x, y, y_pred, loss: (x.sum(), y_pred.sum())},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation over epochs": {"gradient_accumulation_steps": 8},
    "scaler": {"scaler": False},
}


def trained(lib: ModuleType, arguments: dict[str, Any], **limits: Any) -> tuple[Any, Any]:
    model = network()
    optimizer = sgd(model)
    trainer: Any = lib.create_supervised_trainer(model, optimizer, loss_fn, **arguments)
    # Handlers of one library's events work in the other's engine; `train` uses ours.
    outputs = train(trainer, batches(4), **limits)
    return outputs, state_of(model, optimizer)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_trainer_ends_with_the_bits_of_ignites(name: str) -> None:
    ours, state = trained(OURS, ARGUMENTS[name], max_epochs=4)
    theirs, reference = trained(IGNITE, ARGUMENTS[name], max_epochs=4)
    assert ours == theirs
    assert_same(state, reference)


def test_positional_arguments_mean_the_same() -> None:
    def build(lib: Any) -> tuple[Any, Any]:
        model = network()
        optimizer = sgd(model)
        trainer = lib.create_supervised_trainer(
            model,
            optimizer,
            loss_fn,
            "cpu",
            False,
            prepare_batch,
            lambda output: output + 1,
            lambda x, y, y_pred, loss: loss.item(),
            False,
            None,
            False,
            2,
            lambda model, x: model(x),
        )
        return train(trainer, batches(4)), state_of(model, optimizer)

    ours, theirs = build(OURS), build(IGNITE)
    assert ours[0] == theirs[0]
    assert_same(ours[1], theirs[1])


def test_the_training_door_is_ignites() -> None:
    def build(lib: Any) -> list[Tensor]:
        model = network()
        optimizer = sgd(model)
        step = lib.supervised_training_step(
            model, optimizer, loss_fn, gradient_accumulation_steps=2
        )
        train(lib.Engine(step), batches(4))
        return state_of(model, optimizer)

    assert_same(build(OURS), build(IGNITE))


def evaluated(lib: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    evaluator = lib.create_supervised_evaluator(
        network(), {"accuracy": Accuracy(), "loss": Loss(loss_fn)}, **arguments
    )
    state = evaluator.run(batches(5))
    return state.metrics, state.output[0]


@pytest.mark.parametrize(
    "name", ["plain", "device", "prepare_batch", "model_fn", "model_transform"]
)
def test_an_evaluator_measures_what_ignites_does(name: str) -> None:
    ours, y_pred = evaluated(OURS, ARGUMENTS[name])
    theirs, other = evaluated(IGNITE, ARGUMENTS[name])
    assert ours == theirs
    assert set(ours) == {"accuracy", "loss"}
    assert torch.equal(y_pred, other)


def test_the_evaluation_door_is_ignites() -> None:
    def build(lib: Any) -> Any:
        engine = lib.Engine(lib.supervised_evaluation_step(network()))
        return engine.run(batches(2)).output

    assert_same(build(OURS), build(IGNITE))


def test_metrics_of_ones_own_are_attached_by_name() -> None:
    class Count:
        """A metric that is no class of any library's."""

        def attach(self, engine: Engine, name: str) -> None:
            engine.add_event_handler(Events.EPOCH_STARTED, lambda: self.reset(engine, name))
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.update(engine, name))

        def reset(self, engine: Engine, name: str) -> None:
            engine.state.metrics[name] = 0

        def update(self, engine: Engine, name: str) -> None:
            y_pred, y = engine.state.output
            engine.state.metrics[name] += int((y_pred.argmax(1) == y).sum())

    model = network()
    evaluator = create_supervised_evaluator(model, {"correct": Count(), "accuracy": Accuracy()})
    metrics = evaluator.run(batches(5)).metrics
    assert metrics["correct"] == metrics["accuracy"] * 160
    assert not model.training


def test_the_output_of_an_odd_window_is_the_loss_itself() -> None:
    """Ignite divides a loss by the window and multiplies it again, which may cost its last bit."""
    arguments = {"gradient_accumulation_steps": 3, "output_transform": lambda *a: a[3].item()}
    ours, state = trained(OURS, arguments, max_iters=12)
    theirs, reference = trained(IGNITE, arguments, max_iters=12)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert_same(state, reference)


def test_a_model_is_in_training_mode_where_ignite_puts_it() -> None:
    def modes(lib: Any) -> list[bool]:
        model = network()
        model[3].eval()
        seen: list[bool] = []
        trainer = lib.create_supervised_trainer(
            model,
            sgd(model),
            loss_fn,
            output_transform=lambda *_: seen.extend(m.training for m in model.modules()),
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED, nn.Module.eval, model[3])
        trainer.run(batches(2))
        return seen

    assert modes(OURS) == modes(IGNITE)
