"""Any composition of building blocks resumes exactly, or says that and why it does not.

The long form is `python tests/stress/compositions.py --count 2000`.
"""

from __future__ import annotations

import itertools

import composition_parts as parts
import pytest
from compositions import (
    CRASHED,
    EVENTS,
    FILTERS,
    HANDLERS,
    HOWS,
    IDENTICAL,
    SAVING,
    SECONDS,
    SILENT,
    STEPS,
    TOLD,
    Composition,
    compose,
    judge,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

_how = st.sampled_from(HOWS)
_handler = st.tuples(
    st.sampled_from(sorted(HANDLERS)), st.sampled_from(EVENTS), st.sampled_from(FILTERS)
)
COMPOSITIONS = st.builds(
    Composition,
    seed=st.integers(0, 10_000),
    dataset=st.sampled_from(("map", *parts.DATASETS)),
    sampler=st.sampled_from(parts.SAMPLERS),
    collate=st.sampled_from(("default", "own")),
    draws=st.tuples(_how, _how, _how),
    workers=st.just((0, 0)),
    persistent=st.just(False),
    model=st.sampled_from(parts.NETS),
    optimizer=st.sampled_from(sorted(parts.OPTIMIZERS)),
    step=st.sampled_from(STEPS),
    second=st.sampled_from(SECONDS),
    handlers=st.lists(_handler, max_size=2).map(tuple),
    saving=st.sampled_from(SAVING),
    scheduler=st.booleans(),
)
PLAIN = Composition(
    seed=1,
    dataset="map",
    sampler="shuffled",
    collate="default",
    draws=("nothing", "global", "nothing"),
    workers=(0, 0),
    persistent=False,
    model="plain",
    optimizer="sgd",
    step="supervised",
    second="none",
    handlers=(),
    saving="every 1",
    scheduler=True,
)
# Compositions that once ended in a silent difference, by the seed of the long form.
FOUND = (1, 9, 12, 30, 40)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(COMPOSITIONS)
@example(PLAIN)
def test_a_resume_is_exact_or_says_that_it_is_not(composition: Composition) -> None:
    verdict = judge(composition)
    assert verdict.outcome not in (SILENT, CRASHED), f"{verdict}\n{composition.text()}"


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_silent_once_is_not(seed: int) -> None:
    verdict = judge(compose(seed))
    assert verdict.outcome not in (SILENT, CRASHED), f"{verdict}\n{compose(seed).text()}"


@pytest.mark.parametrize("name", parts.OPTIMIZERS)
def test_plain_compositions_are_exact(name: str) -> None:
    changed = {**PLAIN.__dict__, "optimizer": name, "model": "counts", "workers": (0, 0)}
    assert judge(Composition(**changed)).outcome == IDENTICAL


@pytest.mark.parametrize(("place", "second"), itertools.product(["in the step"], ["in a handler"]))
def test_a_second_loader_is_told(place: str, second: str) -> None:
    for where in (place, second):
        verdict = judge(Composition(**{**PLAIN.__dict__, "second": where}))
        assert verdict.outcome == TOLD, verdict
        assert "_cycle" in verdict.detail or "generator" in verdict.detail
