"""A checkpoint in the middle of an accumulation window carries the partial gradients."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from step_runs import Batch, small_scaler
from torch import nn
from training_runs import assert_same, batches, loss_fn, network, sgd, state_of

from crosstrain import backends
from crosstrain.engine import (
    Checkpoint,
    DeterministicEngine,
    Engine,
    Events,
    StepEvents,
    StepOptions,
    TrainingStep,
    create_supervised_trainer,
)


class Run:
    """A deterministic training that accumulates, of a network or of what is given."""

    def __init__(
        self, spec: str = "cpu", model: nn.Module | None = None, loss: Any = loss_fn, steps: int = 4
    ) -> None:
        self.model = network() if model is None else model
        parameters = [*self.model.parameters()]
        if isinstance(loss, nn.Module):
            parameters += [*loss.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        self.loss = loss
        settings = {"scaler": small_scaler()} if spec == "cpu:fp16" else {}
        self.trainer = create_supervised_trainer(
            self.model,
            self.optimizer,
            loss,
            deterministic=True,
            backend=backends.get(spec, **settings),
            gradient_accumulation_steps=steps,
        )
        self.losses: list[float] = []
        self.trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine: self.losses.append(engine.state.output)
        )

    def objects(self) -> dict[str, Any]:
        named = {"trainer": self.trainer, "model": self.model, "optimizer": self.optimizer}
        return {**named, "loss": self.loss} if isinstance(self.loss, nn.Module) else named

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: thing.state_dict() for name, thing in self.objects().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        # What a checkpoint may hold: tensors and plain types.
        states = torch.load(io.BytesIO(saved), weights_only=True)
        for name, thing in self.objects().items():
            thing.load_state_dict(states[name])

    def state(self) -> list[torch.Tensor]:
        return state_of(self.model, self.optimizer)


def assert_resumes(
    make: Any, cut: int, data: list[Batch], prepare: Any = None, **limits: Any
) -> None:
    """Fails where a run that is saved after an iteration, and one resumed from it, part.

    Args:
        make: makes a `Run`.
        cut: the iteration after which the run is saved.
        data: the batches.
        prepare: called with the trainer of each run, adds its handlers.
        **limits: of the run.
    """
    whole = make()
    saved: list[bytes] = []
    counts: list[Any] = []
    for run in (whole, resumed := make()):
        if prepare is not None:
            prepare(run.trainer)
    whole.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=cut), lambda: saved.append(whole.save())
    )
    torch.manual_seed(5)
    whole.trainer.run(data, **limits)
    resumed.load(saved[0])
    resumed.trainer.run(data)
    assert resumed.losses == whole.losses[cut:]
    assert_same(resumed.state(), whole.state())
    for run in (whole, resumed):
        state = run.trainer.state
        counts.append((state.iteration, state.optim_steps, state.applied_steps))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("cut", range(1, 11))
@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
def test_a_run_resumes_exactly_wherever_its_window_is(spec: str, cut: int) -> None:
    assert_resumes(lambda: Run(spec), cut, batches(5), max_epochs=2)


@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
@pytest.mark.parametrize("cut", [6, 7])
def test_a_window_left_where_the_run_ends_is_stepped_after_a_resume(spec: str, cut: int) -> None:
    def end_the_first_epoch(trainer: Engine) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), trainer.terminate_epoch)

    # 1 + 3 + 3 iterations, of which the last three make a window that was planned for four.
    assert_resumes(lambda: Run(spec), cut, batches(3), end_the_first_epoch, max_epochs=3)


def test_a_loss_with_weights_of_its_own_is_part_of_the_window() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(10))

        def forward(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return loss_fn(y_pred * self.scale, y)

    made = [Weighted(), Weighted()]
    assert_resumes(lambda: Run(loss=made.pop()), 3, batches(4))


def test_sparse_gradients_are_part_of_the_window() -> None:
    def make() -> Run:
        torch.manual_seed(3)
        return Run(model=nn.Sequential(nn.EmbeddingBag(17, 10, sparse=True, mode="sum")))

    assert_resumes(make, 2, [((x * 16).long(), y) for x, y in batches(4)])


def test_sparse_gradients_of_a_window_can_be_saved(tmp_path: Path) -> None:
    data = [((x * 16).long(), y) for x, y in batches(4)]

    def run(resumed: bool) -> Run:
        torch.manual_seed(3)
        one = Run(model=nn.Sequential(nn.EmbeddingBag(17, 10, sparse=True, mode="sum")))
        to_save = {"trainer": one.trainer, "model": one.model, "optimizer": one.optimizer}
        if resumed:
            Checkpoint.load_objects(to_save, *tmp_path.glob("*.pt"))
        else:
            event = Events.ITERATION_COMPLETED(once=2)
            one.trainer.add_event_handler(event, Checkpoint(to_save, str(tmp_path)))
        one.trainer.run(data, max_epochs=2)
        return one

    whole, rest = run(False), run(True)
    assert rest.losses == whole.losses[2:]
    torch.testing.assert_close(rest.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_tied_weights_and_frozen_ones_are_part_of_the_window() -> None:
    def make() -> Run:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        model[1].weight = model[0].weight
        model[2].bias.requires_grad_(False)
        return Run(model=model)

    assert_resumes(make, 6, batches(4), max_epochs=2)


# The state of a step by itself


def step_of(model: Any, **options: Any) -> TrainingStep:
    backend = backends.get("cpu").open()
    return TrainingStep(model, sgd(model), loss_fn, backend, StepOptions(**options))


def half_a_window() -> tuple[nn.Module, TrainingStep]:
    model = network()
    step = step_of(model, accumulation_steps=4)
    engine = Engine(step)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), engine.interrupt)
    engine.run(batches(8))
    return model, step


def test_the_state_names_each_gradient() -> None:
    model, step = half_a_window()
    state = step.state_dict()
    assert (state["filled"], state["planned"]) == (2, 4)
    assert state["gradients"].keys() == {f"model.{name}" for name, _ in model.named_parameters()}
    copied = state["gradients"]["model.0.weight"]
    assert torch.equal(copied, model[0].weight.grad)
    assert copied.data_ptr() != model[0].weight.grad.data_ptr()


def test_a_compiled_model_reads_the_state_of_the_bare_one() -> None:
    model, step = half_a_window()
    other = network(seed=4)
    compiled = step_of(torch.compile(other, backend="eager"), accumulation_steps=4)
    compiled.load_state_dict(step.state_dict())
    assert torch.equal(other[0].weight.grad, model[0].weight.grad)


def test_loading_takes_away_gradients_that_the_state_does_not_have() -> None:
    model = network()
    step = step_of(model, accumulation_steps=4)
    state = step.state_dict()
    assert state["gradients"] == {}
    Engine(step).run(batches(1))
    step.load_state_dict(state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(64, 10), r"gradient of 'model.0.weight' .* does not exist here"),
        (nn.Sequential(nn.Linear(64, 8)), r"\(32, 64\), and that parameter has shape \(8, 64\)"),
    ],
)
def test_the_state_of_another_model_is_refused(other: nn.Module, message: str) -> None:
    _, step = half_a_window()
    with pytest.raises(ValueError, match=message):
        step_of(other).load_state_dict(step.state_dict())
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_state_that_lacks_a_key_is_refused() -> None:
    state = step_of(network()).state_dict()
    del state["planned"]
    with pytest.raises(ValueError, match=r"lacks \['planned'\]"):
        step_of(network()).load_state_dict(state)


# A window belongs to one run of one engine


def test_another_engine_begins_its_own_window() -> None:
    torch.manual_seed(3)
    model = nn.Linear(64, 10)
    step = step_of(model, accumulation_steps=4)
    first = Engine(step)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=2), first.interrupt)
    first.run(batches(8))
    second = Engine(step)
    second.run(batches(4))
    assert second.state.optim_steps == 1
    torch.manual_seed(3)
    plain = nn.Linear(64, 10)
    whole = step_of(plain, accumulation_steps=4)
    Engine(whole).run(batches(4))
    assert_same(state_of(model), state_of(plain))


def test_a_step_that_goes_from_engine_to_engine_is_attached_to_each_once() -> None:
    step = step_of(network())
    fired: list[Any] = []
    engines = [Engine(step), Engine(step)]
    for name, engine in zip("ab", engines, strict=True):
        step.attach(engine)
        engine.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, fired.append, name)
    handlers = [len(engine.slot(Events.COMPLETED).handlers) for engine in engines]
    for engine in (*engines, *engines):
        engine.run(batches(1))
    assert fired == ["a", "b", "a", "b"]
    assert handlers == [len(engine.slot(Events.COMPLETED).handlers) for engine in engines]


def test_a_loaded_window_is_that_of_the_engine_that_runs_next() -> None:
    _, step = half_a_window()
    other = step_of(network(), accumulation_steps=4)
    Engine(other).run(batches(1))
    other.load_state_dict(step.state_dict())
    engine = Engine(other)
    engine.load_state_dict({"iteration": 2, "epoch_length": 5, "max_epochs": 1})
    engine.run(batches(5)[2:])
    # The window of 4 that two more iterations fill, and one of the iteration that is left.
    assert engine.state.optim_steps == 2


def test_a_step_in_a_deterministic_engine_of_ones_own_saves_its_window() -> None:
    model, plain = network(), network()
    step, other = step_of(model, accumulation_steps=4), step_of(plain, accumulation_steps=4)
    engine, resumed = DeterministicEngine(step, seed=7), DeterministicEngine(other, seed=8)
    saved: list[Any] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=3),
        lambda: saved.extend(
            [engine.state_dict(), model.state_dict(), step.optimizer.state_dict()]
        ),
    )
    file = io.BytesIO()
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda: torch.save(saved, file) or None
    )
    engine.run(batches(8))
    file.seek(0)
    for thing, state in zip((resumed, plain, other.optimizer), torch.load(file), strict=True):
        thing.load_state_dict(state)
    resumed.run(batches(8))
    assert_same(state_of(plain, other.optimizer), state_of(model, step.optimizer))
