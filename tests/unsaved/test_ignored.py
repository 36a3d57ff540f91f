"""What a user has asked not to be told of, name by name; the rest is told, and no name is wrong."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from crosstrain.engine import Checks, DeterministicEngine, Events, ResumeWarning


class _Clock:
    def __init__(self) -> None:
        self.ticks, self.parts = 0, {"left": 0}

    def tick(self) -> int:
        self.ticks += 1
        self.parts["left"] -= 1
        return self.ticks + self.parts["left"]


def _told(checks: Checks) -> list[str]:
    """Trains by a counter, a clock in a box, a generator, and a handler that is attached late."""
    count, box, noise = 0, {"clock": _Clock()}, torch.Generator()

    def step(engine: Any, batch: Any) -> float:
        nonlocal count
        count += 1
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: None)
        return box["clock"].tick() * float(torch.rand((), generator=noise)) / count

    engine = DeterministicEngine(step, seed=1, checks=checks)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: engine.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        engine.run([1.0, 2.0])
    return [str(one.message) for one in caught]


def _names(said: list[str]) -> list[str]:
    found = [eval(one) for text in said for one in re.findall(r"ignored=(\[.*?\])\)", text)]
    return [name for names in found for name in names]


def test_a_warning_gives_the_names_by_which_each_is_ignored() -> None:
    names = _names(_told(Checks()))
    assert len(names) == 5
    for left_out in names:
        some = [name for name in names if name != left_out]
        assert _names(_told(Checks(ignored=some))) == [left_out]
    assert _told(Checks(ignored=names, unnamed="error")) == []


def test_a_name_stands_for_what_lies_in_it() -> None:
    said = " ".join(_told(Checks(ignored=["the step, its 'box'"])))
    assert "'count'" in said
    assert "ticks" not in said


@pytest.mark.parametrize("wrong", ["the step, its 'cuont'", "the step, its 'bo'", "count"])
def test_a_name_that_nothing_has_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"names nothing .*the step, its 'count'"):
        _told(Checks(ignored=[wrong]))


def test_one_name_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="legal is a list of names"):
        Checks(ignored="the step, its 'count'")
