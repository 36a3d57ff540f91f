"""Which backends and scenarios a matrix has, from the words of a command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crosstrain.backends import Availability, BackendUnavailable, get, names, probe
from crosstrain.backends.errors import UnknownBackend
from crosstrain.backends.registry import short
from crosstrain.ci.options import UsageError
from crosstrain.ci.trials.scenarios import SCENARIOS

# Not trained on: one records calls, the other stands for one of the rest.
_NO_COLUMN = frozenset({"auto", "null"})
# Trained on where it is asked for: a process that has had this device keeps it.
_BY_NAME_ONLY = frozenset({"emulated"})

# What the options begin with that share a model out over several processes.
_SHARDED = "fsdp"


@dataclass(frozen=True)
class Selection:
    """The columns of a matrix, and what the probes say of them, and of others that are absent."""

    backends: tuple[str, ...]
    required: tuple[str, ...]
    found: Mapping[str, Availability]
    absent: Mapping[str, Availability]


def available_specs() -> list[str]:
    """Returns every spec that can run here and shows something in one process.

    The CPU's come first, as the reference of all others; a backend's first option has the plain
    name.
    """
    specs: list[str] = []
    candidates = set(names()) - _NO_COLUMN - _BY_NAME_ONLY
    for name in sorted(candidates, key=lambda name: (name != "cpu", name)):
        if probe(name).ok:
            options = get(name).options[1:]
            specs += [name, *(f"{name}:{o}" for o in options if not o.startswith(_SHARDED))]
    return [spec for spec in specs if probe(spec).ok]


def selected(asked: Sequence[str], required: Sequence[str]) -> Selection:
    """Returns the columns that a command line asks for; by default those that can run here.

    Args:
        asked: the specs of `--backends`.
        required: the specs of `--require`: columns too, which may be unavailable.

    Raises:
        BackendUnavailable: if one was asked for, but not required, and cannot run here.
    """
    required = [short(spec) for spec in required]
    specs = [*map(short, asked), *required] or available_specs()
    specs = list(dict.fromkeys(specs))
    for spec in specs:
        if spec.partition(":")[0] in _NO_COLUMN:
            raise UsageError(
                f"'{spec}' cannot be a column of the matrix: it names no hardware. Columns here: "
                f"{', '.join(available_specs())}."
            )
        _check_exists(spec)
    found = {spec: probe(spec) for spec in specs}
    for spec, availability in found.items():
        if not availability.ok and spec not in required:
            raise BackendUnavailable(spec, availability.reason, availability.remedy)
    columns = {spec.partition(":")[0] for spec in specs}
    others = {name: probe(name) for name in sorted(set(names()) - _NO_COLUMN - columns)}
    absent = {name: availability for name, availability in others.items() if not availability.ok}
    return Selection(tuple(specs), tuple(dict.fromkeys(required)), found, absent)


def _check_exists(spec: str) -> None:
    """Raises `UnknownBackend`, with the nearest name, for a spec that does not exist."""
    try:
        get(spec)
    except UnknownBackend:
        raise
    # Whether it can run here is for its probe to say. A third party may raise anything.
    except Exception:  # noqa: BLE001
        return


def chosen_scenarios(asked: Sequence[str]) -> list[str]:
    """Returns the scenarios that a command line asks for, in their own order."""
    for name in asked:
        if name not in SCENARIOS:
            close = difflib.get_close_matches(name, SCENARIOS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"There is no scenario '{name}'.{hint} Scenarios: {', '.join(SCENARIOS)}."
            )
    return [name for name in SCENARIOS if not asked or name in asked]


def exclusive_specs(specs: Iterable[str]) -> frozenset[str]:
    """Returns the specs of devices that one process takes whole: their cells take turns."""
    taken = {"tpu"}
    if os.environ.get("PJRT_DEVICE") == "TPU":
        taken.add("xla")
    return frozenset(spec for spec in specs if spec.partition(":")[0] in taken)
