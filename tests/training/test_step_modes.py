"""How a step drives what it is given: the modes of models, and the calls of the protocol."""

from __future__ import annotations

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

from crosstrain.backends.null import NullBackend
from crosstrain.engine import Events, create_supervised_evaluator, create_supervised_trainer

# Modes


def test_every_part_is_in_training_mode_at_each_step() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = network()[:4], nn.Linear(32, 10)
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.modes.append((self.training, self.encoder[3].training))
            return self.head(self.encoder(x))

    model = Model()
    # As a pretrained part comes from its library.
    model.encoder.eval()
    trainer = trainer_of(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: model.encoder.eval())
    trainer.run(batches(4))
    assert model.modes == [(True, True)] * 4


def test_a_part_that_its_train_method_keeps_in_evaluation_mode_stays_there() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.calls = 0

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.net[1].eval()
            self.calls += 1
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model = Frozen()
    before = state_of(model.net[1])[2:]
    evaluator = create_supervised_evaluator(model)
    trainer = trainer_of(model)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.run(batches(1)))
    calls = model.calls
    trainer.run(batches(4), max_epochs=2)
    # Running mean, variance and count.
    assert_same(state_of(model.net[1])[2:], before)
    # Once where a run begins and once after an evaluation (and its own eval()), not each time.
    assert model.calls - calls == 4


def test_evaluation_inside_training_changes_nothing() -> None:
    plain = network()
    losses = train_by_hand(plain, sgd(plain), batches(6), [1] * 6)
    model = network()
    modes: list[bool] = []
    evaluator = create_supervised_evaluator(
        model, output_transform=lambda x, y, y_pred: modes.append(model.training)
    )
    trainer = trainer_of(model)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=2), lambda: evaluator.run(batches(2))
    )
    assert train(trainer, batches(6)) == losses
    assert modes == [False] * 6
    assert_same(state_of(model), state_of(plain))


def test_every_part_is_in_evaluation_mode_when_it_is_evaluated() -> None:
    inner = network()
    outer = nn.Sequential(inner).eval()
    # As a trainer of the inner model leaves it.
    inner.train()
    modes: list[bool] = []
    evaluator = create_supervised_evaluator(
        outer, output_transform=lambda *_: modes.extend(m.training for m in outer.modules())
    )
    evaluator.run(batches(1))
    assert not any(modes)


# The order of calls


def test_the_null_backend_shows_the_order_of_the_calls() -> None:
    model = network()
    backend = NullBackend()
    trainer = create_supervised_trainer(model, sgd(model), loss_fn, backend=backend, max_norm=2.0)
    assert backend.calls == ["open", "prepare"]
    backend.calls.clear()
    trainer.run(batches(1))
    assert backend.calls == [
        "put",
        "put",
        "autocast",
        "end autocast",
        "backward",
        "step max_norm=2.0",
        "sync",
    ]


def test_the_null_backend_shows_the_order_of_accumulation() -> None:
    model = network()
    backend = NullBackend()
    trainer = trainer_of(model, backend=backend, gradient_accumulation_steps=2)
    backend.calls.clear()
    trainer.run(batches(3))
    put, passes = ["put", "put"], ["autocast", "end autocast", "backward"]
    assert backend.calls == [
        *[*put, "accumulating", *passes, "end accumulating", "sync"],
        *[*put, *passes, "step", "sync"],
        *[*put, *passes, "step", "sync"],
    ]


def test_the_null_backend_shows_the_step_of_a_window_left_and_its_boundary() -> None:
    backend = NullBackend()
    trainer = trainer_of(network(), backend=backend, gradient_accumulation_steps=2)
    trainer.run(batch for batch in batches(1))
    assert backend.calls[-5:] == ["backward", "end accumulating", "sync", "step", "sync"]


def test_the_null_backend_shows_the_order_of_evaluation() -> None:
    backend = NullBackend()
    evaluator = create_supervised_evaluator(network(), backend=backend)
    assert backend.calls == ["open", "prepare"]
    backend.calls.clear()
    evaluator.run(batches(2))
    assert backend.calls == ["put", "put", "autocast", "end autocast", "sync"] * 2
