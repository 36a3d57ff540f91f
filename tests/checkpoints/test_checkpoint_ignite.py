"""The same scenarios on our Checkpoint and pytorch-ignite's: names, retention, metadata, files."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import ignite.engine
import ignite.handlers
import pytest
import torch

import crosstrain.engine as ours
from crosstrain.engine import Checkpoint, CheckpointWarning

SCORES = [0.5, 0.25, 0.5, 0.75, 0.75, 0.1, 0.9, 0.9, 0.12345678, 1.0]
WHOLE = [3, 1, 3, 7, 7, 0, 9, 9, 2, 12]


@dataclass
class Scenario:
    """One way to use a Checkpoint, for both libraries.

    `objects` is how many are saved; `step` whether a `global_step_transform` is given.
    """

    objects: int = 2
    score: str = "none"
    score_name: str | None = None
    step: bool = False
    prefix: str = ""
    n_saved: int | None = 2
    or_equal: bool = False
    pattern: str | None = None
    include_self: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """A save handler's calls, in order; a subclass of either library's BaseSaveHandler."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.saves: list[Any] = []

    def __call__(self, checkpoint: Any, filename: str, metadata: Any = None) -> None:
        kept = {key: metadata[key] for key in ("basename", "score_name", "priority")}
        self.saves.append((filename, kept, _keys(checkpoint)))
        self.files[filename] = kept

    def remove(self, filename: str) -> None:
        self.files.pop(filename)


def _keys(checkpoint: Any) -> list[str]:
    # A single object with include_self is saved by name by us: ignite's form cannot be loaded.
    return sorted(map(str, checkpoint))


def _run(library: ModuleType, handlers: Any, scenario: Scenario) -> tuple[Any, ...]:
    models = {f"model_{n}": torch.nn.Linear(1, 1) for n in range(scenario.objects)}
    recorder = type("Both", (Recorder, handlers.checkpoint.BaseSaveHandler), {})()
    trainer = library.Engine(lambda engine, batch: None)
    values = {"fractions": SCORES, "whole": WHOLE}.get(scenario.score, SCORES)

    def score(engine: Any) -> Any:
        return values[engine.state.iteration - 1]

    checkpoint = handlers.Checkpoint(
        models,
        recorder,
        filename_prefix=scenario.prefix,
        score_function=None if scenario.score in ("none", "metric") else score,
        score_name=scenario.score_name,
        n_saved=scenario.n_saved,
        global_step_transform=(lambda engine, event: engine.state.epoch) if scenario.step else None,
        filename_pattern=scenario.pattern,
        include_self=scenario.include_self,
        greater_or_equal=scenario.or_equal,
    )
    states: list[Any] = []

    def record(engine: Any) -> None:
        kept = sorted(recorder.files)
        states.append((engine.state.iteration, kept, str(checkpoint.last_checkpoint)))

    def measure(engine: Any) -> None:
        engine.state.metrics["accuracy"] = SCORES[engine.state.iteration - 1]

    trainer.add_event_handler(library.Events.ITERATION_COMPLETED, measure)
    trainer.add_event_handler(library.Events.ITERATION_COMPLETED, checkpoint)
    trainer.add_event_handler(library.Events.ITERATION_COMPLETED, record)
    trainer.run([0] * 5, max_epochs=2)
    return recorder.saves, states, list(checkpoint.state_dict()["_saved"])


class _Ours:
    checkpoint = ours
    Checkpoint = Checkpoint


TABLE = [
    Scenario(*values)
    for values in itertools.product(
        (1, 2),
        ("none", "fractions", "whole"),
        (None, "accuracy"),
        (False, True),
        ("", "best"),
        (1, 3, None),
        (False, True),
    )
]
MORE = [
    Scenario(score="metric", score_name="accuracy"),
    Scenario(score="metric", score_name="accuracy", step=True, prefix="best", objects=1),
    Scenario(pattern="{global_step}-{name}.{ext}"),
    Scenario(pattern="checkpoint.pt"),
    Scenario(pattern="checkpoint.pt", n_saved=1),
    Scenario(
        pattern="{filename_prefix}+{score_name}+{score}+{name}.{ext}",
        score="whole",
        score_name="accuracy",
        prefix="x",
    ),
    Scenario(include_self=True),
    Scenario(include_self=True, score="fractions", n_saved=3),
]


class _AtAPath(Recorder):
    """What can be called and stands for a path, too, as a mock does."""

    def __fspath__(self) -> str:
        raise AssertionError("it was taken for a folder")


def test_what_can_be_called_is_no_folder() -> None:
    saver = _AtAPath()
    engine = ours.Engine(lambda engine, batch: None)
    handler = ours.Checkpoint({"engine": engine}, saver)
    engine.add_event_handler(ours.Events.COMPLETED, handler)
    engine.run([1])
    assert handler.last_checkpoint == "engine_1.pt"


def test_names_metadata_and_retention_over_a_table() -> None:
    assert len(TABLE) == 288
    for scenario in TABLE + MORE:
        theirs = _run(ignite.engine, ignite.handlers, scenario)
        assert _run(ours, _Ours, scenario) == theirs, scenario


def test_random_scores_and_counts() -> None:
    draw = random.Random(5)
    for _ in range(60):
        n_saved, or_equal = draw.choice([1, 2, 3, 4, None]), draw.random() < 0.5
        scores = [draw.choice([-1.5, 0.0, 2.25, 3.0, 7]) for _ in range(12)]
        kept: list[list[str]] = []
        for library, handlers in ((ignite.engine, ignite.handlers), (ours, _Ours)):
            recorder = type("Both", (Recorder, handlers.checkpoint.BaseSaveHandler), {})()
            engine = library.Engine(lambda engine, batch: None)
            handler = handlers.Checkpoint(
                {"model": torch.nn.Linear(1, 1)},
                recorder,
                score_function=lambda engine: scores[engine.state.iteration - 1],  # noqa: B023
                global_step_transform=lambda engine, _: engine.state.iteration,
                n_saved=n_saved,
                greater_or_equal=or_equal,
            )
            engine.add_event_handler(library.Events.ITERATION_COMPLETED, handler)
            engine.run([0] * len(scores))
            kept.append([filename for _, filename in handler.state_dict()["_saved"]])
            assert sorted(recorder.files) == sorted(kept[-1])
        assert kept[0] == kept[1], (scores, n_saved, or_equal)


@pytest.mark.parametrize(
    "arguments",
    list(itertools.product((True, False), repeat=4)),
)
def test_filename_patterns(arguments: tuple[bool, ...]) -> None:
    try:
        expected = ignite.handlers.Checkpoint.setup_filename_pattern(*arguments)
    except ValueError:
        with pytest.raises(ValueError, match="should be"):
            Checkpoint.setup_filename_pattern(*arguments)
    else:
        assert Checkpoint.setup_filename_pattern(*arguments) == expected


def _objects(library: ModuleType, deterministic: bool) -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def step(engine: Any, batch: Any) -> None:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
        scheduler.step()

    kind = library.DeterministicEngine if deterministic else library.Engine
    trainer = kind(step)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("deterministic", [False, True], ids=["Engine", "DeterministicEngine"])
def test_what_ignite_wrote_loads(tmp_path: Path, deterministic: bool) -> None:
    written = _objects(ignite.engine, deterministic)
    handler = ignite.handlers.Checkpoint(written, tmp_path, n_saved=None, include_self=True)
    event = ignite.engine.Events.ITERATION_COMPLETED(every=3)
    written["trainer"].add_event_handler(event, handler)
    written["trainer"].run([torch.randn(5, 3) for _ in range(4)], max_epochs=2)
    to_load = _objects(ours, deterministic)
    to_load["checkpointer"] = Checkpoint(dict(to_load), lambda checkpoint, filename: None)
    path = tmp_path / "checkpoint_6.pt"
    with pytest.warns(CheckpointWarning, match="has no manifest"):
        Checkpoint.load_objects(to_load, path)
    saved = torch.load(path, weights_only=False)
    for name in ("model", "optimizer", "scheduler"):
        assert _equal(to_load[name].state_dict(), saved[name])
    assert to_load["checkpointer"].state_dict() == saved["checkpointer"]
    assert to_load["trainer"].state.iteration == 6
    with warnings.catch_warnings():
        # Of ignite's random states: they resume as exactly as ignite does.
        warnings.simplefilter("ignore")
        state = to_load["trainer"].run([torch.randn(5, 3) for _ in range(4)])
    assert state.iteration == 8


def test_what_we_write_loads_in_ignite(tmp_path: Path) -> None:
    written = _objects(ours, deterministic=False)
    written["trainer"].add_event_handler(
        ours.Events.ITERATION_COMPLETED, Checkpoint(written, tmp_path)
    )
    written["trainer"].run([torch.randn(5, 3) for _ in range(4)])
    to_load = _objects(ignite.engine, deterministic=False)
    ignite.handlers.Checkpoint.load_objects(to_load, tmp_path / "checkpoint_4.pt")
    for name in ("model", "optimizer", "scheduler"):
        assert _equal(to_load[name].state_dict(), written[name].state_dict())
    assert to_load["trainer"].state.iteration == 4
