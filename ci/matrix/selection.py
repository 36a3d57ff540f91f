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
from crosstrain.ci.trials.target import Target, TargetError

# Not trained on: one records calls, the other stands for one of the rest.
_NO_COLUMN = frozenset({"auto", "null"})
# Trained on where it is asked for: a process that has had this device keeps it.
_BY_NAME_ONLY = frozenset({"emulated"})

# What the options begin with that share a model out over several processes.
_SHARDED = "fsdp"


@dataclass(frozen=True)
class Selection:
    """The columns of a matrix.

    Args:
        backends: the specs, in order.
        required: those of them that have to be available.
        found: what the probe of each says.
        absent: what the probes of the other backends say that cannot run here, by name.
    """

    backends: tuple[str, ...]
    required: tuple[str, ...]
    found: Mapping[str, Availability]
    absent: Mapping[str, Availability]


def available_specs() -> list[str]:
    """Returns every spec that can run here: each option of each backend but `null` and `auto`.

    `emulated`, which is no hardware, is left out too: it has to be asked for.
    Options that share a model out over processes are left out: one process has nothing to share.

    The CPU's come first, as the reference of all others; a backend's first option has the plain
    name.
    """
    specs: list[str] = []
    for name in sorted(
        set(names()) - _NO_COLUMN - _BY_NAME_ONLY, key=lambda name: (name != "cpu", name)
    ):
        if not probe(name).ok:
            continue
        options = get(name).options
        specs += [name, *(f"{name}:{o}" for o in options[1:] if not o.startswith(_SHARDED))]
    return [spec for spec in specs if probe(spec).ok]


def selected(asked: Sequence[str], required: Sequence[str]) -> Selection:
    """Returns the columns that a command line asks for.

    Args:
        asked: the specs of `--backends`; if there are none, and none is required, those that are
            available here.
        required: the specs of `--require`: columns too, which may be unavailable.

    Raises:
        UnknownBackend: if a spec does not exist.
        BackendUnavailable: if one was asked for, but not required, and cannot run here.
        UsageError: if one cannot be trained on.
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


def chosen_scenarios(asked: Sequence[str], known: Iterable[str]) -> list[str]:
    """Returns the scenarios that a command line asks for, in their own order.

    Raises:
        UsageError: if one does not exist; the message has the nearest that does.
    """
    names_ = list(known)
    for name in asked:
        if name not in names_:
            close = difflib.get_close_matches(name, names_, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise UsageError(
                f"There is no scenario '{name}'.{hint} Scenarios: {', '.join(names_)}."
            )
    return [name for name in names_ if not asked or name in asked]


def check_target(target: str | None) -> None:
    """Raises `UsageError` unless a target is None or names a function, as `Target.parse` says."""
    if target is not None:
        try:
            Target.parse(target)
        except TargetError as error:
            raise UsageError(str(error)) from None


def exclusive_specs(specs: Iterable[str]) -> frozenset[str]:
    """Returns the specs of devices that one process takes whole: their cells take turns."""
    taken = {"tpu"}
    if os.environ.get("PJRT_DEVICE") == "TPU":
        taken.add("xla")
    return frozenset(spec for spec in specs if spec.partition(":")[0] in taken)
