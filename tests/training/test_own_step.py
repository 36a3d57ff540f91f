"""A process function of one's own, written against the protocol: two optimizers, in turns."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from step_runs import small_scaler
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from training_runs import DTYPES, assert_same, batches, state_of

from crosstrain import backends
from crosstrain.engine import DeterministicEngine, Engine, Events, resume_or_start

judge = nn.functional.binary_cross_entropy_with_logits


def networks() -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64))
    critic = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    models: list[nn.Module] = [generator, critic]
    return models, [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]


def losses_of(models: list[nn.Module], real: Tensor) -> Any:
    """Yields the critic's loss, and then, when the critic was stepped, the generator's."""
    generator, critic = models
    ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
    fake = generator(torch.randn(len(real), 8))
    yield judge(critic(real), ones) + judge(critic(fake.detach()), zeros)
    yield judge(critic(fake), ones)


@pytest.mark.parametrize("spec", ["cpu", "cpu:bf16", "cpu:fp16"])
def test_two_optimizers_stepped_in_turns_equal_the_same_by_hand(spec: str) -> None:
    scaler = small_scaler() if spec == "cpu:fp16" else GradScaler("cpu", enabled=False)
    models, optimizers = networks()
    torch.manual_seed(11)
    for x, _ in batches(8):
        losses = losses_of(models, x)
        for optimizer in reversed(optimizers):
            optimizer.zero_grad()
            with torch.autocast("cpu", DTYPES[spec], enabled=spec != "cpu"):
                loss = next(losses)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        scaler.update()

    settings = {"scaler": small_scaler()} if spec == "cpu:fp16" else {}
    backend = backends.get(spec, **settings).open()
    ours, steppers = networks()
    backend.prepare(*ours, *steppers)

    def step(engine: Engine, batch: Any) -> None:
        losses = losses_of(ours, backend.put(batch[0]))
        for stepper in reversed(steppers):
            stepper.zero_grad()
            with backend.autocast():
                loss = next(losses)
            backend.backward(loss, stepper)
            assert backend.step(stepper).applied

    torch.manual_seed(11)
    Engine(step, backend).run(batches(8))
    assert_same(state_of(*ours, *steppers), state_of(*models, *optimizers))
    assert backend.state_dict() == scaler.state_dict()


class Holder:
    """A process function that is a method, and finds what it trains in its object."""

    def __init__(self, backend: Any, model: nn.Module, optimizer: Any, clears: str) -> None:
        self.backend, self.model, self.optimizer, self.clears = backend, model, optimizer, clears

    def step(self, engine: Engine, batch: Any) -> None:
        x, y = batch
        iteration, optimizer = engine.state.iteration, self.optimizer
        if self.clears == "steps first" and iteration % 4 == 0:
            # The gradients that are left after the iteration are the next window's.
            self.backend.step(optimizer)
            optimizer.zero_grad()
        if self.clears == "before" and iteration % 4 == 1:
            optimizer.zero_grad()
        with self.backend.autocast():
            loss = nn.functional.cross_entropy(self.model(x), y)
        self.backend.backward(loss / 4, optimizer)
        if self.clears != "steps first" and iteration % 4 == 0:
            self.backend.step(optimizer)
            if self.clears == "after":
                optimizer.zero_grad(set_to_none=iteration < 9)


def accumulating(spec: str, how: str) -> tuple[DeterministicEngine, nn.Module, Any]:
    settings = {"scaler": small_scaler()} if spec == "cpu:fp16" else {}
    backend = backends.get(spec, **settings).open()
    torch.manual_seed(3)
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer = backend.prepare(model, optimizer)
    holder = Holder(backend, model, optimizer, how)
    if how == "closure":
        own = holder.step.__func__

        def step(engine: Engine, batch: Any) -> None:
            own(Holder(backend, model, optimizer, "before"), engine, batch)

        return DeterministicEngine(step, backend, seed=1), model, optimizer
    if how == "objects":
        holder.clears = "after"
        hidden = [lambda: holder]
        engine = DeterministicEngine(lambda e, b: hidden[0]().step(e, b), backend, seed=1)
        engine.objects = {"nets": [model], "optimizer": optimizer}
        return engine, model, optimizer
    return DeterministicEngine(holder.step, backend, seed=1), model, optimizer


def saved_at_each_iteration(whole: Engine, trained: list[Any], data: Any) -> list[bytes]:
    """Runs an engine; returns its state and those of what it trains after each iteration."""
    saved: list[bytes] = []

    @whole.on(Events.ITERATION_COMPLETED)
    def save() -> None:
        file = io.BytesIO()
        torch.save([whole.state_dict(), *(thing.state_dict() for thing in trained)], file)
        saved.append(file.getvalue())

    whole.run(data)
    return saved


@pytest.mark.parametrize("how", ["before", "after", "never", "steps first", "closure", "objects"])
@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
def test_gradients_of_an_own_window_are_part_of_the_state(spec: str, how: str) -> None:
    data = batches(13)
    whole, *trained = accumulating(spec, how)
    saved = saved_at_each_iteration(whole, trained, data)
    kept = []
    for state in saved[:-1]:
        resumed, *objects = accumulating(spec, how)
        states = torch.load(io.BytesIO(state), weights_only=True)
        kept.append(states[0]["step"] is not None)
        for thing, its in zip([resumed, *objects], states, strict=True):
            thing.load_state_dict(its)
        resumed.run(data)
        assert_same(state_of(*objects), state_of(*trained))
    # Gradients that a step has used are left out where the function is seen to clear them.
    spent = {"before": {7, 11}, "closure": {7, 11}, "after": {3, 7}, "objects": {3, 7}}
    assert {place for place, window in enumerate(kept) if not window} == spent.get(how, set())


class Parts:
    """What is trained, in an object that the step comes to by some way."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Linear(64, 10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.model, self.optimizer


WAYS: dict[str, Callable[[Parts], Callable[[], Parts]]] = {
    "a variable": lambda parts: lambda: parts,
    "an object in a dict": lambda parts: partial({"parts": parts}.__getitem__, "parts"),
    "a function in a list": lambda parts: lambda held=[lambda: parts]: held[0](),  # type: ignore[misc]
    "a namespace": lambda parts: partial(getattr, SimpleNamespace(parts=parts), "parts"),
    "a default": lambda parts: lambda held=parts: held,  # type: ignore[misc]
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_a_window_are_saved_however_the_step_comes_to_its_model(
    tmp_path: Path, way: str
) -> None:
    data = batches(13)

    def train(folder: Path, **options: Any) -> Parts:
        parts = Parts()
        get = WAYS[way](parts)

        def step(engine: Engine, batch: Any) -> None:
            (model, optimizer), (x, y) = get().both, batch
            nn.functional.cross_entropy(model(x), y).backward()
            if engine.state.iteration % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()

        trainer = DeterministicEngine(step, seed=1)
        objects = {"model": parts.model, "optimizer": parts.optimizer}
        run = resume_or_start(trainer, objects, folder, 1, n_saved=None, **options)
        trainer.run(data)
        run.checkpoint.wait()
        return parts

    whole = train(tmp_path / "whole")
    for place in (2, 7, 8, 12):
        saved = tmp_path / "whole" / f"checkpoint_{place}.pt"
        resumed = train(tmp_path / str(place), resume_from=saved)
        assert_same(state_of(*resumed.both), state_of(*whole.both))


def _norm(model: nn.Module) -> float:
    return sum(float(one.grad.norm()) for one in model.parameters() if one.grad is not None)


@pytest.mark.parametrize("how", ["itself", "by a function", "after clearing"])
def test_gradients_of_the_iteration_before_are_kept_where_they_are_read(how: str) -> None:
    data = batches(7)

    def made() -> tuple[DeterministicEngine, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def go_on(batch: Any, norm: float) -> None:
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + norm)
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

        def itself(engine: Any, batch: Any) -> None:
            norm = sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)
            optimizer.zero_grad()
            go_on(batch, norm)

        def by_a_function(engine: Any, batch: Any) -> None:
            norm = _norm(model)
            optimizer.zero_grad()
            go_on(batch, norm)

        def after_clearing(engine: Any, batch: Any) -> None:
            optimizer.zero_grad()
            go_on(batch, _norm(model))

        steps = {"itself": itself, "by a function": by_a_function, "after clearing": after_clearing}
        return DeterministicEngine(steps[how], backends.get("cpu").open(), seed=1), model, optimizer

    whole, *trained = made()
    saved = saved_at_each_iteration(whole, trained, data)
    for place, state in enumerate(saved[2:-1], 2):
        resumed, *objects = made()
        states = torch.load(io.BytesIO(state), weights_only=True)
        assert (states[0]["step"] is None) == (how == "after clearing"), place
        for thing, its in zip([resumed, *objects], states, strict=True):
            thing.load_state_dict(its)
        resumed.run(data)
        assert_same(state_of(*objects), state_of(*trained))


class Wrapper(torch.optim.Optimizer):
    """Only wraps another, as those of other libraries do: what torch's constructor makes it lacks.

    Steps every second iteration, and clears only then.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:  # pyright: ignore[reportMissingSuperCall]
        self.inner, self.calls = inner, 0

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        if self.calls % 2 == 0:
            self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 2 == 0:
            self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        self.calls = state_dict["calls"]


def test_an_optimizer_that_only_wraps_another_goes_on_with_its_gradients() -> None:
    data = batches(7)

    def made() -> tuple[DeterministicEngine, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(64, 10)
        optimizer = Wrapper(torch.optim.Adam(model.parameters(), 0.1))

        def step(engine: Engine, batch: Any) -> None:
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return DeterministicEngine(step, seed=1), model, optimizer

    whole, *trained = made()
    for state in saved_at_each_iteration(whole, trained, data):
        resumed, *objects = made()
        states = torch.load(io.BytesIO(state), weights_only=True)
        for thing, its in zip([resumed, *objects], states, strict=True):
            thing.load_state_dict(its)
        resumed.run(data)
        assert_same(state_of(*objects), state_of(*trained))
