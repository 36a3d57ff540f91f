"""What became of one cell of the hardware matrix: one scenario on one backend. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

#: The file that a cell writes into its folder.
OUTCOME = "outcome.json"

Status = Literal["passed", "failed", "error", "timeout", "unavailable", "skipped"]
STATUSES: tuple[Status, ...] = get_args(Status)

Figure = int | float | str

# JSON has no word for these numbers; they are written as these strings.
_NON_FINITE = ("nan", "inf", "-inf")


class InvalidOutcome(ValueError):
    """An outcome that breaks the schema: it says where, what was found, and what is legal."""


@dataclass(frozen=True)
class Cell:
    """One scenario on one backend, by their names."""

    spec: str
    scenario: str

    @property
    def folder(self) -> Path:
        """Its folder under the report's: no letter in it that an archive of CI refuses."""
        return Path("cells") / re.sub(r"[^\w.-]", "_", self.spec) / self.scenario


class Hardware(TypedDict):
    """The machine that a cell ran on.

    Args:
        machine: a name that tells the team's machines apart, such as the host's name.
        cores: the CPU cores that the process could use.
        devices: the devices that the backend trained on, as people call them.
    """

    machine: str
    cores: int
    devices: list[str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one scenario on one backend.

    It is checked when it is made: a wrong value is an `InvalidOutcome` there.

    Args:
        spec: the backend's spec, such as `cpu:bf16`.
        scenario: the scenario's name.
        status: `passed`; `failed` (it ran, and the promise was broken); `error` (it did not run to
            its end); `timeout`; `unavailable` (the backend cannot run here); `skipped` (the
            backend has not what the scenario needs).
        reason: why it did not pass, for a person; empty if it passed, and only then.
        seconds: how long it took.
        losses: one loss an iteration of the run that was never stopped; may hold nan and inf.
        resumed_losses: the same of the run that was stopped and resumed.
        figures: whatever else was measured, by name: numbers and short words.
        versions: the versions of the libraries that were used, by name.
        hardware: the machine; None where the cell did not come to say so.
    """

    spec: str
    scenario: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    resumed_losses: tuple[float, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    hardware: Hardware | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def cell(self) -> Cell:
        """The cell that it is of."""
        return Cell(self.spec, self.scenario)

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain values of which `json.dumps` makes valid JSON.

        The numbers nan, inf and -inf become the strings of these names.
        """
        return {
            **vars(self),
            "losses": [_encoded(loss) for loss in self.losses],
            "resumed_losses": [_encoded(loss) for loss in self.resumed_losses],
            "figures": {name: _encoded(value) for name, value in self.figures.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Outcome:
        """Returns the outcome that `to_json` wrote.

        Raises:
            InvalidOutcome: if a key is missing or unknown, or a value is none of the legal ones.
        """
        content = dict(with_keys(value, "an outcome", {one.name for one in fields(cls)}))
        for name in ("losses", "resumed_losses"):
            content[name] = tuple(as_number(x, name) for x in as_list(content[name], name))
        figures = as_mapping(content["figures"], "figures")
        content["figures"] = {
            name: as_number(x, name) if x in _NON_FINITE else x for name, x in figures.items()
        }
        return cls(**content)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the outcome as a JSON file, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Outcome:
        """Returns the outcome that a file holds.

        Raises:
            InvalidOutcome: if the file holds no valid outcome; the message names the file.
            OSError: if it cannot be read.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise InvalidOutcome(f"{os.fspath(path)}: {error}") from error


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(target)


def as_number(value: Any, name: str) -> float:
    """Returns the number that JSON holds, in which nan, inf and -inf are strings.

    Raises:
        InvalidOutcome: if it is no number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number or (isinstance(value, str) and value in _NON_FINITE):
        return float(value)
    raise InvalidOutcome(
        f"{name}: {value!r} is not a number; numbers that JSON does not have are written as the "
        f"strings {', '.join(_NON_FINITE)}"
    )


def _encoded(value: Figure) -> Figure:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _check(outcome: Outcome) -> None:
    for name in ("spec", "scenario"):
        if not as_text(getattr(outcome, name), name):
            raise InvalidOutcome(f"{name} is empty; it names the cell")
    if outcome.status not in STATUSES:
        raise InvalidOutcome(f"status {outcome.status!r} is none of {', '.join(STATUSES)}")
    reason = as_text(outcome.reason, "reason")
    if (outcome.status == "passed") == bool(reason):
        raise InvalidOutcome(
            f"status {outcome.status!r} with reason {reason!r}: the reason is empty if the cell "
            "passed, and only then"
        )
    if not (math.isfinite(as_number(outcome.seconds, "seconds")) and outcome.seconds >= 0):
        raise InvalidOutcome(f"seconds: {outcome.seconds!r} is not a duration")
    for name in ("losses", "resumed_losses"):
        value: Any = getattr(outcome, name)
        if not isinstance(cast("object", value), tuple):
            raise InvalidOutcome(f"{name} is a tuple of floats, not {type(value).__name__}")
        numbers: tuple[Any, ...] = value
        for number in numbers:
            if not isinstance(number, float):
                raise InvalidOutcome(f"{name}: {number!r} is not a float; write float(loss)")
    for key, figure in as_mapping(outcome.figures, "figures").items():
        if isinstance(figure, bool) or not isinstance(figure, (int, float, str)):
            raise InvalidOutcome(f"figures[{key!r}]: {figure!r} is not an int, a float or a str")
        if isinstance(figure, str) and figure in _NON_FINITE:
            raise InvalidOutcome(f"figures[{key!r}]: write float({figure!r}), not the string")
    for key, version in as_mapping(outcome.versions, "versions").items():
        as_text(version, f"versions[{key!r}]")
    if outcome.hardware is not None:
        _check_hardware(as_mapping(outcome.hardware, "hardware"))


def _check_hardware(hardware: Mapping[str, Any]) -> None:
    with_keys(hardware, "hardware", set(Hardware.__annotations__))
    as_text(hardware["machine"], "hardware['machine']")
    cores = hardware["cores"]
    if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
        raise InvalidOutcome(f"hardware['cores']: {cores!r} is not a number of cores")
    for device in as_list(hardware["devices"], "hardware['devices']"):
        as_text(device, "hardware['devices']")


def as_text(value: Any, name: str) -> str:
    """Returns a value if it is a str; otherwise raises `InvalidOutcome`, which names it."""
    if not isinstance(value, str):
        raise InvalidOutcome(f"{name}: {value!r} is not a str")
    return value


def as_list(value: Any, name: str) -> Sequence[Any]:
    """Returns a value if it is a list or a tuple; otherwise raises `InvalidOutcome`."""
    if not isinstance(cast("object", value), (list, tuple)):
        raise InvalidOutcome(f"{name} is a list, not {type(value).__name__}")
    found: Sequence[Any] = value
    return found


def as_mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Returns a value if it is a mapping from str; otherwise raises `InvalidOutcome`."""
    if not isinstance(cast("object", value), Mapping):
        raise InvalidOutcome(f"{name} is an object, not {type(value).__name__}")
    found: Mapping[Any, Any] = value
    for key in found:
        as_text(key, f"a key of {name}")
    return cast("Mapping[str, Any]", found)


def with_keys(value: Any, name: str, known: set[str]) -> Mapping[str, Any]:
    """Returns a value if it is a mapping with these keys; otherwise raises `InvalidOutcome`."""
    found = as_mapping(value, name)
    if unknown := sorted(found.keys() - known):
        raise InvalidOutcome(f"{name}: unknown keys {unknown}; the keys are {sorted(known)}")
    if missing := sorted(known - found.keys()):
        raise InvalidOutcome(f"{name}: missing keys {missing}")
    return found
