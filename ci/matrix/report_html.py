"""The report as one page of HTML that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from .outcome import Figure, Outcome
from .progress import MARKS, duration
from .report import Report, Run
from .report_curves import Curve, Deviation, chart, deviation

_REFERENCE = "cpu"

# The style sheet has this many colours, and this many kinds of line.
_COLOURS, _DASHES = 8, 4

_NOT_RUN = "not run"
_SIGNS: Mapping[str, str] = {**{status: sign for status, (sign, _) in MARKS.items()}, _NOT_RUN: "·"}


@dataclass(frozen=True)
class _Column:
    """One backend of one run."""

    run: Run
    spec: str
    label: str
    style: str


@dataclass(frozen=True)
class _CellView:
    """What the page shows of one cell."""

    key: str
    column: _Column
    scenario: str
    title: str
    status: str
    broken: bool
    outcome: Outcome | None
    deviation: Deviation | None
    resumed: Deviation | None
    picture: Markup

    @property
    def sign(self) -> str:
        return _SIGNS[self.status]

    @property
    def reason(self) -> str:
        if self.outcome is None:
            return "The matrix was interrupted before this cell ended."
        return self.outcome.reason

    @property
    def shown(self) -> str:
        """What was proven, or why nothing was: what stands under the status."""
        if self.status != "passed" or self.outcome is None or self.resumed is None:
            return self.headline
        places, apart = self.outcome.figures.get("resumed_from"), self.resumed.largest
        where = f", resumed after {places}" if places else ""
        same = f"{apart:.2g} apart" if apart else "the same losses"
        return f"{same} in {len(self.outcome.losses)} iterations{where}"

    @property
    def headline(self) -> str:
        return next((line for line in self.reason.splitlines() if line.strip()), "")


def page(report: Report) -> str:
    """Returns the page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    environment.filters["figure"] = _figure
    here = files("crosstrain.ci.matrix")
    columns = _columns(report)
    rows = [
        (name, title, [_cell(columns, name, title, place) for place in range(len(columns))])
        for name, title in report.scenarios().items()
    ]
    cells = [cell for _, _, views in rows for cell in views]
    template = environment.from_string((here / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        report=report,
        columns=columns,
        rows=rows,
        cells=cells,
        broken=[cell for cell in cells if cell.broken and cell.status != "unavailable"],
        missing=[
            (
                column.label,
                next(one.reason for one in column.run.outcomes if one.spec == column.spec),
            )
            for column in columns
            if column.spec in column.run.missing()
        ],
        counts=_counts(cells),
        signs=_SIGNS,
        curves=list(_all_curves(report, columns)),
        absent=[
            (name, run.name, reason) for run in report.runs for name, reason in run.absent.items()
        ],
        facts=_facts(report.runs),
        versions=list(_versions(report.runs)),
        interrupted=any(run.interrupted for run in report.runs),
        incomplete=any(cell.status == _NOT_RUN for cell in cells),
    )


def _columns(report: Report) -> list[_Column]:
    several = len(report.runs) > 1
    columns: list[_Column] = []
    for run, spec in ((one, spec) for one in report.runs for spec in one.backends):
        style = f"c{len(columns) % _COLOURS} d{len(columns) // _COLOURS % _DASHES}"
        columns.append(_Column(run, spec, f"{spec} · {run.name}" if several else spec, style))
    return columns


def _cell(columns: Sequence[_Column], scenario: str, title: str, place: int) -> _CellView:
    column = columns[place]
    outcome = column.run.outcome(column.spec, scenario)
    reference = _reference(columns, column.run, scenario)
    losses = () if outcome is None else outcome.losses
    resumed = None if outcome is None else deviation(outcome.resumed_losses, losses)
    picture = Markup("")
    if outcome is not None and resumed is not None and resumed.largest:
        picture = chart(
            [Curve(column.label, column.style, losses, (outcome.resumed_losses,))],
            f"losses of {scenario} on {column.label}, never stopped and resumed",
            stops=_stops(outcome),
        )
    return _CellView(
        key=f"cell-{scenario}-{place}",
        column=column,
        scenario=scenario,
        title=title,
        status=_NOT_RUN if outcome is None else outcome.status,
        broken=outcome is not None and column.run.is_broken(outcome),
        outcome=outcome,
        deviation=deviation(losses, reference[1]) if reference else None,
        resumed=resumed,
        picture=picture,
    )


def _reference(
    columns: Sequence[_Column], run: Run, scenario: str
) -> tuple[_Column, tuple[float, ...]] | None:
    """Returns the CPU in fp32 with its losses: of this run, else of the first that has them."""
    for one in sorted(columns, key=lambda column: column.run is not run):
        outcome = one.run.outcome(one.spec, scenario)
        if one.spec == _REFERENCE and outcome is not None and outcome.losses:
            return one, outcome.losses
    return None


def _stops(outcome: Outcome) -> list[int]:
    """Returns the iterations after which the run was stopped and went on."""
    places = str(outcome.figures.get("resumed_from", "")).split(",")
    return [int(place) for place in places if place.strip().isdecimal()]


# A training: of each column that ran it the place, the losses, and whether resumed ones were equal.
_Group = tuple[tuple[int, tuple[float, ...], bool], ...]


def _all_curves(report: Report, columns: Sequence[_Column]) -> Iterator[dict[str, Any]]:
    """Yields a picture for each training; scenarios that stop the same one share it."""
    groups: dict[_Group, list[tuple[str, str]]] = {}
    for name, title in report.scenarios().items():
        found: _Group = tuple(
            (place, outcome.losses, outcome.resumed_losses == outcome.losses)
            for place, column in enumerate(columns)
            if (outcome := column.run.outcome(column.spec, name)) is not None and outcome.losses
        )
        if found:
            groups.setdefault(found, []).append((name, title))
    for group, scenarios in groups.items():
        yield _curves(columns, group, [name for name, _ in scenarios], scenarios[0][1])


def _curves(
    columns: Sequence[_Column], group: _Group, names: list[str], title: str
) -> dict[str, Any]:
    curves: list[Curve] = []
    stops: list[int] = []
    for place, losses, _ in group:
        column = columns[place]
        outcomes = [outcome for name in names if (outcome := column.run.outcome(column.spec, name))]
        stops += [stop for outcome in outcomes for stop in _stops(outcome)]
        resumed = tuple(one.resumed_losses for one in outcomes if one.resumed_losses)
        curves.append(Curve(column.label, column.style, losses, resumed))
    base = _base(columns, group, names[0], curves)
    return {
        "names": names,
        "title": title if len(names) == 1 else "one training, stopped in each of these ways",
        "picture": chart(curves, f"losses of {', '.join(names)}", reference=base, stops=stops),
        "reference": base.label if base else "",
        "legend": [
            (
                curve.label,
                curve.style,
                str(curve.apart() or "was not resumed"),
                "reference" if curve is base else _distance(curve, base),
            )
            for curve in curves
        ],
    }


def _base(
    columns: Sequence[_Column], group: _Group, name: str, curves: list[Curve]
) -> Curve | None:
    """Returns the curve that the others are measured against: the CPU's in fp32."""
    found = _reference(columns, columns[group[0][0]].run, name)
    if found is None:
        return None
    column, losses = found
    for (place, _, _), curve in zip(group, curves, strict=True):
        if columns[place] is column:
            return curve
    return Curve(column.label, "", losses)


def _distance(curve: Curve, base: Curve | None) -> str:
    found = deviation(curve.losses, base.losses) if base else None
    if base is None or found is None:
        return "no reference has run"
    words = str(found)
    if len(curve.losses) != len(base.losses):
        words += f"; {len(curve.losses)} iterations, not {len(base.losses)}"
    return words


def _counts(cells: Sequence[_CellView]) -> dict[str, int]:
    found = {status: sum(cell.status == status for cell in cells) for status in _SIGNS}
    return {status: count for status, count in found.items() if count}


def _facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table of machines."""
    names = dict.fromkeys(name for run in runs for name in run.machine)
    facts = [(name, [run.machine.get(name, "–") for run in runs]) for name in names]
    devices = [
        "\n".join(f"{spec}: {', '.join(found)}" for spec, found in run.devices.items() if found)
        for run in runs
    ]
    return [
        *facts,
        ("devices", devices),
        ("required", [", ".join(run.required) or "–" for run in runs]),
        ("started", [run.started for run in runs]),
        ("took", [duration(run.seconds) for run in runs]),
    ]


def _versions(runs: Sequence[Run]) -> Iterator[tuple[str, list[str], bool]]:
    """Yields the versions of all runs, and whether two of them have different ones."""
    # Python is a fact of the machine already.
    known = {name for run in runs for name in run.machine}
    for name in dict.fromkeys(name for run in runs for name in run.versions if name not in known):
        values = [run.versions.get(name, "–") for run in runs]
        yield name, values, len(set(values) - {"–"}) > 1


def _figure(value: Figure) -> str:
    """Returns a figure as people read it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
