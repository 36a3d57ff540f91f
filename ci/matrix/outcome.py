"""What became of one cell of the hardware matrix: one scenario on one backend. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, cast, get_args, get_origin, get_type_hints

from crosstrain.ci.options import UsageError

#: The file that a cell writes into its folder.
OUTCOME = "outcome.json"

Status = Literal["passed", "failed", "error", "timeout", "unavailable", "skipped", "not run"]
#: Those that a cell can come to; the last one stands for a cell that has come to nothing yet.
STATUSES: tuple[Status, ...] = get_args(Status)[:-1]

Figure = int | float | str

# JSON has no word for these numbers; they are written as these strings.
_NON_FINITE = ("nan", "inf", "-inf")


class InvalidReport(UsageError, ValueError):
    """What is no report, or no outcome: it says where, what was found, and what is legal."""


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
    """The machine that a cell ran on, its cores that could be used, and the backend's devices."""

    machine: str
    cores: int
    devices: list[str]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one scenario on one backend.

    A wrong value is an `InvalidReport` when it is made.

    Args:
        spec: the backend's spec, such as `cpu:bf16`.
        scenario: the scenario's name.
        status: `passed`; `failed` (it ran, and the promise was broken); `error` (it did not run to
            its end); `timeout`; `unavailable` (the backend cannot run here); `skipped` (the
            backend has not what the scenario needs); `not run` (see `Run.outcome`).
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
        for name in ("spec", "scenario"):
            if not getattr(self, name):
                raise InvalidReport(f"{name} is empty; it names the cell")
        if (self.status == "passed") == bool(self.reason):
            raise InvalidReport(
                f"status {self.status!r} with reason {self.reason!r}: the reason is empty if the "
                "cell passed, and only then"
            )
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise InvalidReport(f"seconds: {self.seconds!r} is not a duration")
        for key, figure in self.figures.items():
            if figure in _NON_FINITE:
                raise InvalidReport(f"figures[{key!r}]: write float({figure!r}), not the string")
        cores = 1 if self.hardware is None else self.hardware["cores"]
        if cores < 1:
            raise InvalidReport(f"hardware['cores']: {cores} is not a number of cores")

    @property
    def cell(self) -> Cell:
        """The cell that it is of."""
        return Cell(self.spec, self.scenario)

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain values of which `json.dumps` makes valid JSON."""
        return {
            **vars(self),
            "losses": [_encoded(loss) for loss in self.losses],
            "resumed_losses": [_encoded(loss) for loss in self.resumed_losses],
            "figures": {name: _encoded(value) for name, value in self.figures.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Outcome:
        """Returns the outcome that `to_json` wrote."""
        found: Outcome = typed(cls, value, "an outcome")
        return found

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the outcome as a JSON file, whole or not at all."""
        write_json(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Outcome:
        """Returns the outcome that a file holds."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise InvalidReport(f"{os.fspath(path)}: {error}") from error


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Writes a file of JSON, whole or not at all."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(target)


def _encoded(value: Figure) -> Figure:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# The types of plain values, in words.
_PLAIN: Mapping[Any, str] = {
    str: "a str",
    bool: "true or false",
    int: "a whole number",
    float: "a number; those that JSON does not have are written as the strings "
    + ", ".join(_NON_FINITE),
    Figure: "an int, a float or a str",
}


def typed(kind: Any, value: Any, name: str) -> Any:
    """Returns what JSON holds as a value of a type: a dataclass, a mapping, a list, a plain type.

    Raises:
        InvalidReport: if it is none; it says where, what is there, and what is legal.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if kind in _PLAIN:
        return _plain(kind, value, name)
    if origin is Literal:
        if value not in inner:
            raise InvalidReport(f"{name} {value!r} is none of {', '.join(inner)}")
        return value
    if origin is UnionType:
        return None if value is None else typed(inner[0], value, name)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise InvalidReport(f"{name} is a list, not {type(value).__name__}")
        return origin(typed(inner[0], one, name) for one in cast("list[Any]", value))
    if not isinstance(value, dict):
        raise InvalidReport(f"{name} is an object, not {type(value).__name__}")
    found = cast("dict[str, Any]", value)
    if origin is Mapping:
        return {key: typed(inner[1], one, f"{name}[{key!r}]") for key, one in found.items()}
    hints = get_type_hints(kind)
    if unknown := sorted(found.keys() - hints):
        raise InvalidReport(f"{name}: unknown keys {unknown}; the keys are {sorted(hints)}")
    if missing := sorted(hints.keys() - found):
        raise InvalidReport(f"{name}: missing keys {missing}")
    return kind(**{key: typed(hint, found[key], key) for key, hint in hints.items()})


def _plain(kind: Any, value: Any, name: str) -> Any:
    if kind in (float, Figure) and isinstance(value, str) and value in _NON_FINITE:
        return float(value)
    legal: tuple[type, ...] = {float: (int, float), Figure: (int, float, str)}.get(kind, (kind,))
    if type(value) not in legal:
        raise InvalidReport(f"{name}: {value!r} is not {_PLAIN[kind]}")
    return float(value) if kind is float else value
