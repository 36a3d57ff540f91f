"""The report as one page of HTML that needs nothing else: no script, no file, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

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
        places = self.outcome.figures.get("resumed_from")
        where = f", resumed after {places}" if places else ""
        same = (
            "the same losses" if not self.resumed.largest else f"{self.resumed.largest:.2g} apart"
        )
        return f"{same} in {len(self.outcome.losses)} iterations{where}"

    @property
    def headline(self) -> str:
        return next((line for line in self.reason.splitlines() if line.strip()), "")


@dataclass(frozen=True)
class _Missing:
    """A required backend that could not run."""

    label: str
    reason: str


@dataclass(frozen=True)
class _Legend:
    label: str
    style: str
    resumed: str
    reference: str


@dataclass(frozen=True)
class _Curves:
    """The picture of one training, which one scenario or several stopped, and its legend."""

    names: list[str]
    title: str
    picture: Markup
    reference: str
    legend: list[_Legend]


@dataclass(frozen=True)
class _Fact:
    """A row of the table of machines."""

    name: str
    values: list[str]
    differs: bool = field(default=False)


def page(report: Report) -> str:
    """Returns the page.

    Args:
        report: what ran.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    environment.filters["figure"] = _figure
    here = files("crosstrain.ci.matrix")
    columns = _columns(report)
    rows = [
        (name, title, [_cell(report, column, name, title, place) for place, column in cells])
        for name, title in report.scenarios().items()
        for cells in [list(enumerate(columns))]
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
        missing=_missing(columns),
        counts=_counts(cells),
        signs=_SIGNS,
        curves=list(_all_curves(report, columns)),
        absent=[
            (name, run.name, reason) for run in report.runs for name, reason in run.absent.items()
        ],
        facts=_facts(report.runs),
        versions=_versions(report.runs),
        interrupted=any(run.interrupted for run in report.runs),
        incomplete=any(cell.status == _NOT_RUN for cell in cells),
    )


def _columns(report: Report) -> list[_Column]:
    several = len(report.runs) > 1
    columns: list[_Column] = []
    for run in report.runs:
        for spec in run.backends:
            place = len(columns)
            style = f"c{place % _COLOURS} d{place // _COLOURS % _DASHES}"
            label = f"{spec} · {run.name}" if several else spec
            columns.append(_Column(run, spec, label, style))
    return columns


def _missing(columns: Sequence[_Column]) -> list[_Missing]:
    found: list[_Missing] = []
    for column in columns:
        absent = [one for one in column.run.outcomes if one.spec == column.spec]
        if column.spec in column.run.missing():
            found.append(_Missing(column.label, absent[0].reason))
    return found


def _cell(report: Report, column: _Column, scenario: str, title: str, place: int) -> _CellView:
    outcome = column.run.outcome(column.spec, scenario)
    reference = _reference(report, column.run, scenario)
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


def _reference(report: Report, run: Run, scenario: str) -> tuple[Run, tuple[float, ...]] | None:
    """Returns the losses of the CPU in fp32: of this run, else of the first that has them."""
    for one in (run, *report.runs):
        outcome = one.outcome(_REFERENCE, scenario)
        if outcome is not None and outcome.losses:
            return one, outcome.losses
    return None


def _stops(outcome: Outcome) -> list[int]:
    """Returns the iterations after which the run was stopped and went on."""
    places = str(outcome.figures.get("resumed_from", "")).split(",")
    return [int(place) for place in places if place.strip().isdecimal()]


# A training: of each column that ran it the place, the losses, and whether resumed ones were equal.
_Group = tuple[tuple[int, tuple[float, ...], bool], ...]


def _all_curves(report: Report, columns: Sequence[_Column]) -> Iterator[_Curves]:
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
        yield _curves(report, columns, group, [name for name, _ in scenarios], scenarios[0][1])


def _curves(
    report: Report, columns: Sequence[_Column], group: _Group, names: list[str], title: str
) -> _Curves:
    curves: list[Curve] = []
    stops: list[int] = []
    for place, losses, _ in group:
        column = columns[place]
        outcomes = [outcome for name in names if (outcome := column.run.outcome(column.spec, name))]
        stops += [stop for outcome in outcomes for stop in _stops(outcome)]
        resumed = tuple(one.resumed_losses for one in outcomes if one.resumed_losses)
        curves.append(Curve(column.label, column.style, losses, resumed))
    base = _base(report, columns, group, names[0], curves)
    return _Curves(
        names=names,
        title=title if len(names) == 1 else "one training, stopped in each of these ways",
        picture=chart(curves, f"losses of {', '.join(names)}", reference=base, stops=stops),
        reference=base.label if base else "",
        legend=[_legend(curve, base) for curve in curves],
    )


def _base(
    report: Report,
    columns: Sequence[_Column],
    group: _Group,
    scenario: str,
    curves: Sequence[Curve],
) -> Curve | None:
    """Returns the curve that the others are measured against: the CPU's in fp32."""
    found = _reference(report, columns[group[0][0]].run, scenario)
    if found is None:
        return None
    run, losses = found
    for (place, _, _), curve in zip(group, curves, strict=True):
        if columns[place].run is run and columns[place].spec == _REFERENCE:
            return curve
    label = next(c.label for c in columns if c.run is run and c.spec == _REFERENCE)
    return Curve(label, "", losses)


def _legend(curve: Curve, base: Curve | None) -> _Legend:
    apart = curve.apart()
    return _Legend(
        curve.label,
        curve.style,
        "was not resumed" if apart is None else str(apart),
        "reference" if curve is base else _distance(curve, base),
    )


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


def _facts(runs: Sequence[Run]) -> list[_Fact]:
    names = dict.fromkeys(name for run in runs for name in run.machine)
    facts = [_Fact(name, [run.machine.get(name, "–") for run in runs]) for name in names]
    devices = [
        "\n".join(f"{spec}: {', '.join(found)}" for spec, found in run.devices.items() if found)
        for run in runs
    ]
    return [
        *facts,
        _Fact("devices", devices),
        _Fact("required", [", ".join(run.required) or "–" for run in runs]),
        _Fact("started", [run.started for run in runs]),
        _Fact("took", [duration(run.seconds) for run in runs]),
    ]


def _versions(runs: Sequence[Run]) -> list[_Fact]:
    """The versions of all runs; where two of them have different ones, that is said."""
    facts: list[_Fact] = []
    # Python is a fact of the machine already.
    known = {name for run in runs for name in run.machine}
    for name in dict.fromkeys(name for run in runs for name in run.versions if name not in known):
        values = [run.versions.get(name, "–") for run in runs]
        facts.append(_Fact(name, values, len(set(values) - {"–"}) > 1))
    return facts


def _figure(value: Figure) -> str:
    """Returns a figure as people read it."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return str(value)
