"""The state of a DeterministicEngine: what it holds, where it may be written, what it refuses."""

from __future__ import annotations

import io
import warnings
from typing import Any

import on_xla
import pytest
import torch
from resume_harness import Record, digest
from torch.utils.data import DataLoader

from crosstrain import backends
from crosstrain.backends import random_state
from crosstrain.engine import DeterministicEngine, Events, ResumeWarning


def numbers(size: int) -> DataLoader[Any]:
    return DataLoader(torch.arange(0, size), batch_size=4, shuffle=True)  # type: ignore[arg-type]


def drawing(spec: str, seed: int = 2) -> DeterministicEngine:
    """An engine whose step draws on the backend's device."""
    backend = backends.get(spec).open()
    return DeterministicEngine(
        lambda engine, batch: float(torch.rand(1, device=backend.device)), backend, seed=seed
    )


def trained(spec: str = "cpu", **limits: Any) -> tuple[DeterministicEngine, dict[int, Any], Record]:
    """An engine with a backend after a run, its states and its record."""
    states: dict[int, Any] = {}
    engine = drawing(spec)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: states.update({engine.state.iteration: engine.state_dict()}),
    )
    record = Record(engine)
    engine.run(numbers(20), **{"max_epochs": 2, **limits})
    return engine, states, record


# What older states do not have.
NEWER_KEYS = {"structure", "epoch_rng_states", "shown", "made"}
KEYS = {
    "epoch_length",
    "iteration",
    "max_epochs",
    "format",
    "seed",
    "streams",
    "progress",
    "position",
    "rng_states",
    "backend",
    "step",
    "environment",
    "exact",
}


def test_the_state_is_complete_and_loads_without_pickle() -> None:
    _, states, _ = trained()
    assert set(states[3]) == KEYS | NEWER_KEYS
    assert set(states[3]["rng_states"]) == {"python", "numpy", "torch", "device"}
    file = io.BytesIO()
    torch.save(states[3], file)
    file.seek(0)
    assert digest(torch.load(file, weights_only=True)) == digest(states[3])
    assert set(trained(max_epochs=None, max_iters=4)[0].state_dict()) == (
        KEYS | NEWER_KEYS | {"max_iters"}
    ) - {"max_epochs"}


@pytest.mark.parametrize("key", sorted(KEYS - {"max_epochs", "iteration", "format"}))
def test_a_missing_key_is_named(key: str) -> None:
    _, states, _ = trained()
    state = {name: value for name, value in states[3].items() if name != key}
    with pytest.raises(ValueError, match=f"'{key}'"):
        DeterministicEngine(lambda engine, batch: None).load_state_dict(state)


def test_an_unexpected_key_is_named() -> None:
    _, states, _ = trained()
    engine = DeterministicEngine(lambda engine, batch: None)
    with pytest.raises(ValueError, match=r"has the unexpected keys \['alpha', 'zeta'\]"):
        engine.load_state_dict({**states[3], "zeta": 1, "alpha": 2})
    with pytest.raises(ValueError, match=r"lacks \['rng_states'\]"):
        engine.load_state_dict({"epoch_length": 5, "iteration": 3, "max_epochs": 2})
    with pytest.raises(ValueError, match="has format 99; this version of crosstrain reads 1"):
        engine.load_state_dict({**states[3], "format": 99})
    with pytest.raises(TypeError, match="should be a dictionary"):
        engine.load_state_dict([1])  # type: ignore[arg-type]
    # The engine is as it was.
    assert (engine.state.iteration, engine.state.epoch_length) == (0, None)


def test_user_keys_ride_along() -> None:
    engine = DeterministicEngine(lambda engine, batch: None)
    engine.state_dict_user_keys.append("best")
    engine.state.best = 0.5  # type: ignore[attr-defined]
    engine.run([1, 2], max_epochs=1)
    other = DeterministicEngine(lambda engine, batch: None)
    with pytest.raises(ValueError, match=r"unexpected keys \['best'\]"):
        other.load_state_dict(engine.state_dict())
    other.state_dict_user_keys.append("best")
    other.load_state_dict(engine.state_dict())
    assert other.state.best == 0.5  # type: ignore[attr-defined]


def test_the_seed_and_the_streams_are_in_the_state() -> None:
    _, states, record = trained()
    engine = DeterministicEngine(
        lambda engine, batch: float(torch.rand(1)), seed=77, streams=["torch"]
    )
    resumed = Record(engine)
    engine.load_state_dict(states[3])
    assert engine.state.seed == 2
    with pytest.warns(ResumeWarning, match="backend was 'cpu:fp32' and is None"):
        engine.run(numbers(20))
    assert resumed.rows == record.after(3)
    # A new run has the engine's own seed again.
    engine.state.max_epochs = None
    engine.run(numbers(20), max_epochs=1)
    assert engine.state.seed == 77


def test_a_state_that_was_loaded_is_given_back_as_it_was() -> None:
    _, states, _ = trained()
    engine = DeterministicEngine(lambda engine, batch: None)
    engine.load_state_dict(states[3])
    assert digest(engine.state_dict()) == digest(states[3])


def test_a_state_of_a_run_that_is_done_trains_nothing() -> None:
    engine, _, record = trained()
    resumed = DeterministicEngine(lambda engine, batch: 1 / 0, backends.get("cpu").open())
    fired: list[str] = []
    for event in Events:
        if event is not Events.EXCEPTION_RAISED:
            resumed.add_event_handler(event, lambda *_, name=event.name, **__: fired.append(name))
    resumed.load_state_dict(engine.state_dict())
    resumed.run(numbers(20))
    assert fired == ["STARTED", "COMPLETED"]
    assert digest(random_state.capture()) == record.rows[10][3]


def test_more_epochs_than_the_saved_run_had() -> None:
    engine, _, _ = trained()
    _, _, longer = trained(max_epochs=4)
    resumed = DeterministicEngine(
        lambda engine, batch: float(torch.rand(1)), backends.get("cpu").open()
    )
    record = Record(resumed)
    resumed.load_state_dict(engine.state_dict())
    resumed.run(numbers(20), max_epochs=3)
    resumed.load_state_dict(resumed.state_dict())
    resumed.run(numbers(20), max_epochs=4)
    assert record.rows == longer.after(10)


# ---------------------------------------------------------------------- the environment


def test_a_changed_environment_is_reported() -> None:
    _, states, _ = trained()
    engine = DeterministicEngine(lambda engine, batch: None, backends.get("cpu").open())
    threads = torch.get_num_threads()
    engine.load_state_dict({**states[3], "environment": {**states[3]["environment"], "torch": "1"}})
    torch.set_num_threads(threads + 1)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.warns(ResumeWarning) as caught:
            engine.run(numbers(20))
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    message = str(caught[0].message)
    assert "default dtype was 'torch.float32' and is 'torch.float64'" in message
    assert f"threads was {threads} and is {threads + 1}" in message
    assert f"torch was '1' and is '{torch.__version__}'" in message


def test_nothing_is_reported_where_nothing_changed() -> None:
    _, states, _ = trained()
    engine = DeterministicEngine(lambda engine, batch: None, backends.get("cpu").open())
    engine.load_state_dict(states[3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run(numbers(20))


# ---------------------------------------------------------------------- where it may be saved


INEXACT = (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.EXCEPTION_RAISED)
EXACT = (Events.STARTED, Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.EPOCH_COMPLETED)


@pytest.mark.parametrize("event", INEXACT)
def test_a_state_from_within_an_iteration_warns_when_written_and_when_loaded(event: Any) -> None:
    states: list[Any] = []

    def step(engine: Any, batch: Any) -> float:
        if engine.state.iteration == 3 and not states:
            raise OSError
        return float(torch.rand(1))

    engine = DeterministicEngine(step, seed=2)

    def save(*_: Any) -> None:
        if engine.state.iteration >= 2 and not states:
            with pytest.warns(ResumeWarning, match="in the middle of an iteration"):
                states.append(engine.state_dict())

    engine.add_event_handler(event, save)
    engine.run(numbers(20), max_epochs=2)
    state, batches = states[0], []
    assert state["iteration"] == {Events.ITERATION_STARTED: 1}.get(event, 2)

    resumed = DeterministicEngine(lambda engine, batch: batches.append(batch.tolist()))
    with pytest.warns(ResumeWarning, match="was written in the middle of an iteration"):
        resumed.load_state_dict(state)
    resumed.run(numbers(20))
    # The random numbers are lost, the data is not.
    whole: list[Any] = []
    straight = DeterministicEngine(lambda engine, batch: whole.append(batch.tolist()), seed=2)
    straight.run(numbers(20), max_epochs=2)
    assert batches == whole[state["iteration"] :]


@pytest.mark.parametrize("event", EXACT)
@pytest.mark.parametrize(
    "spec",
    [
        "cpu",
        pytest.param("xla", marks=on_xla.needs_xla),
        pytest.param("xla:bf16", marks=on_xla.needs_xla),
    ],
)
def test_a_state_from_between_iterations_is_exact(event: Any, spec: str) -> None:
    _, _, wanted = trained(spec)
    state: list[Any] = []
    engine = drawing(spec)
    engine.add_event_handler(
        event, lambda: state.append(engine.state_dict()) if len(state) < 2 else None
    )
    engine.run(numbers(20), max_epochs=2)
    for saved in state:
        resumed = drawing(spec, seed=5)
        record = Record(resumed)
        resumed.load_state_dict(saved)
        resumed.run(numbers(20))
        assert record.rows == wanted.after(saved["iteration"])


# ---------------------------------------------------------------------- what is owed


def resumed_events(state: dict[str, Any]) -> list[tuple[str, int, int]]:
    """The events that a resumed run fires before its first batch, with epoch and iteration."""
    engine = DeterministicEngine(lambda engine, batch: None, backends.get("cpu").open())
    fired: list[tuple[str, int, int]] = []

    def note(name: str) -> None:
        fired.append((name, engine.state.epoch, engine.state.iteration))

    for event in Events:
        if event is not Events.EXCEPTION_RAISED:
            engine.add_event_handler(event, lambda *_, name=event.name, **__: note(name))
    engine.load_state_dict(state)
    engine.run(numbers(20))
    names = [name for name, _, _ in fired]
    return fired[: names.index("ITERATION_STARTED") if "ITERATION_STARTED" in names else None]


def test_a_state_of_an_epochs_last_iteration_owes_the_epochs_end() -> None:
    _, states, _ = trained()
    assert resumed_events(states[5]) == [
        ("STARTED", 0, 5),
        ("EPOCH_STARTED", 1, 5),
        ("EPOCH_COMPLETED", 1, 5),
        ("EPOCH_STARTED", 2, 5),
        ("GET_BATCH_STARTED", 2, 5),
        ("DATALOADER_STOP_ITERATION", 2, 5),
        ("GET_BATCH_COMPLETED", 2, 5),
    ]
    # And where the run ends with it.
    assert [name for name, _, _ in resumed_events(states[10])] == [
        "STARTED",
        "EPOCH_STARTED",
        "EPOCH_COMPLETED",
        "COMPLETED",
    ]


@pytest.mark.parametrize("quietly", [False, True])
def test_a_state_in_which_the_epoch_was_to_end_ends_it(quietly: bool) -> None:
    states: list[Any] = []
    engine = DeterministicEngine(lambda engine, batch: None, backends.get("cpu").open(), seed=2)

    @engine.on(Events.ITERATION_COMPLETED(once=3))
    def end_and_save() -> None:
        engine.terminate_epoch(skip_epoch_completed=quietly)
        states.append(engine.state_dict())

    engine.run(numbers(20), max_epochs=2)
    completed = [] if quietly else [("EPOCH_COMPLETED", 1, 3)]
    assert resumed_events(states[0]) == [
        ("STARTED", 0, 3),
        ("EPOCH_STARTED", 1, 3),
        ("TERMINATE_SINGLE_EPOCH", 1, 3),
        *completed,
        ("EPOCH_STARTED", 2, 3),
        ("GET_BATCH_STARTED", 2, 3),
        ("GET_BATCH_COMPLETED", 2, 3),
    ]
