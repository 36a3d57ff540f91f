"""Any composition of building blocks resumes exactly, or says that it does not and names why.

The long form is `python tests/stress/compositions.py --count 2000`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import composition_kept as kept
import composition_parts as parts
import pytest
from compositions import (
    EVENTS,
    FAILED,
    FILTERS,
    HANDLERS,
    HOWS,
    IDENTICAL,
    MISNAMED,
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
    loader=st.sampled_from(sorted(parts.LOADERS)),
    kept=st.lists(
        st.tuples(st.sampled_from(sorted(kept.PLACES)), st.sampled_from(sorted(kept.KINDS))),
        max_size=1,
    ).map(tuple),
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
# Compositions that once ended in a silent difference, by what they are beside the plain one.
FOUND: dict[str, dict[str, Any]] = {
    "a loader that counts its passes": {"loader": "counting"},
    "a loader whose batches follow from its pass": {"loader": "scaling"},
    "a loader's count in front of a stream with a state": {
        "dataset": "start-keeping",
        "loader": "scaling",
        "saving": "epoch",
    },
    "a loader that begins its pass with its first batch": {
        "loader": "generating",
        "sampler": "endless with length",
        "handlers": (("ends the epoch", "ITERATION_STARTED", "always"),),
        "saving": "epoch",
    },
    "a state that keeps its start": {"dataset": "start-keeping", "saving": "every 1"},
    "hidden draws behind a state": {
        "dataset": "stateful",
        "draws": ("nothing", "hidden", "nothing"),
    },
    "hidden draws, data set anew": {
        "collate": "own",
        "draws": ("nothing", "global", "hidden"),
        "handlers": (("exchanges the data", "EPOCH_STARTED", "always"),),
        "saving": "epoch",
    },
    "hidden draws, a handler begins the epoch": {
        "draws": ("nothing", "hidden", "nothing"),
        "handlers": (("draws the rate", "EPOCH_STARTED", "once 2"),),
        "saving": "epoch",
    },
    "hidden draws in workers": {
        "seed": 194,
        "sampler": "endless",
        "draws": ("global", "hidden", "nothing"),
        "workers": (2, 1),
        "handlers": (("perturbs weights", "EPOCH_STARTED", "once 2"),),
        "saving": "by hand, epoch",
    },
    "a batch sampler of no class of torch's": {
        "seed": 62,
        "sampler": "batches",
        "draws": ("global", "global", "global"),
        "handlers": (("exchanges the data", "GET_BATCH_COMPLETED", "once 2"),),
        "saving": "by hand, epoch",
    },
    "a dataset that a handler changes": {
        "seed": 225,
        "sampler": "weighted",
        "handlers": (
            ("freezes", "EPOCH_STARTED", "always"),
            ("changes the dataset", "GET_BATCH_COMPLETED", "every 3"),
        ),
        "saving": "every 3",
    },
    "a stream that a handler changes": {
        "seed": 318,
        "dataset": "stream",
        "handlers": (("changes the dataset", "ITERATION_COMPLETED", "once 2"),),
        "saving": "by hand",
    },
    "a dataset that caches": {"seed": 274, "dataset": "caching", "saving": "by hand"},
    "an epoch's end, asked for beside a save in the background": {
        "seed": 151,
        "dataset": "list",
        "handlers": (("ends the epoch", "ITERATION_COMPLETED", "always"),),
    },
}
# Those of the long runs, by their seeds: silent once, or told by another name.
SEEDS = (1, 9, 12, 30, 40, 502, 575, 648, 1444, 1500, 3098, 5215, 20005, 20084, 20174, 20316, 20460)
SEEDS += (20876, 20959, 20995, 21170, 21686, 22117, 50143)


@pytest.mark.slow
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(COMPOSITIONS)
@example(PLAIN)
def test_a_resume_is_exact_or_says_that_it_is_not(composition: Composition) -> None:
    verdict = judge(composition)
    assert verdict.outcome not in FAILED, f"{verdict}\n{composition.text()}"


@pytest.mark.parametrize("name", [*FOUND, *SEEDS])
def test_what_was_silent_once_is_not(name: str | int) -> None:
    found = isinstance(name, str)
    composition = Composition(**{**PLAIN.__dict__, **FOUND[name]}) if found else compose(name)
    composition = composition if found else dataclasses.replace(composition, kept=())
    verdict = judge(composition)
    assert verdict.outcome not in FAILED, f"{verdict}\n{composition.text()}"


@pytest.mark.parametrize("name", parts.OPTIMIZERS)
def test_plain_compositions_are_exact(name: str) -> None:
    changed = {**PLAIN.__dict__, "optimizer": name, "model": "counts", "workers": (0, 0)}
    assert judge(Composition(**changed)).outcome == IDENTICAL


@pytest.mark.parametrize("how", ["nothing", "global", "hidden"])
@pytest.mark.parametrize("saving", ["epoch", "by hand, epoch"])
def test_data_with_a_state_that_is_set_anew_is_compared(how: str, saving: str) -> None:
    changed = {
        "seed": 20995,
        "dataset": "stateful",
        "draws": ("nothing", how, "nothing"),
        "handlers": (("exchanges the data", "EPOCH_STARTED", "always"),),
        "saving": saving,
    }
    verdict = judge(Composition(**{**PLAIN.__dict__, **changed}))
    assert verdict.outcome == (TOLD if how == "hidden" else IDENTICAL), verdict
    assert not verdict.alarms


def test_a_second_loader_is_told() -> None:
    for where in ("in the step", "in a handler"):
        verdict = judge(Composition(**{**PLAIN.__dict__, "second": where}))
        assert verdict.outcome == TOLD, verdict
        assert [cause.name for cause in verdict.named] == ["the second loader"]


def test_a_message_that_names_something_else_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A judge who lets any warning pass would not see that one names the wrong thing."""
    plain = Composition(**{**PLAIN.__dict__, "second": "in the step"})
    monkeypatch.setattr("crosstrain.engine.unsaved.looks.unnamed_sources", lambda *_: [])
    assert judge(plain).outcome == SILENT
    monkeypatch.setattr("crosstrain.engine.unsaved.looks.unnamed_sources", lambda *_: ["a pump"])
    assert judge(plain).outcome == MISNAMED


def test_a_cause_does_not_hide_behind_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the second loader is named; the dataset's hidden generator is left."""
    engine = "crosstrain.engine"
    for name in ("_compare", "_compare_twice"):
        monkeypatch.setattr(f"{engine}.data.verification.Verification.{name}", lambda *_: None)
    monkeypatch.setattr(f"{engine}.unsaved.changed_values.Values.changed", lambda *_: [])
    monkeypatch.setattr(f"{engine}.unsaved.looks.unnamed_sources", lambda *_: ["self.others"])
    changed = {"second": "in the step", "draws": ("nothing", "hidden", "nothing")}
    verdict = judge(Composition(**{**PLAIN.__dict__, **changed}))
    assert verdict.outcome == MISNAMED
    assert "in what is left" in verdict.detail
