"""Where two traces part: the first iteration, and the first thing in it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from crosstrain.ci.options import UsageError

from .file import Record, Thing, Trace, TraceError

# What is compared across kinds of devices: their random streams differ, and so does, for all that
# is computed, the last bit.
_BY_VALUE: Final = ("loss", "gradient", "parameter", "buffer")
_BY_DIGEST: Final = ("batch", "setting")
# In which order they come about in an iteration; others come after these.
_ORDER: Final = ("batch", "random", "setting", "loss", "gradient", "parameter", "buffer")
# A tensor whose norm is below this part of the largest of its kind is compared with that part
# of it: the rounding of what a small norm is the sum of is as large as that of the others.
_FLOOR: Final = 0.1


@dataclass(frozen=True)
class Difference:
    """The first thing in which two runs differ.

    Args:
        thing: what differs; None where one of the runs lacks the iteration.
        left: the first run's value (a loss, a setting, a norm); None where there is none.
        right: the second run's.
        others: how many things after it, in the same iteration, differ as well.
        missing: which run lacks the thing or the iteration, `left` or `right`; empty if neither.
        rank: the process, where the runs had several and all were compared; None otherwise.
    """

    iteration: int
    epoch: int
    thing: Thing | None
    left: float | None = None
    right: float | None = None
    others: int = 0
    missing: str = ""
    rank: int | None = None

    def __str__(self) -> str:
        on = "" if self.rank is None else f" on rank {self.rank}"
        where = f"iteration {self.iteration} (epoch {self.epoch}){on}"
        which = {"left": "the first run", "right": "the second run"}.get(self.missing, "")
        if self.thing is None:
            return f"{where} is missing in {which}"
        if which:
            return f"{where}: {self.thing} is missing in {which}"
        return f"{where}: {self.thing} differs"


def as_json(difference: Difference | None) -> dict[str, Any] | None:
    """Returns a difference as plain values, with its sentence; None if there is none."""
    if difference is None:
        return None
    thing = difference.thing
    return {
        **asdict(difference),
        "thing": None if thing is None else {"kind": thing.kind, "name": thing.name},
        "text": str(difference),
    }


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two traces: where they part, how they were compared, and why so.

    Args:
        conditions: what differs between the environments that they were recorded in.
        unrecorded: iterations between the first and the last that only one of the traces holds.
    """

    difference: Difference | None
    tolerance: float | None
    why: str
    iterations: int
    conditions: tuple[str, ...]
    unrecorded: int = 0


def default_tolerance(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """Returns the tolerance for runs on different kinds of devices."""
    specs = f"{left.get('backend')} {right.get('backend')}"
    reduced = any(word in specs for word in ("bf16", "fp16", "tf32", "O1", "O2", "O3"))
    return 2e-2 if reduced else 1e-3


def compare(
    left: Trace, right: Trace, *, tolerance: float | None = None, exact: bool = False
) -> Comparison:
    """Compares two traces: bit by bit if they are of one kind of device, by norms otherwise.

    Args:
        left: a trace.
        right: another.
        tolerance: compares by norms, with this relative tolerance, whatever the devices.
        exact: compares bit by bit, whatever the devices.
    """
    if exact and tolerance is not None:
        raise UsageError("exact compares bit by bit: it does not go with a tolerance.")
    ours, theirs = left.environment, right.environment
    kinds = [_kind(ours), _kind(theirs)]
    if tolerance is not None:
        why = "A tolerance was asked for."
    elif exact:
        why = "Bit by bit was asked for."
    elif kinds[0] == kinds[1]:
        why = f"Both runs were on {kinds[0]}."
    else:
        tolerance = default_tolerance(ours, theirs)
        why = f"One run was on {kinds[0]}, the other on {kinds[1]}."
    if tolerance is not None and _scaled(left) != _scaled(right):
        why += " Gradients are left out: one of the runs scales its loss."
    common = sorted(set(left.iterations) & set(right.iterations))
    if not common:
        raise TraceError(
            f"{left.path} and {right.path} have no iteration in common: {span(left)}, and "
            f"{span(right)}."
        )
    if tolerance is not None:
        _check_values(left, common[0])
        _check_values(right, common[0])
    inside = set(range(common[0], common[-1] + 1))
    alone = (set(left.iterations) ^ set(right.iterations)) & inside
    return Comparison(
        first_difference(left, right, tolerance),
        tolerance,
        why,
        len(common),
        tuple(
            f"{name}: {ours.get(name)!r} and {theirs.get(name)!r}"
            for name in dict.fromkeys((*ours, *theirs))
            if ours.get(name) != theirs.get(name)
        ),
        len(alone),
    )


def _scaled(trace: Trace) -> bool:
    """Tells whether the gradients of a trace are those of a loss that was scaled."""
    spec = str(trace.environment.get("backend"))
    return any(word in spec for word in (":fp16", ":O1", ":O2", ":O3"))


def _check_values(trace: Trace, iteration: int) -> None:
    record = trace.record(iteration)
    kinds = ("gradient", "parameter")
    if any(thing.kind in kinds for thing in record.digests) and not any(
        thing.kind in kinds for thing in record.values
    ):
        raise TraceError(
            f"{trace.path} holds no norms, by which these runs are compared. Record it anew "
            "without norms=False."
        )


def _kind(environment: Mapping[str, Any]) -> str:
    backend = environment.get("backend") or "no backend"
    devices = environment.get("devices")
    # In logical shards the number of processes decides no bit.
    size = 1 if "logical shards" in environment else environment.get("world size", 1)
    return (
        f"{backend}{f' ({devices})' if devices else ''}"
        f"{f' in {size} processes' if size != 1 else ''}"
    )


def span(trace: Trace) -> str:
    """Returns the first and the last iteration of a trace, in words."""
    found = trace.iterations
    return f"{found[0]} to {found[-1]}" if found else "none"


def first_difference(
    left: Trace, right: Trace, tolerance: float | None = None
) -> Difference | None:
    """Returns the first difference in the iterations that both have, or None.

    If they agree there, and one goes on for longer, that is the difference. With a tolerance they
    are compared by norms.
    """
    common = sorted(set(left.iterations) & set(right.iterations))
    kinds: tuple[str, ...] = _BY_VALUE
    if tolerance is not None and _scaled(left) != _scaled(right):
        kinds = tuple(kind for kind in kinds if kind != "gradient")
    for iteration in common:
        records = left.record(iteration), right.record(iteration)
        found = _in_iteration(*records, tolerance, kinds)
        if found is not None:
            return found
    for trace, missing in ((left, "right"), (right, "left")):
        longer = [one for one in trace.iterations if not common or one > common[-1]]
        if longer:
            record = trace.record(longer[0])
            return Difference(record.iteration, record.epoch, None, missing=missing)
    return None


def _in_iteration(
    left: Record, right: Record, tolerance: float | None, by_value: Sequence[str]
) -> Difference | None:
    floors = {} if tolerance is None else _floors(left, right)
    compared = (*_BY_DIGEST, *by_value)
    differing = [
        thing
        # In the order in which they come about.
        for thing in sorted({**left.digests, **right.digests}, key=lambda one: _place(one.kind))
        if tolerance is None or thing.kind in compared
        if _differ(thing, left, right, tolerance, floors)
    ]
    if not differing:
        return None
    first, *others = differing
    return Difference(
        left.iteration,
        left.epoch,
        first,
        left.values.get(first),
        right.values.get(first),
        len(others),
        "left" if first not in left.digests else "right" if first not in right.digests else "",
    )


def _place(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def earliest(found: Iterable[Difference]) -> Difference | None:
    """Returns the difference that comes about first: the others may follow from it."""

    def when(one: Difference) -> tuple[int, int]:
        return one.iteration, _place("" if one.thing is None else one.thing.kind)

    return min(found, key=when, default=None)


def _differ(
    thing: Thing, left: Record, right: Record, tolerance: float | None, floors: Mapping[str, float]
) -> bool:
    if tolerance is None or thing.kind in _BY_DIGEST:
        return left.digests.get(thing) != right.digests.get(thing)
    if (thing in left.digests) != (thing in right.digests):
        return True
    one, other = left.values.get(thing), right.values.get(thing)
    if one is None or other is None:
        # No number stands for it, such as a buffer that counts.
        return one is not other or left.digests.get(thing) != right.digests.get(thing)
    if math.isnan(one) and math.isnan(other):
        return False
    return not math.isclose(
        one, other, rel_tol=tolerance, abs_tol=tolerance * floors.get(thing.kind, 0.0)
    )


def _floors(left: Record, right: Record) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in (left, right):
        for thing, value in record.values.items():
            if thing.kind != "loss" and math.isfinite(value):
                found[thing.kind] = max(found.get(thing.kind, 0.0), abs(value) * _FLOOR)
    return found
