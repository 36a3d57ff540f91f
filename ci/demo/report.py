"""What the demo shows: a table in the terminal and a picture of both loss curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from crosstrain.ci.trials.course import Course, losses_of

_Row = tuple[str, list[str], bool | None]

# The digests of the last iteration, by what the table calls them.
_ENDS = ("weights", "optimizer", "random states")
# A narrower terminal has a list in place of the table, which would cut its words.
_TABLE = 80


@dataclass
class DemoRun:
    """What one of the two runs did, over all its processes, whose start counts in the seconds."""

    course: Course = field(default_factory=Course)
    killed_at: int | None = None
    seconds: float = 0.0


def print_table(console: Console, straight: DemoRun, killed: DemoRun, difference: str) -> None:
    """Prints the two runs side by side, whether they are the same bits, and a first difference."""
    rows = _rows(straight, killed)
    title, heads = "One training, two courses", ("straight through", "killed and resumed")
    if console.width < _TABLE:
        console.print(title, style="bold")
        for name, values, same in rows:
            console.print(f"{name}: {_verdict(same)}", highlight=False)
            for head, value in zip(heads, values, strict=True):
                console.print(f"  {head:<18} {value}", highlight=False, soft_wrap=True)
    else:
        _print_wide(console, title, heads, rows)
    if difference:
        console.print(f"Not bit-identical. {difference}", style="bold red", markup=False)
    else:
        console.print("Bit-identical: batches, losses, weights, random states.", style="bold green")


def _print_wide(console: Console, title: str, heads: tuple[str, str], rows: list[_Row]) -> None:
    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("same bits?", justify="center", no_wrap=True)
    for name, values, same in rows:
        table.add_row(name, *values, _verdict(same))
    console.print(table)


def _verdict(same: bool | None) -> str:
    return "" if same is None else ("[green]identical[/]" if same else "[red]different[/]")


def _rows(straight: DemoRun, killed: DemoRun) -> list[_Row]:
    """Returns the name of each row, the values of both runs, and whether they have to be equal."""
    runs = (straight, killed)
    courses = [run.course for run in runs]
    found: list[_Row] = [
        ("test accuracy", [f"{course.metrics['accuracy']:.2%}" for course in courses], None),
        ("iterations", [str(course.total) for course in courses], None),
        ("killed after iteration", ["-", str(killed.killed_at)], None),
        ("resumed from iteration", ["-", str(killed.course.resumed_from[-1])], None),
        ("seconds", [f"{run.seconds:.1f}" for run in runs], None),
    ]
    for title, name in (("batches", "batch"), ("losses", "loss")):
        columns = [[row[name] for _, row in sorted(course.rows.items())] for course in courses]
        same = columns[0] == columns[1] and not killed.course.repeated
        found.append((title, [str(len(column)) for column in columns], same))
    for name in _ENDS:
        values = [str(course.rows[course.total][name]) for course in courses]
        found.append((name, values, values[0] == values[1]))
    return found


def draw(path: Path, straight: DemoRun, killed: DemoRun) -> Path:
    """Draws both loss curves and the deviation between them as a PNG; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def losses(run: DemoRun) -> tuple[list[int], list[float]]:
        return sorted(run.course.rows), list(losses_of(run.course))

    figure: Any = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper, lower = axes
    x, y = losses(straight)
    u, v = losses(killed)
    upper.plot(x, y, color="#9ecae1", linewidth=4, label="straight through")
    upper.plot(u, v, color="#08519c", linewidth=1, label="killed and resumed")
    for axis in (upper, lower):
        axis.axvline(killed.killed_at, color="#cb181d", linestyle="--", linewidth=1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    upper.annotate(
        f"SIGKILL after {killed.killed_at},\nresumed from {killed.course.resumed_from[-1]}",
        (killed.killed_at, max(y)),
        xytext=(6, -24),
        textcoords="offset points",
        color="#cb181d",
        fontsize=9,
    )
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    deviation = [abs(b - a) for a, b in zip(y, v, strict=False)]
    lower.plot(x[: len(deviation)], deviation, color="#cb181d", linewidth=1.5)
    lower.set_ylabel("deviation")
    lower.set_xlabel("iteration")
    if not any(deviation):
        lower.set_ylim(-1, 1)
        lower.text(0.99, 0.7, "0 at every iteration", transform=lower.transAxes, ha="right")
    figure.savefig(path, dpi=140)
    return path
