"""Handlers of the engine's own run before or after all of the user's, by their phase."""

from __future__ import annotations

from typing import Any

import pytest

from crosstrain.engine import Engine, Events
from crosstrain.engine.dispatch import Phase


def engine_of(seen: list[str]) -> Engine:
    return Engine(lambda engine, batch: seen.append("step"))


def test_handlers_run_by_phase_and_within_one_by_when_they_were_attached() -> None:
    seen: list[str] = []
    engine = engine_of(seen)

    def attach(name: str, phase: Phase) -> None:
        handler = lambda: seen.append(name)  # noqa: E731
        if phase is Phase.NORMAL:
            engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        else:
            engine.add_in_phase(Events.ITERATION_COMPLETED, handler, phase)

    for each in (Phase.SAVE, Phase.NORMAL, Phase.LAST, Phase.FIRST):
        for number in (1, 2):
            attach(f"{each.name} {number}", each)
    engine.run([0])
    names = ("FIRST", "NORMAL", "LAST", "SAVE")
    assert seen == ["step", *(f"{name} {number}" for name in names for number in (1, 2))]


@pytest.mark.parametrize("phase", list(Phase))
def test_a_handler_can_attach_another_at_its_own_event_from_any_phase(phase: Phase) -> None:
    seen: list[str] = []
    engine = engine_of(seen)

    def attach() -> None:
        seen.append("attach")
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append("added"))

    engine.add_in_phase(Events.ITERATION_COMPLETED, attach, phase)
    engine.add_in_phase(Events.ITERATION_COMPLETED, lambda: seen.append("last"), Phase.SAVE)
    engine.run([0, 1])
    if phase <= Phase.NORMAL:
        first, second = ["attach", "added", "last"], ["attach", "added", "added", "last"]
    else:
        first, second = ["attach", "last"], ["added", "attach", "last"]
    assert seen == ["step", *first, "step", *second]


@pytest.mark.parametrize("phase", [Phase.FIRST, Phase.LAST, Phase.SAVE])
def test_a_handler_of_a_phase_can_be_found_and_taken_off(phase: Phase) -> None:
    seen: list[str] = []
    engine = engine_of(seen)

    def handler(engine: Any) -> None:
        seen.append(phase.name)

    engine.add_in_phase(Events.EPOCH_COMPLETED, handler, phase)
    assert engine.has_event_handler(handler, Events.EPOCH_COMPLETED)
    engine.run([0])
    engine.remove_event_handler(handler, Events.EPOCH_COMPLETED)
    assert not engine.has_event_handler(handler)
    assert not engine.slot(Events.EPOCH_COMPLETED).handlers
    engine.run([0])
    assert seen == ["step", phase.name, "step"]
