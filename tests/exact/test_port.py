"""A checkpoint goes on on another backend: the same batches, near numbers, one clear message."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import on_xla
import pytest
import resume_harness as harness
import torch
from fork_server import ForkServer
from torch import nn
from torch.amp.grad_scaler import GradScaler
from training_runs import batches, loss_fn, network, sgd, state_of

from crosstrain import backends
from crosstrain.backends.cpu import CpuBackend
from crosstrain.engine import (
    DeterministicEngine,
    Events,
    ResumeWarning,
    create_supervised_trainer,
)

# Between what a run's losses may differ, relative to the loss, from those of one that never moved:
# docs/porting.md states it for each pair of precisions, and how it was measured.
TOLERANCES = {
    frozenset({"fp32"}): 1e-5,
    frozenset({"fp32", "fp16"}): 2e-3,
    frozenset({"fp32", "bf16"}): 1e-2,
    frozenset({"fp16", "bf16"}): 1e-2,
    frozenset({"bf16"}): 1e-2,
}
AWAY, BACK = 8, 17  # both within an accumulation window

XLA = [
    ("fp32", "xla", "fp32"),
    ("xla", "xla-bf16", "fp32"),
    ("fp16", "xla", "xla-bf16"),
    ("xla", "spmd-2", "bf16"),
]
CPU = [("fp32", "bf16", "fp32"), ("fp32", "fp16", "fp32"), ("fp16", "bf16", "fp16")]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    names = ("resume_harness", "torch._dynamo", "crosstrain.backends.cpu", *on_xla.PRELOAD)
    with ForkServer(*names) as server:
        yield server


class Legs:
    """Runs trainings in processes of their own, one after another."""

    def __init__(self, server: ForkServer, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._count = 0

    def run(self, source: str | None, variant: str, stop: int | None, dropout: float = 0.0) -> Any:
        self._count += 1
        target = str(self._folder / f"{self._count}.pt")
        arguments = (source, variant, stop, target, dropout)
        assert self._server.run(harness.train_leg, *arguments) == 0
        return {**torch.load(target, weights_only=True), "file": target}

    def travel(self, stations: tuple[str, ...], dropout: float = 0.0) -> list[Any]:
        """Trains on each variant in turn, moving after two fixed iterations."""
        found: list[Any] = []
        for variant, stop in zip(stations, (AWAY, BACK, None), strict=True):
            found.append(self.run(found[-1]["file"] if found else None, variant, stop, dropout))
        return found


@pytest.fixture
def legs(server: ForkServer, tmp_path: Path) -> Legs:
    return Legs(server, tmp_path)


def precision(variant: str) -> str:
    return variant if variant in ("bf16", "fp16") else "bf16" if "bf16" in variant else "fp32"


def merged(legs: list[Any]) -> dict[int, list[Any]]:
    return {key: row for leg in legs for key, row in leg["rows"].items()}


@pytest.mark.parametrize(
    "stations",
    [
        *(pytest.param(one, id="-".join(one)) for one in CPU),
        *(pytest.param(one, id=" ".join(one), marks=on_xla.needs_xla) for one in XLA),
    ],
)
def test_a_run_goes_on_elsewhere(legs: Legs, stations: tuple[str, str, str]) -> None:
    still = legs.run(None, stations[0], None)["rows"]
    moved = legs.travel(stations)
    rows = merged(moved)
    assert list(rows) == list(still) == list(range(1, harness.ITERATIONS + 1))
    # Epoch and batch: to the bit. Until the first move, everything is.
    assert [row[:2] for row in rows.values()] == [row[:2] for row in still.values()]
    assert {k: rows[k] for k in range(1, AWAY + 1)} == {k: still[k] for k in range(1, AWAY + 1)}
    for number, row in rows.items():
        here, there = float.fromhex(row[2]), float.fromhex(still[number][2])
        tolerance = max(
            TOLERANCES[frozenset({precision(stations[0]), precision(one)})]
            for one in stations
            if one != stations[0]
        )
        assert abs(here - there) <= tolerance * abs(there), (number, here, there)
    # The comparison is worth something: elsewhere, the bits are not the same.
    assert [row[2] for row in rows.values()] != [row[2] for row in still.values()]
    assert moved[0]["warnings"] == []
    for leg, before, after in zip(moved[1:], stations[:-1], stations[1:], strict=True):
        (warned,) = leg["warnings"]
        specs = [harness.VARIANTS[one][0] for one in (before, after)]
        old, new = (spec if ":" in spec else f"{spec}:fp32" for spec in specs)
        assert f"The backend was '{old}' and is '{new}'." in warned
        assert ("the loss scale of" in warned) == (before == "fp16")
        assert ("the loss scale, at 256" in warned) == (after == "fp16")
        lost = "the random states of the device (xla)" in warned.partition("Begins anew")[0]
        assert lost == (before in ON_XLA and after not in ON_XLA)


ON_XLA = {name for name in harness.VARIANTS if name not in harness.ON_HOST}


@pytest.mark.parametrize(
    "stations",
    [
        pytest.param(("fp32", "bf16", "fp16")),
        pytest.param(("fp32", "xla", "fp32"), marks=on_xla.needs_xla),
    ],
)
def test_a_move_is_repeatable_to_the_bit(legs: Legs, stations: tuple[str, str, str]) -> None:
    """With dropout too, which draws elsewhere: its numbers there follow from seed and iteration."""
    once, again = (legs.travel(stations, 0.3) for _ in range(2))
    assert merged(once) == merged(again)
    states = [harness.read(legs[-1]["states"]) for legs in (once, again)]
    assert harness.differences(*states) == []


# The loss scale, and gradients that carry it


class Part:
    """A training in windows of two batches, without clipping, which would hide a wrong scale."""

    def __init__(self, spec: str, scale: float | None = None) -> None:
        settings = {} if scale is None else {"scaler": GradScaler("cpu", init_scale=scale)}
        self.model = network()
        # What dropout draws depends on the precision.
        self.model[3] = nn.Identity()
        self.optimizer = sgd(self.model)
        self.trainer: Any = create_supervised_trainer(
            self.model,
            self.optimizer,
            loss_fn,
            deterministic=True,
            backend=backends.get(spec, **settings).open(),
            gradient_accumulation_steps=2,
        )
        self.objects: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "trainer": self.trainer,
        }

    def run_to(self, iteration: int) -> bytes:
        """Trains to an iteration; returns the states there, before an open window is stepped."""
        found: list[bytes] = []

        @self.trainer.on(Events.ITERATION_COMPLETED(once=iteration))
        def leave() -> None:
            found.append(harness.saved(self.objects))
            self.trainer.terminate()

        self.trainer.run(batches(3), max_epochs=2)
        return found[0]

    def load(self, state: bytes) -> None:
        harness.restore(self.objects, state)


def messages(part: Part, iteration: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        part.run_to(iteration)
    return [str(one.message) for one in caught if one.category is ResumeWarning]


@pytest.mark.parametrize(("source", "target"), [("cpu:fp16", "cpu"), ("cpu", "cpu:fp16")])
def test_partial_gradients_take_the_scale_of_the_backend(source: str, target: str) -> None:
    scales = {"cpu": None, "cpu:fp16": 2.0**12}
    part = Part(source, scales[source])
    state = part.run_to(3)
    still = Part(source, scales[source])
    still.load(state)
    still.run_to(4)
    moved = Part(target, scales[target])
    moved.load(state)
    (message,) = messages(moved, 4)
    assert "loss scale" in message
    assert moved.trainer.state.applied_steps == 2
    torch.testing.assert_close(
        state_of(moved.model, moved.optimizer),
        state_of(still.model, still.optimizer),
        rtol=2e-2,
        atol=2e-3,
    )


def test_gradients_that_overflowed_are_dropped_and_the_window_begins_anew() -> None:
    # Wide enough for the gradients of the first of two iterations to overflow.
    state = Part("cpu:fp16", 2.0**40).run_to(3)
    gradients = harness.read(state)["trainer"]["step"]["gradients"]
    assert not all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    moved = Part("cpu")
    moved.load(state)
    before = [tensor.clone() for tensor in state_of(moved.model)]
    (message,) = messages(moved, 5)
    assert "accumulation window's 1 iterations, which had overflowed" in message
    assert "Begins anew: the window." in message
    # One whole window since, and the step before the move, which the scaler skipped.
    assert (moved.trainer.state.optim_steps, moved.trainer.state.applied_steps) == (2, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in state_of(moved.model))
    assert not all(map(torch.equal, before, state_of(moved.model)))


def test_a_scale_goes_to_another_backend_that_scales() -> None:
    class Elsewhere(CpuBackend):
        name = "elsewhere"

    part = Part("cpu:fp16", 2.0**9)
    state = part.run_to(2)
    moved = Part("cpu:fp16", 2.0**4)
    moved.trainer.backend = Elsewhere("fp16").open()
    moved.load(state)
    (message,) = messages(moved, 3)
    assert "The backend was 'cpu:fp16' and is 'elsewhere:fp16'" in message
    assert "Everything was carried over." in message
    assert moved.trainer.backend.state_dict()["scale"] == 2.0**9


def test_the_same_backend_is_as_strict_as_ever() -> None:
    state = harness.read(Part("cpu:fp16", 2.0**9).run_to(2))["trainer"]
    part = Part("cpu:fp16", 2.0**9)
    part.trainer.load_state_dict({**state, "backend": {"scale": 1.0}})
    with pytest.raises(backends.BackendError, match="lacks"):
        part.run_to(3)


# Random states of a device


class Dice(CpuBackend):
    """A backend whose device has a generator of its own, as an accelerator's has."""

    name = "dice"

    def _start(self, stack: ExitStack) -> None:
        self.generator = torch.Generator()

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        return {"dice": self.generator.get_state()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["dice"])


def rolling(backend: Any) -> tuple[DeterministicEngine, list[float]]:
    """An engine whose step draws from the backend's device, if it has one, and what it drew."""
    drawn: list[float] = []

    def step(engine: Any, batch: Any) -> None:
        generator = getattr(backend, "generator", None)
        drawn.append(float(torch.rand((), generator=generator)))

    return DeterministicEngine(step, backend, seed=5), drawn


def state_at(engine: DeterministicEngine, iteration: int) -> dict[str, Any]:
    found: list[Any] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED(once=iteration), lambda: found.append(engine.state_dict())
    )
    engine.run([0] * 6, max_epochs=2)
    file = io.BytesIO()
    torch.save(found[0], file)
    return harness.read(file.getvalue())


def test_a_device_without_a_state_begins_with_a_seed_of_the_run_and_the_place() -> None:
    runs: list[list[float]] = []
    for iteration in (2, 2, 4):
        state = state_at(rolling(CpuBackend().open())[0], iteration)
        engine, drawn = rolling(Dice().open())
        engine.load_state_dict(state)
        with pytest.warns(ResumeWarning, match=r"Begins anew: the random states.*\(dice\)"):
            engine.run([0] * 6)
        runs.append(drawn)
    assert runs[0] == runs[1]
    assert runs[0][2:4] != runs[2][:2]
    # The next epoch begins with its own seed, as on a run that never moved.
    straight, drawn = rolling(Dice().open())
    straight.run([0] * 6, max_epochs=2)
    assert runs[0][-6:] == runs[2][-6:] == drawn[-6:]
    assert runs[0][:4] != drawn[2:6]


def test_random_states_of_the_same_kind_of_device_are_kept() -> None:
    class Others(Dice):
        name = "others"

    straight, whole = rolling(Dice().open())
    state = state_at(straight, 4)
    engine, drawn = rolling(Others().open())
    engine.load_state_dict(state)
    with pytest.warns(ResumeWarning, match=r"Everything was carried over\. $"):
        engine.run([0] * 6)
    assert drawn == whole[4:]


def test_a_device_s_states_that_nothing_here_can_set_are_named() -> None:
    state = state_at(rolling(Dice().open())[0], 4)
    for backend in (CpuBackend().open(), None):
        engine, _ = rolling(backend)
        engine.load_state_dict(state)
        with pytest.warns(ResumeWarning) as caught:
            engine.run([0] * 6)
        (message,) = [str(one.message) for one in caught]
        assert "Not carried over: the random states of the device (dice)." in message


def test_a_state_that_was_ported_is_one_of_the_new_backend() -> None:
    state = state_at(rolling(CpuBackend().open())[0], 4)
    engine, drawn = rolling(Dice().open())
    engine.load_state_dict(state)
    again: list[Any] = []
    engine.add_event_handler(Events.STARTED, lambda: again.append(engine.state_dict()))
    engine.add_event_handler(Events.GET_BATCH_STARTED, lambda: again.append(engine.state_dict()))
    with pytest.warns(ResumeWarning):
        engine.run([0] * 6)
    # Both before the data was opened: one as it was loaded, one taken over.
    second, redrawn = rolling(Dice().open())
    second.load_state_dict(again[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResumeWarning)
        second.run([0] * 6)
    assert redrawn == drawn
