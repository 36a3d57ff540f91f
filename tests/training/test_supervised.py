"""The factory's trainer computes, bit for bit, what the same training written by hand does."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from broken_backends import WithMasters
from step_runs import OPTIMIZERS, every_optimizer, small_scaler
from torch import Tensor, nn
from training_runs import (
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
from crosstrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    create_supervised_evaluator,
    create_supervised_trainer,
)


@every_optimizer
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_training_equals_the_same_by_hand(spec: str, kind: str, max_norm: float | None) -> None:
    data = batches(6)
    theirs = network()
    other = OPTIMIZERS[kind](theirs.parameters())
    scaler = small_scaler() if spec == "cpu:fp16" else None
    losses = train_by_hand(theirs, other, data * 2, [1] * 12, spec, max_norm, scaler)

    ours = network()
    optimizer = OPTIMIZERS[kind](ours.parameters())
    settings = {} if scaler is None else {"scaler": small_scaler()}
    trainer = create_supervised_trainer(
        ours, optimizer, loss_fn, backend=backends.get(spec, **settings), max_norm=max_norm
    )
    assert train(trainer, data, max_epochs=2) == losses
    assert_same(state_of(ours, optimizer), state_of(theirs, other))
    if scaler is not None:
        assert trainer.backend is not None
        assert trainer.backend.state_dict() == scaler.state_dict()


def test_a_deterministic_trainer_computes_the_same_under_its_seed() -> None:
    model, plain = network(), network()
    trainer = trainer_of(model, deterministic=True)
    assert type(trainer) is DeterministicEngine
    assert type(trainer_of(network())) is Engine
    trainer.run(batches(4))
    train_by_hand(plain, sgd(plain), batches(4), [1] * 4, seed=trainer.state.seed)
    assert_same(state_of(model), state_of(plain))


@pytest.mark.parametrize("window", [1, 3])
def test_an_optimizer_may_step_copies_of_the_weights(window: int) -> None:
    model, plain = network(), network()
    settings: dict[str, Any] = {"gradient_accumulation_steps": window, "max_norm": 0.5}
    copies = WithMasters()
    losses = train(trainer_of(model, backend=copies, **settings), batches(6), max_epochs=2)
    assert losses == train(trainer_of(plain, **settings), batches(6), max_epochs=2)
    assert_same(state_of(model), state_of(plain))


# Several models and optimizers


def test_several_models_and_optimizers_equal_the_same_by_hand() -> None:
    def parts() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
        encoder, head = network()[:4], nn.Linear(32, 10)
        return [encoder, head], [
            torch.optim.SGD(encoder.parameters(), lr=0.1),
            torch.optim.AdamW(head.parameters(), lr=0.01),
        ]

    data = batches(5)
    models, optimizers = parts()
    trainer = create_supervised_trainer(
        models, optimizers, loss_fn, model_fn=lambda m, x: m[1](m[0](x)), max_norm=1.0
    )
    assert trainer.objects == {
        "model_0": models[0],
        "model_1": models[1],
        "optimizer_0": optimizers[0],
        "optimizer_1": optimizers[1],
    }
    ours = train(trainer, data)

    others, steppers = parts()
    torch.manual_seed(11)
    losses = []
    for x, y in data:
        for stepper in steppers:
            stepper.zero_grad()
        loss = loss_fn(others[1](others[0](x)), y)
        loss.backward()
        for other, stepper in zip(others, steppers, strict=True):
            nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            stepper.step()
        losses.append(loss.item())
    assert ours == losses
    assert_same(state_of(*models, *optimizers), state_of(*others, *steppers))


def test_a_tuple_of_one_stays_several() -> None:
    model = network()
    trainer = create_supervised_trainer(
        (model,), (sgd(model),), loss_fn, model_fn=lambda models, x: models[0](x)
    )
    assert set(trainer.objects) == {"model_0", "optimizer_0"}
    assert len(train(trainer, batches(2))) == 2


# The functions that the user gives


def test_model_fn_and_model_transform_are_in_the_forward_pass() -> None:
    seen: list[str] = []

    def model_fn(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        seen.append(f"model_fn {torch.is_autocast_enabled('cpu')}")
        return {"logits": model(x)}

    def model_transform(output: dict[str, Tensor]) -> Tensor:
        seen.append(f"model_transform {torch.is_autocast_enabled('cpu')}")
        return output["logits"]

    model, plain = network(), network()
    trainer = trainer_of(
        model, model_fn=model_fn, model_transform=model_transform, backend="cpu:bf16"
    )
    ours = train(trainer, batches(3))
    assert seen == ["model_fn True", "model_transform True"] * 3
    assert ours == train_by_hand(plain, sgd(plain), batches(3), [1] * 3, "cpu:bf16")


def test_prepare_batch_gets_the_device_and_makes_the_pair() -> None:
    calls: list[Any] = []

    def prepare_batch(batch: Any, device: Any, non_blocking: bool) -> tuple[Tensor, Tensor]:
        calls.append((device, non_blocking))
        return batch["image"], batch["label"]

    model, plain = network(), network()
    trainer = trainer_of(model, prepare_batch=prepare_batch, non_blocking=True)
    ours = train(trainer, [{"image": x, "label": y} for x, y in batches(3)])
    assert calls == [(torch.device("cpu"), True)] * 3
    assert ours == train_by_hand(plain, sgd(plain), batches(3), [1] * 3)


def test_output_transform_makes_the_output_of_the_whole_loss() -> None:
    seen: list[Any] = []

    def output_transform(x: Tensor, y: Tensor, y_pred: Tensor, loss: Tensor) -> dict[str, Any]:
        seen.append((x.shape, y.shape, y_pred.shape, loss.item()))
        return {"loss": loss.item()}

    model, plain = network(), network()
    trainer = trainer_of(model, output_transform=output_transform, gradient_accumulation_steps=3)
    ours = train(trainer, batches(3))
    losses = train_by_hand(plain, sgd(plain), batches(3), [3])
    assert ours == [{"loss": loss} for loss in losses]
    assert seen == [((32, 64), (32,), (32, 10), loss) for loss in losses]


Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    """A batch that is no sequence."""

    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [tuple, list, lambda pair: Pair(*pair), lambda pair: iter(pair)])
def test_any_pair_is_a_batch(kind: Any) -> None:
    model, plain = network(), network()
    ours = train(trainer_of(model), [kind(pair) for pair in batches(2)])
    assert ours == train_by_hand(plain, sgd(plain), batches(2), [1] * 2)


def test_nested_inputs_are_put_on_the_device_as_they_are() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: dict[str, Any]) -> Tensor:
            assert isinstance(x["sample"], Sample)
            return self.net(x["sample"].x) + self.net(x["more"][0])

    model = Sum()
    data = [({"sample": Sample(x, y), "more": [x]}, y) for x, y in batches(2)]
    assert len(train(trainer_of(model), data)) == 2


def test_a_compiled_model_trains_to_the_same_bits() -> None:
    plain = network()
    losses = train_by_hand(plain, sgd(plain), batches(4), [1] * 4)
    model = network()
    compiled = torch.compile(model, backend="eager")
    trainer = create_supervised_trainer(compiled, sgd(model), loss_fn)
    evaluator = create_supervised_evaluator(model)
    # The bare model is evaluated: its mode and that of the compiled one around it part.
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: evaluator.run(batches(1)))
    assert train(trainer, batches(4)) == losses
    assert_same(state_of(model), state_of(plain))


# The output is unread


class Watched(Tensor):
    """A loss that counts how often it is copied to the host."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.item, Tensor.__float__, Tensor.tolist, Tensor.__bool__, Tensor.cpu):
            Watched.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_the_loss_is_not_read_until_somebody_reads_it() -> None:
    def watched_loss(y_pred: Tensor, y: Tensor) -> Tensor:
        return loss_fn(y_pred, y).as_subclass(Watched)

    model = network()
    trainer = create_supervised_trainer(model, sgd(model), watched_loss)
    Watched.reads = 0
    trainer.run(batches(5))
    assert Watched.reads == 0
    assert not trainer.state.raw_output.tensor.requires_grad
    first = trainer.state.output
    assert isinstance(first, float)
    assert Watched.reads == 1
    assert trainer.state.output == first
    assert Watched.reads == 1


# What a model and its optimizer may be


def test_a_frozen_part_gets_no_gradient_and_does_not_change() -> None:
    model = network()
    model[0].requires_grad_(False)
    before, rest = state_of(model[0]), state_of(model[4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = create_supervised_trainer(model, optimizer, loss_fn, max_norm=1.0)
    trainer.run(batches(3))
    assert_same(state_of(model[0]), before)
    assert not torch.equal(state_of(model[4])[0], rest[0])


@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
def test_sparse_gradients_train_to_the_same_bits(spec: str) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.EmbeddingBag(17, 10, sparse=True, mode="sum"))
        return model, torch.optim.SGD(model.parameters(), lr=0.05)

    data = [((x * 16).long(), y) for x, y in batches(6)]
    theirs, other = build()
    scaler = small_scaler() if spec == "cpu:fp16" else None
    losses = train_by_hand(theirs, other, data, [2] * 3, spec, None, scaler)
    ours, optimizer = build()
    settings = {} if scaler is None else {"scaler": small_scaler()}
    trainer = create_supervised_trainer(
        ours,
        optimizer,
        loss_fn,
        gradient_accumulation_steps=2,
        backend=backends.get(spec, **settings),
    )
    assert train(trainer, data) == losses
    assert ours[0].weight.grad.is_sparse
    assert_same(state_of(ours), state_of(theirs))


def test_gradients_can_be_read_at_the_end_of_an_iteration() -> None:
    model = network()
    trainer = trainer_of(model)
    norms: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: norms.append(model[0].weight.grad.norm().item())
    )
    trainer.run(batches(3))
    assert len(set(norms)) == 3
    assert min(norms) > 0


def test_an_optimizer_that_clears_gradients_in_its_own_way_is_asked_to() -> None:
    class Zeroing(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none=False)

    model = network()
    optimizer = Zeroing(model.parameters(), lr=0.1)
    kept: list[Any] = []
    trainer = create_supervised_trainer(model, optimizer, loss_fn)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: kept.append(model[0].weight.grad.data_ptr())
    )
    trainer.run(batches(3))
    assert len(set(kept)) == 1
