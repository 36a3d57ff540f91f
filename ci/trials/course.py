"""The record of a run over all its processes, and how two runs compare; without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What is compared of an iteration, what depends on it after what it depends on.
_THINGS = (
    "epoch",
    "batch",
    "loss",
    "skipped steps",
    "weights",
    "optimizer",
    "loss scale",
    "random states",
)


@dataclass
class Course:
    """What a run did, gathered from the lines that its processes told.

    Args:
        rows: by iteration, what its process said of it; of the last process that did it.
        ended: whether the training has come to its end.
        end: the digest of each part of the state that the run has come to, by name.
        length: the iterations of an epoch; 0: not known.
        environment: the conditions that the trainer's state names.
        metrics: the numbers in the trainer's `state.metrics` at the end.
        resumed_from: from which iteration each process went on; None: from none.
        kills: how many of its processes SIGKILL has ended.
        stops: how many SIGTERM has ended.
        seconds: how long they took.
        repeated: iterations that two processes did, and differently, each as a sentence.
        warnings: what the engine warned of.
        traits: what the training has of its own that may hold state, by kind.
    """

    rows: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    ended: bool = False
    end: dict[str, str] = field(default_factory=dict[str, str])
    length: int = 0
    environment: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    resumed_from: list[int | None] = field(default_factory=list[int | None])
    kills: int = 0
    stops: int = 0
    seconds: float = 0.0
    repeated: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    traits: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def total(self) -> int:
        """How many iterations the run has."""
        return max(self.rows, default=0)

    def take(self, line: Mapping[str, Any]) -> None:
        """Keeps what a process said of an iteration, its beginning, the run's end, or warned of."""
        if "iteration" in line:
            row = dict(line)
            iteration: int = row["iteration"]
            before = self.rows.get(iteration)
            thing = None if before is None else _differing(before, row, _THINGS)
            if before is not None and thing is not None:
                self.repeated.append(
                    f"Iteration {iteration} was done again after an interruption, and its "
                    f"{_differs(thing)}: {_shown(thing, before)}, then {_shown(thing, row)}."
                )
            self.rows[iteration] = row
        elif "begun" in line:
            self.resumed_from.append(line["resumed_from"])
            self.traits = line["traits"]
        elif "done" in line:
            self.ended, self.length = True, line["length"] or 0
            # With a trace, what it has come to is in there.
            self.end = line.get("end", {})
            self.environment, self.metrics = line.get("environment", {}), line.get("metrics", {})
        elif "warning" in line and line["warning"] not in self.warnings:
            self.warnings.append(line["warning"])


def _differing(
    left: Mapping[str, Any], right: Mapping[str, Any], things: Iterable[str]
) -> str | None:
    return next((name for name in things if left.get(name) != right.get(name)), None)


def _differs(thing: str) -> str:
    return f"{thing} differ" if thing.endswith("s") and thing != "loss" else f"{thing} differs"


def _shown(thing: str, row: Mapping[str, Any]) -> str:
    value = row.get(thing)
    number = _loss(row) if thing == "loss" else None
    return str(value) if number is None else f"{number!r}"


def first_difference(straight: Course, resumed: Course) -> str:
    """Returns the first thing that differs in a bit between two runs, as a sentence; "" if none."""
    found = _in_rows(straight, resumed, _THINGS)
    if found:
        return found
    if resumed.repeated:
        return resumed.repeated[0]
    names = [
        name
        for name in {**straight.end, **resumed.end}
        if straight.end.get(name) != resumed.end.get(name)
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"At the end differ: {', '.join(names[:3])}{more}."
    return ""


def first_distance(straight: Course, resumed: Course, tolerance: float | None) -> str:
    """Returns where two runs on different backends are further apart than they may be; "" if not.

    Epochs and batches must not differ in a bit; losses by the tolerance, or None: by any number.
    """
    found = _in_rows(straight, resumed, ("epoch", "batch"))
    if found or tolerance is None:
        return found
    for iteration, row in sorted(straight.rows.items()):
        ours, theirs = _loss(row), _loss(resumed.rows[iteration])
        if ours is None or theirs is None:
            continue
        # Written so that nan, which is no number, is too far.
        if not abs(ours - theirs) <= tolerance:
            return (
                f"Iteration {iteration}: the losses are {abs(ours - theirs):.3g} apart, "
                f"{ours:.6g} in the run on one backend and {theirs:.6g} in the ported one; "
                f"the tolerance is {tolerance:g}."
            )
    return ""


def _in_rows(straight: Course, resumed: Course, things: Iterable[str]) -> str:
    for iteration in sorted({*straight.rows, *resumed.rows}):
        left, right = straight.rows.get(iteration), resumed.rows.get(iteration)
        if left is None or right is None:
            lacks = "resumed run" if right is None else "run that was never stopped"
            return f"The {lacks} did not do iteration {iteration}."
        thing = _differing(left, right, things)
        if thing is not None:
            return (
                f"Iteration {iteration}: the {_differs(thing)}: {_shown(thing, left)} in the run "
                f"that was never stopped, {_shown(thing, right)} in the resumed one."
            )
    return ""


def _loss(row: Mapping[str, Any]) -> float | None:
    """Returns an iteration's loss; None where the training's output is no number."""
    try:
        return float.fromhex(row["loss"]) if row["scalar"] else None
    except ValueError:
        return None


def losses_of(course: Course) -> tuple[float, ...]:
    """Returns the losses in their order; empty where the training's output is no number."""
    found = [_loss(row) for _, row in sorted(course.rows.items())]
    return tuple(loss for loss in found if loss is not None) if None not in found else ()


def deviation(straight: Course, resumed: Course) -> float:
    """Returns by how much the losses of two runs differ at most; nan where one is no number."""
    pairs = list(zip(losses_of(straight), losses_of(resumed), strict=False))
    # Two that are both nan or both infinite do not differ.
    apart = [0.0 if repr(a) == repr(b) else abs(a - b) for a, b in pairs]
    return math.nan if any(map(math.isnan, apart)) else max(apart, default=0.0)
