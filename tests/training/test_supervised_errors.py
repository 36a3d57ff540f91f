"""Bad input to the factories and the step: an error where it was made, and a run that can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_runs import small_scaler
from torch import Tensor, nn
from training_runs import (
    assert_same,
    batches,
    loss_fn,
    network,
    sgd,
    state_of,
    train_by_hand,
    trainer_of,
)

from crosstrain import backends
from crosstrain.backends import BackendError
from crosstrain.engine import (
    Engine,
    EvaluationStep,
    Events,
    StepOptions,
    TrainingStep,
    create_supervised_evaluator,
    create_supervised_trainer,
)

# At the factory


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gradient_accumulation_steps": 0}, ValueError, r"must be strictly positive.*got 0"),
        ({"gradient_accumulation_steps": -2}, ValueError, r"must be strictly positive.*got -2"),
        ({"gradient_accumulation_steps": 1.5}, ValueError, r"an integer.*got 1\.5"),
        ({"max_norm": 0}, ValueError, r"above 0; got 0\. Leave it out"),
        ({"max_norm": -1.0}, ValueError, r"above 0; got -1\.0"),
        ({"max_norm": float("nan")}, ValueError, r"above 0; got nan"),
        ({"prepare_batch": 3}, TypeError, r"prepare_batch should be a function, got 3"),
        ({"model_fn": "forward"}, TypeError, r"model_fn should be a function, got 'forward'"),
        ({"model_transform": 1}, TypeError, r"model_transform should be a function, got 1"),
        ({"output_transform": 1}, TypeError, r"output_transform should be a function, got 1"),
    ],
)
def test_an_illegal_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(network(), **arguments)


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"Optimizer 0 \(SGD\) holds no parameter of the model"):
        create_supervised_trainer(network(), sgd(network()), loss_fn)
    models = [network(), network()]
    with pytest.raises(ValueError, match=r"Optimizer 1 \(SGD\) holds no parameter"):
        create_supervised_trainer(
            models, [sgd(models[0]), sgd(network())], loss_fn, model_fn=lambda m, x: m[0](x)
        )


def test_two_optimizers_of_one_parameter() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"Optimizers 0 and 1 hold the same parameter, of shape"):
        create_supervised_trainer(model, [sgd(model), sgd(model[4])], loss_fn)


def test_an_optimizer_that_needs_a_closure() -> None:
    model = network()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"LBFGS\).*step\(\) requires 'closure'.*SGD or AdamW"):
        create_supervised_trainer(model, lbfgs, loss_fn)


def test_a_scheduler_on_the_optimizer_is_no_closure() -> None:
    model = network()
    optimizer = sgd(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    create_supervised_trainer(model, optimizer, loss_fn).run(batches(1))


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        (None, None, TypeError, r"NoneType"),
        (network, lambda m: "sgd", TypeError, r"got str"),
        (list, lambda m: [], ValueError, r"model is an empty list"),
        (lambda: [network()], lambda m: sgd(m[0]), ValueError, r"Several models.*Pass model_fn="),
        (network, lambda m: [], ValueError, r"optimizer is an empty list"),
    ],
)
def test_what_is_no_model_or_no_optimizer(
    model: Any, optimizer: Any, error: type[Exception], message: str
) -> None:
    model = model and model()
    with pytest.raises(error, match=message):
        create_supervised_trainer(model, optimizer and optimizer(model), loss_fn)


def test_a_loss_function_that_cannot_be_called() -> None:
    model = network()
    with pytest.raises(
        TypeError, match=r"loss_fn should be a function of \(y_pred, y\), got 'mse'"
    ):
        create_supervised_trainer(model, sgd(model), "mse")  # type: ignore[arg-type]


def test_evaluation_refuses_the_same() -> None:
    with pytest.raises(ValueError, match=r"Several models.*Pass model_fn="):
        create_supervised_evaluator([network(), network()])
    with pytest.raises(TypeError, match=r"output_transform should be a function"):
        EvaluationStep(network(), backends.get("cpu").open(), output_transform=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above 0; got -1"):
        StepOptions(max_norm=-1)


# The batch


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 64), r"got Tensor: it has no x and y"),
        ({"x": 1, "y": 2}, r"got dict: it has no x and y"),
        ("xy", r"got str: it has no x and y"),
        ((torch.zeros(2, 64),), r"got tuple: not enough values to unpack"),
        ([1, 2, 3], r"got list: too many values to unpack"),
        (7, r"got int: cannot unpack non-iterable int object"),
    ],
)
def test_a_batch_that_is_no_pair(batch: Any, message: str) -> None:
    for make in (trainer_of, create_supervised_evaluator):
        with pytest.raises(ValueError, match=message + r".*Pass prepare_batch=function"):
            make(network()).run([batch])


def test_prepare_batch_that_returns_no_pair() -> None:
    trainer = trainer_of(network(), prepare_batch=lambda batch, device, non_blocking: batch[0])
    with pytest.raises(
        ValueError, match=r"prepare_batch should return a pair \(x, y\), got Tensor"
    ):
        trainer.run(batches(1))


# The loss


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, y: loss_fn(p, y, reduction="none"), r"has shape \(32,\): reduce it, with mean"),
        (lambda p, y: loss_fn(p, y).item(), r"its result is float, not a tensor"),
        (lambda p, y: None, r"its result is NoneType, not a tensor"),
        (lambda p, y: loss_fn(p, y).detach(), r"does not depend on a parameter.*detached"),
        (lambda p, y: (p.argmax(1) == y).float().mean(), r"does not depend on a parameter"),
    ],
)
def test_a_loss_that_cannot_be_trained_on(loss: Any, message: str) -> None:
    model = network()
    before = state_of(model[0])
    trainer = create_supervised_trainer(model, sgd(model), loss)
    with pytest.raises(ValueError, match=message):
        trainer.run(batches(1))
    assert_same(state_of(model[0]), before)


def test_a_loss_of_one_element_need_not_be_a_scalar() -> None:
    model = network()
    trainer = create_supervised_trainer(
        model, sgd(model), lambda p, y: loss_fn(p, y).reshape(1), gradient_accumulation_steps=2
    )
    assert isinstance(trainer.run(batches(2)).output, float)


def test_a_frozen_model_has_nothing_to_train() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="is the whole model frozen"):
        trainer_of(model).run(batches(1))


# The gradient


def test_an_optimizer_that_no_gradient_reaches() -> None:
    models = [network(), nn.Linear(64, 10)]
    trainer = create_supervised_trainer(
        models, [sgd(model) for model in models], loss_fn, model_fn=lambda m, x: m[0](x)
    )
    with pytest.raises(BackendError, match=r"SGD was stepped without a gradient"):
        trainer.run(batches(1))


# A run that raised can be run again


class Failure(Exception):
    """What the tests raise."""


class Fragile(nn.Linear):
    """A model that fails at one call, without a trace."""

    def __init__(self, fails_at: int) -> None:
        torch.manual_seed(3)
        super().__init__(64, 10)
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise Failure
        return super().forward(x)


@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_a_model_that_raises_in_the_middle(spec: str) -> None:
    fp16 = spec == "cpu:fp16"
    model, plain = Fragile(fails_at=3), Fragile(fails_at=0)
    settings = {"scaler": small_scaler()} if fp16 else {}
    trainer = trainer_of(model, backend=backends.get(spec, **settings))
    with pytest.raises(Failure):
        trainer.run(batches(5))
    assert trainer.state.iteration == 3
    # Neither autocast nor anything else is left behind.
    assert not torch.is_autocast_enabled("cpu")
    trainer.run(batches(5)[2:], epoch_length=5)
    scaler = small_scaler() if fp16 else None
    train_by_hand(plain, sgd(plain), batches(5), [1] * 5, spec, scaler=scaler)
    assert_same(state_of(model), state_of(plain))


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", ["before", "after"])
@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
def test_an_optimizer_that_raises_in_the_middle(
    spec: str, kind: str, max_norm: float | None
) -> None:
    """In fp16 the gradients are unscaled by then: those of the next step must be as well."""
    fp16 = spec == "cpu:fp16"
    model, plain = Fragile(fails_at=0), Fragile(fails_at=0)
    optimizer = sgd(model)
    settings = {"scaler": small_scaler(growth_interval=100)} if fp16 else {}
    trainer = create_supervised_trainer(
        model, optimizer, loss_fn, backend=backends.get(spec, **settings), max_norm=max_norm
    )

    def fail(*_: Any) -> None:
        if trainer.state.iteration == 3:
            handle.remove()
            raise Failure

    register = optimizer.register_step_pre_hook
    handle = (register if kind == "before" else optimizer.register_step_post_hook)(fail)
    with pytest.raises(Failure):
        trainer.run(batches(5))
    trainer.run(batches(5)[2:], epoch_length=5)
    # One that fails when the weights have changed is done twice.
    data = batches(5) if kind == "before" else [*batches(3), *batches(5)[2:]]
    # No scale grows: the step that failed does not count for that.
    scaler = small_scaler(growth_interval=100) if fp16 else None
    train_by_hand(plain, sgd(plain), data, [1] * len(data), spec, max_norm, scaler)
    assert_same(state_of(model), state_of(plain))


def test_an_evaluation_that_raises_can_be_run_again() -> None:
    evaluator = create_supervised_evaluator(Fragile(fails_at=2))
    with pytest.raises(Failure):
        evaluator.run(batches(3))
    evaluator.state.max_epochs = None
    evaluator.run(batches(3))
    assert evaluator.state.iteration == 3
    assert torch.is_grad_enabled()


def test_an_error_that_a_handler_deals_with_does_not_spoil_the_next_step() -> None:
    model, plain = Fragile(fails_at=2), Fragile(fails_at=0)
    trainer = trainer_of(model)
    trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda error: None)
    trained: list[Any] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: trained.append(engine.state.batch)
    )
    trainer.run(batches(3), max_epochs=2)
    assert len(trained) == model.calls - 1 >= 3
    train_by_hand(plain, sgd(plain), trained, [1] * len(trained))
    assert_same(state_of(model), state_of(plain))


def test_a_step_works_without_a_backend_in_the_engine() -> None:
    model = network()
    backend = backends.get("null").open()
    step = TrainingStep(model, sgd(model), loss_fn, backend)
    Engine(step).run(batches(1))
    assert backend.calls[-1] == "sync"  # type: ignore[attr-defined]
    Engine(EvaluationStep(model, backend)).run(batches(1))
    assert backend.calls[-2:] == ["end autocast", "sync"]  # type: ignore[attr-defined]
