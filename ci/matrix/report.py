"""The report of the hardware matrix: what ran where, and what became of it, as one JSON file.

`docs/matrix.md` documents the schema. A report holds one run for each machine; `merged` puts the
runs of several reports into one. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from .outcome import Cell, InvalidReport, Outcome, typed, write_json

SCHEMA = "crosstrain-matrix"
SCHEMA_VERSION = 1
FILE_NAME = "matrix.json"

# Statuses that always make a matrix fail. `unavailable` does so only where it was required.
BROKEN = frozenset({"failed", "error", "timeout"})


class _Title(TypedDict):
    name: str
    title: str


class _Content(TypedDict):
    schema: str
    version: int
    runs: list[Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one machine ran: the keys of the schema, in which scenarios have their titles."""

    name: str
    started: str
    seconds: float
    interrupted: bool = False
    target: str | None = None
    backends: tuple[str, ...]
    required: tuple[str, ...] = ()
    scenarios: Mapping[str, str]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    devices: Mapping[str, tuple[str, ...]]
    outcomes: tuple[Outcome, ...]
    absent: Mapping[str, str] = field(default_factory=dict[str, str])

    def outcome(self, spec: str, scenario: str) -> Outcome:
        """Returns what became of a cell; of one that was not reached, an outcome that says so."""
        cell = Cell(spec, scenario)
        left = "The matrix was interrupted before this cell ended."
        missing = Outcome(spec=spec, scenario=scenario, status="not run", reason=left)
        return next((one for one in self.outcomes if one.cell == cell), missing)

    def missing(self) -> list[str]:
        """Returns the required specs that could not run."""
        absent = {one.spec for one in self.outcomes if one.status == "unavailable"}
        return [spec for spec in self.required if spec in absent]

    def is_broken(self, outcome: Outcome) -> bool:
        """Tells whether a cell's outcome makes the matrix fail."""
        required = outcome.spec in self.required
        return outcome.status in BROKEN or (outcome.status == "unavailable" and required)

    def to_json(self) -> dict[str, Any]:
        """Returns the run as plain values, of which `json.dumps` makes valid JSON."""
        return {
            **vars(self),
            "scenarios": [{"name": name, "title": t} for name, t in self.scenarios.items()],
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
        }

    @classmethod
    def from_json(cls, value: Any) -> Run:
        """Returns the run that `to_json` wrote."""
        content: Any = value
        if isinstance(value, dict) and "scenarios" in value:
            titles = typed(list[_Title], content["scenarios"], "scenarios")
            content = {**content, "scenarios": {one["name"]: one["title"] for one in titles}}
        run: Run = typed(cls, content, "a run")
        seen: set[Cell] = set()
        for one in run.outcomes:
            _one_of(one.spec, run.backends, "backends")
            _one_of(one.scenario, list(run.scenarios), "scenarios")
            if one.cell in seen:
                raise InvalidReport(f"two outcomes of scenario {one.scenario!r} on {one.spec!r}")
            seen.add(one.cell)
        for spec in run.required:
            _one_of(spec, run.backends, "backends")
        return run


@dataclass(frozen=True)
class Report:
    """The runs of one machine or several."""

    runs: tuple[Run, ...]

    def broken(self) -> list[tuple[Run, Outcome]]:
        """Returns the cells that make the matrix fail, with the run that each is of."""
        return [(run, one) for run in self.runs for one in run.outcomes if run.is_broken(one)]

    def scenarios(self) -> dict[str, str]:
        """Returns the scenarios of all runs, title by name, each in the order of its first run."""
        return {name: title for run in reversed(self.runs) for name, title in run.scenarios.items()}

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `matrix.json`, whole or not at all."""
        target = Path(folder) / FILE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "runs": [run.to_json() for run in self.runs],
        }
        write_json(target, content)
        return target

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """Returns the report of a file, checked; `InvalidReport` names the file."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            return cls._from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise InvalidReport(
                f"{file}: {error.strerror}; name a folder that `crosstrain matrix --report` wrote, "
                f"or its {FILE_NAME}"
            ) from error
        except ValueError as error:
            raise InvalidReport(f"{file}: {error}") from error

    @classmethod
    def _from_json(cls, value: Any) -> Report:
        content: Any = value if isinstance(value, dict) else {}
        if content.get("schema") != SCHEMA:
            raise InvalidReport(f"schema {content.get('schema')!r} is not {SCHEMA!r}")
        if content.get("version") != SCHEMA_VERSION:
            raise InvalidReport(
                f"version {content.get('version')!r} of the schema; this crosstrain reads version "
                f"{SCHEMA_VERSION}: write and merge with the same crosstrain"
            )
        runs = tuple(map(Run.from_json, typed(_Content, content, "a report")["runs"]))
        names = [run.name for run in runs]
        if len(set(names)) < len(names):
            raise InvalidReport(f"runs of one name: {names}")
        return cls(runs)


def merged(reports: Iterable[Report]) -> Report:
    """Returns one report with the runs of several.

    Runs keep their order. Where names meet, `(2)`, `(3)` ... are appended. A run that is in two
    reports, such as one that was merged before, is taken once.
    """
    runs: list[Run] = []
    contents: set[str] = set()
    names: set[str] = set()
    for run in (run for report in reports for run in report.runs):
        content = json.dumps(run.to_json(), sort_keys=True)
        if content in contents:
            continue
        contents.add(content)
        name, count = run.name, 1
        while name in names:
            count += 1
            name = f"{run.name} ({count})"
        names.add(name)
        runs.append(replace(run, name=name))
    return Report(tuple(runs))


def _one_of(word: str, words: Sequence[str], name: str) -> None:
    if word not in words:
        raise InvalidReport(f"{word!r} is none of the run's {name}: {', '.join(words)}")
