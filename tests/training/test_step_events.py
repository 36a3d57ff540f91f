"""The events of a training step: their order, their counts, and what their handlers see."""

from __future__ import annotations

from typing import Any

import ignite.engine
import pytest
import torch
from step_runs import OPTIMIZERS, overflowing, small_scaler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import assert_same, batches, loss_fn, network, sgd, state_of, trainer_of

from crosstrain import backends
from crosstrain.engine import (
    Engine,
    Events,
    StepEvents,
    create_supervised_trainer,
    supervised_training_step,
)

AROUND = (Events.ITERATION_STARTED, *StepEvents, Events.ITERATION_COMPLETED)
BEGIN = ["ITERATION_STARTED", "BACKWARD_STARTED", "BACKWARD_COMPLETED"]
STEP = ["OPTIM_STEP_STARTED", "GRADIENTS_READY", "OPTIM_STEP_COMPLETED", "OPTIM_STEP_APPLIED"]
END = ["ITERATION_COMPLETED"]


def no_norm() -> nn.Sequential:
    """A network in which bright images reach the gradients."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def recorded(trainer: Engine) -> list[str]:
    names: list[str] = []
    for event in AROUND:
        trainer.add_event_handler(event, lambda engine, name: names.append(name), event.name)
    return names


def test_the_order_of_events_in_an_iteration() -> None:
    trainer = trainer_of(network())
    names = recorded(trainer)
    trainer.run(batches(2))
    assert names == [*BEGIN, *STEP, *END] * 2


def test_the_optimizers_events_fire_once_a_window() -> None:
    trainer = trainer_of(network(), gradient_accumulation_steps=2)
    names = recorded(trainer)
    trainer.run(batches(3))
    assert names == [*BEGIN, *END, *BEGIN, *STEP, *END, *BEGIN, *STEP, *END]


def test_a_window_left_at_the_end_has_its_events_before_the_runs() -> None:
    trainer = trainer_of(network(), gradient_accumulation_steps=2)
    names = recorded(trainer)
    for event in (Events.EPOCH_COMPLETED, Events.COMPLETED):
        trainer.add_event_handler(event, lambda engine, name: names.append(name), event.name)
    trainer.run(batch for batch in batches(1))
    assert names == [*BEGIN, *END, *STEP, "EPOCH_COMPLETED", "COMPLETED"]


def test_one_event_for_all_optimizers_of_a_step() -> None:
    models = [network()[:4], nn.Linear(32, 10)]
    trainer = create_supervised_trainer(
        models, [sgd(m) for m in models], loss_fn, model_fn=lambda m, x: m[1](m[0](x)), max_norm=0.1
    )
    names = recorded(trainer)
    trainer.run(batches(1))
    assert names == [*BEGIN, *STEP, *END]
    results: Any = trainer.state
    assert [result.applied for result in results.step_results] == [True, True]
    assert all(result.grad_norm > 0 for result in results.step_results)


def test_what_handlers_see_of_gradients_and_weights() -> None:
    model = network()
    trainer = trainer_of(model)
    weight = model[0].weight
    start = weight.detach().clone()
    seen: dict[str, tuple[bool, bool]] = {}
    for event in StepEvents:
        trainer.add_event_handler(
            event,
            lambda engine, name: seen.update(
                {name: (weight.grad is not None, not torch.equal(weight, start))}
            ),
            event.name,
        )
    trainer.run(batches(1))
    assert seen == {
        "BACKWARD_STARTED": (False, False),
        "BACKWARD_COMPLETED": (True, False),
        "OPTIM_STEP_STARTED": (True, False),
        "GRADIENTS_READY": (True, False),
        "OPTIM_STEP_COMPLETED": (True, True),
        "OPTIM_STEP_APPLIED": (True, True),
    }


def test_filters_count_what_the_event_counts() -> None:
    trainer = trainer_of(network(), gradient_accumulation_steps=2)
    seen: list[tuple[str, int]] = []

    def note(engine: Engine, name: str) -> None:
        seen.append((name, engine.state.iteration))

    trainer.add_event_handler(StepEvents.BACKWARD_STARTED(every=5), note, "backward")
    trainer.add_event_handler(StepEvents.OPTIM_STEP_STARTED(once=1), note, "started")
    trainer.add_event_handler(StepEvents.OPTIM_STEP_COMPLETED(after=4), note, "completed")
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED(every=2), note, "applied")
    trainer.run(batches(5), max_epochs=2)
    assert seen == [
        ("started", 2),
        ("applied", 4),
        ("backward", 5),
        ("applied", 8),
        ("backward", 10),
        ("completed", 10),
    ]
    state: Any = trainer.state
    assert (state.optim_steps, state.applied_steps, state.skipped_steps) == (5, 5, 0)


def test_the_counts_begin_anew_with_a_run() -> None:
    trainer = trainer_of(network())
    seen: list[int] = []
    trainer.add_event_handler(
        StepEvents.OPTIM_STEP_APPLIED(every=2), lambda engine: seen.append(engine.state.iteration)
    )
    trainer.run(batches(3))
    trainer.run(batches(3))
    assert seen == [2, 2]


# Steps that the loss scaler skips


def test_an_overflow_skips_the_step_and_says_so() -> None:
    model = no_norm()
    trainer = trainer_of(model, backend=backends.get("cpu:fp16", scaler=small_scaler()))
    good = batches(5)
    data = [good[0], overflowing(good[1]), *good[2:4], overflowing(good[4])]
    fired: list[tuple[str, int]] = []
    before: list[Any] = []
    state: Any = trainer.state
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: before.append(state_of(model[0])))
    for event in (StepEvents.OPTIM_STEP_APPLIED, StepEvents.OPTIM_STEP_SKIPPED):
        trainer.add_event_handler(
            event, lambda engine, name: fired.append((name, engine.state.iteration)), event.name
        )

    @trainer.on(StepEvents.OPTIM_STEP_SKIPPED)
    def unchanged() -> None:
        assert_same(state_of(model[0]), before[-1])
        assert not state.step_results[0].applied

    @trainer.on(StepEvents.OPTIM_STEP_SKIPPED(every=2))
    def second_overflow() -> None:
        fired.append(("every=2", state.iteration))

    trainer.run(data)
    assert fired == [
        ("OPTIM_STEP_APPLIED", 1),
        ("OPTIM_STEP_SKIPPED", 2),
        ("OPTIM_STEP_APPLIED", 3),
        ("OPTIM_STEP_APPLIED", 4),
        ("OPTIM_STEP_SKIPPED", 5),
        ("every=2", 5),
    ]
    assert (state.optim_steps, state.applied_steps, state.skipped_steps) == (5, 3, 2)


def test_a_scheduler_at_applied_steps_does_not_follow_skipped_ones() -> None:
    model = no_norm()
    optimizer = sgd(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    backend = backends.get("cpu:fp16", scaler=small_scaler())
    trainer = create_supervised_trainer(model, optimizer, loss_fn, backend=backend)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    good = batches(3)
    trainer.run([good[0], overflowing(good[1]), good[2]])
    assert scheduler.get_last_lr() == [0.25]


def test_one_optimizer_of_two_that_overflows_makes_the_step_a_skipped_one() -> None:
    # What is so bright reaches the first model only: the second gets gradients that are finite.
    models = [nn.Linear(64, 10), nn.Linear(64, 10)]
    backend = backends.get("cpu:fp16", scaler=small_scaler())
    trainer = create_supervised_trainer(
        models,
        [sgd(model) for model in models],
        loss_fn,
        model_fn=lambda m, x: m[0](x * 6e4) * 1e-2 + m[1](x),
        backend=backend,
    )
    fired: list[str] = []
    trainer.add_event_handler(StepEvents.OPTIM_STEP_SKIPPED, lambda: fired.append("skipped"))
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: fired.append("applied"))
    trainer.run(batches(1))
    state: Any = trainer.state
    assert sorted(result.applied for result in state.step_results) == [False, True]
    assert fired == ["skipped"]


class Reads(TorchDispatchMode):
    """Counts how often the host read a flag or a number; the loss scale, a float, is on it here."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = func is torch.ops.aten._local_scalar_dense.default
        self.number += read and not args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def fused_fp16(number: int = 1, **options: Any) -> Engine:
    """A trainer with fused optimizers, which skip a step without telling the host."""
    models = [no_norm() for _ in range(number)]
    optimizers = [OPTIMIZERS["adamw-fused"](model.parameters()) for model in models]
    return create_supervised_trainer(
        models,
        optimizers,
        loss_fn,
        model_fn=lambda m, x: sum(model(x) for model in m),
        backend=backends.get("cpu:fp16", scaler=small_scaler()),
        **options,
    )


@pytest.mark.parametrize("number", [1, 2])
def test_what_became_of_a_fused_step_is_read_when_somebody_asks(number: int) -> None:
    trainer = fused_fp16(number)
    good = batches(6)
    data = [good[0], overflowing(good[1]), *good[2:4], overflowing(good[4]), good[5]]
    with Reads() as reads:
        trainer.run(data)
    state: Any = trainer.state
    assert reads.number == 0
    assert state.optim_steps == 6
    with reads:
        assert (state.applied_steps, state.skipped_steps) == (4, 2)
        assert state.applied_steps == 4
    assert reads.number == 1
    assert "applied_steps: 4" in repr(state)


def test_an_unread_count_goes_on_with_the_run_and_into_its_state() -> None:
    good = batches(3)
    data = [good[0], overflowing(good[1]), good[2]]
    trainer = fused_fp16(deterministic=True)
    seen: list[tuple[int, int]] = []

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def ask() -> None:
        state: Any = trainer.state
        seen.append((state.applied_steps, state.skipped_steps))

    trainer.run(data, max_epochs=2)
    assert seen == [(2, 1)]
    saved = trainer.state_dict()["step"]
    assert (saved["optim_steps"], saved["applied_steps"]) == (6, 4)
    trainer.run(data, max_epochs=3)
    state: Any = trainer.state
    assert (state.optim_steps, state.applied_steps, state.skipped_steps) == (9, 6, 3)


def test_who_listens_to_the_outcome_of_a_fused_step_hears_of_it() -> None:
    trainer = fused_fp16()
    fired: list[tuple[str, int]] = []
    for event in (StepEvents.OPTIM_STEP_APPLIED(every=2), StepEvents.OPTIM_STEP_SKIPPED):
        trainer.add_event_handler(
            event, lambda engine, name: fired.append((name, engine.state.iteration)), event.name
        )
    good = batches(4)
    trainer.run([good[0], overflowing(good[1]), *good[2:]])
    assert fired == [("OPTIM_STEP_SKIPPED", 2), ("OPTIM_STEP_APPLIED", 3)]


def test_an_engine_without_a_training_step_has_no_counts_of_it() -> None:
    state = Engine(lambda engine, batch: None).state
    for name in ("applied_steps", "skipped_steps"):
        with pytest.raises(AttributeError, match=f"no '{name}': only the trainer"):
            getattr(state, name)


# Events in an engine of one's own


def test_a_step_registers_its_events_with_an_engine_when_it_is_attached() -> None:
    model = network()
    step = supervised_training_step(model, sgd(model), loss_fn)
    engine = Engine(step)
    with pytest.raises(ValueError, match="BACKWARD_STARTED is not a valid event"):
        engine.add_event_handler(StepEvents.BACKWARD_STARTED, lambda: None)
    step.attach(engine)
    names = recorded(engine)
    engine.run(batches(1))
    assert names == [*BEGIN, *STEP, *END]


def test_a_step_attached_at_its_first_iteration_still_ends_a_window_first() -> None:
    model = network()
    step = supervised_training_step(model, sgd(model), loss_fn, gradient_accumulation_steps=4)
    engine = Engine(step)
    steps: list[int] = []
    engine.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: steps.append(engine.state.optim_steps)
    )
    engine.run(iter(batches(5)))
    assert steps == [2]


def test_an_engine_of_another_library_is_refused() -> None:
    model = network()
    step = supervised_training_step(model, sgd(model), loss_fn)
    with pytest.raises(TypeError, match=r"got ignite\.engine\.engine\.Engine"):
        ignite.engine.Engine(step).run(batches(1))


@pytest.mark.parametrize("kind", ["sgd", "adamw-fused"])
@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_gradients_are_changed_where_they_are_ready_as_by_hand(spec: str, kind: str) -> None:
    model, dtype = no_norm(), {"cpu:bf16": torch.bfloat16, "cpu:fp16": torch.float16}.get(spec)
    data = [overflowing(b) if i in (1, 4) else b for i, b in enumerate(batches(6))]
    scaler = small_scaler(enabled=spec == "cpu:fp16")
    optimizer = OPTIMIZERS[kind](model.parameters())
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_fn(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    ours = no_norm()
    stepper = OPTIMIZERS[kind](ours.parameters())
    settings = {"scaler": small_scaler()} if spec == "cpu:fp16" else {}
    trainer = create_supervised_trainer(
        ours, stepper, loss_fn, backend=backends.get(spec, **settings), max_norm=0.1
    )
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY, lambda: nn.utils.clip_grad_value_(ours.parameters(), 0.01)
    )
    trainer.run(data)
    told: Any = trainer.state
    assert (told.skipped_steps > 0) == (spec == "cpu:fp16")
    assert_same(state_of(ours, stepper), state_of(model, optimizer))


def test_gradients_are_scaled_anew_after_a_handler_of_theirs_has_failed() -> None:
    model = no_norm()
    trainer = create_supervised_trainer(
        model, sgd(model), loss_fn, backend=backends.get("cpu:fp16", scaler=small_scaler())
    )
    largest: list[float] = []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def look() -> None:
        largest.append(
            max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        )
        if len(largest) == 1:
            raise RuntimeError("once")

    with pytest.raises(RuntimeError, match="once"):
        trainer.run(batches(1))
    trainer.run(batches(1))
    assert largest[1] == pytest.approx(largest[0], rel=1e-3)
