"""The report as one page of HTML that needs nothing else: no script, no file, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
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


@dataclass(frozen=True)
class _Column:
    """One backend of one run."""

    run: Run
    spec: str
    label: str
    style: str


@dataclass(frozen=True)
class _CellView:
    """What the page shows of one cell; the reference is the CPU's losses, if there are any."""

    key: str
    column: _Column
    title: str
    outcome: Outcome
    reference: Curve | None

    @property
    def sign(self) -> str:
        return MARKS[self.outcome.status][0]

    @property
    def broken(self) -> bool:
        return self.column.run.is_broken(self.outcome)

    @property
    def shown(self) -> str:
        """What was proven, or why nothing was: what stands under the status."""
        if self.outcome.status != "passed" or self.resumed is None:
            return self.headline
        places, apart = self.outcome.figures.get("resumed_from"), self.resumed.largest
        where = f", resumed after {places}" if places else ""
        same = f"{apart:.2g} apart" if apart else "the same losses"
        return f"{same} in {len(self.outcome.losses)} iterations{where}"

    @property
    def headline(self) -> str:
        return next((line for line in self.outcome.reason.splitlines() if line.strip()), "")

    @property
    def resumed(self) -> Deviation | None:
        return deviation(self.outcome.resumed_losses, self.outcome.losses)

    @property
    def deviation(self) -> Deviation | None:
        base = self.reference
        return None if base is None else deviation(self.outcome.losses, base.losses)

    @property
    def picture(self) -> Markup:
        """The losses, if those of the resumed run are others."""
        if self.resumed is None or not self.resumed.largest:
            return Markup("")
        one, column = self.outcome, self.column
        curve = Curve(column.label, column.style, one.losses, (one.resumed_losses,))
        title = f"losses of {one.scenario} on {column.label}, never stopped and resumed"
        return chart([curve], title, stops=_stops(one))


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
    rows = {
        (name, title): [_cell(columns, name, title, place) for place in range(len(columns))]
        for name, title in report.scenarios().items()
    }
    cells = [cell for views in rows.values() for cell in views]
    counted = Counter(cell.outcome.status for cell in cells)
    template = environment.from_string((here / "report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        report=report,
        columns=columns,
        rows=rows,
        cells=cells,
        broken=[cell for cell in cells if cell.broken and cell.outcome.status != "unavailable"],
        missing=[
            (
                column.label,
                next(one.reason for one in column.run.outcomes if one.spec == column.spec),
            )
            for column in columns
            if column.spec in column.run.missing()
        ],
        counts={status: counted[status] for status in MARKS if counted[status]},
        marks=MARKS,
        curves=list(_all_curves(rows.values())),
        absent=[
            (name, run.name, reason) for run in report.runs for name, reason in run.absent.items()
        ],
        facts=_facts(report.runs),
        versions=list(_versions(report.runs)),
        interrupted=any(run.interrupted for run in report.runs),
        incomplete=counted["not run"] > 0,
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
    return _CellView(
        key=f"cell-{scenario}-{place}",
        column=column,
        title=title,
        outcome=column.run.outcome(column.spec, scenario),
        reference=_reference(columns, column.run, scenario),
    )


def _reference(columns: Sequence[_Column], run: Run, scenario: str) -> Curve | None:
    """Returns the losses of the CPU in fp32: of this run, else of the first that has them."""
    for one in sorted(columns, key=lambda column: column.run is not run):
        losses = one.run.outcome(one.spec, scenario).losses
        if one.spec == _REFERENCE and losses:
            return Curve(one.label, "", losses)
    return None


def _stops(outcome: Outcome) -> list[int]:
    """Returns the iterations after which the run was stopped and went on."""
    places = str(outcome.figures.get("resumed_from", "")).split(",")
    return [int(place) for place in places if place.strip().isdecimal()]


def _all_curves(rows: Iterable[Sequence[_CellView]]) -> Iterator[dict[str, Any]]:
    """Yields a picture for each training; scenarios that stop the same one share it."""
    # By the losses of each column that ran it, and whether those of the resumed run are equal.
    groups: dict[Hashable, list[list[_CellView]]] = {}
    for views in rows:
        ran = [view for view in views if view.outcome.losses]
        told = [(view.column.label, view.outcome) for view in ran]
        key = tuple((name, one.losses, one.losses == one.resumed_losses) for name, one in told)
        if ran:
            groups.setdefault(key, []).append(ran)
    yield from map(_curves, groups.values())


def _curves(group: list[list[_CellView]]) -> dict[str, Any]:
    """Returns the picture of the scenarios that stop one training, each on the same columns."""
    curves: list[Curve] = []
    for views in zip(*group, strict=True):
        resumed = tuple(view.outcome.resumed_losses for view in views if view.resumed)
        column = views[0].column
        curves.append(Curve(column.label, column.style, views[0].outcome.losses, resumed))
    first = group[0][0]
    names = [views[0].outcome.scenario for views in group]
    # The curve itself where it is drawn: it is not measured against itself.
    base = first.reference
    base = next((one for one in curves if base and one.label == base.label), base)
    stops = [stop for views in group for view in views for stop in _stops(view.outcome)]
    return {
        "names": names,
        "title": first.title if len(names) == 1 else "one training, stopped in each of these ways",
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


def _distance(curve: Curve, base: Curve | None) -> str:
    found = deviation(curve.losses, base.losses) if base else None
    if base is None or found is None:
        return "no reference has run"
    words = str(found)
    if len(curve.losses) != len(base.losses):
        words += f"; {len(curve.losses)} iterations, not {len(base.losses)}"
    return words


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
