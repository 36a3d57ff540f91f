"""What the demo shows: a table in the terminal and a picture of both loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .command import Course

__all__ = ["draw", "print_table"]


def print_table(console: Console, straight: Course, killed: Course, differences: list[str]) -> None:
    """Prints the two runs side by side, and whether batches, losses and weights are the same bits.

    Args:
        console: where to.
        straight: the run straight through.
        killed: the run that was killed and resumed.
        differences: what differs, as sentences.
    """
    from rich.table import Table

    table = Table(title="One training, two courses")
    table.add_column("")
    table.add_column("straight through", justify="right")
    table.add_column("killed and resumed", justify="right")
    table.add_column("same bits?", justify="center")

    def row(name: str, values: list[str], same: bool | None = None) -> None:
        verdict = "" if same is None else ("[green]identical[/]" if same else "[red]different[/]")
        table.add_row(name, *values, verdict)

    runs = (straight, killed)
    row("test accuracy", [f"{run.result['accuracy']:.2%}" for run in runs])
    row("iterations", [str(run.result["iterations"]) for run in runs])
    row("killed after iteration", ["-", str(killed.killed_at)])
    row("resumed from iteration", ["-", str(killed.result["resumed_from"])])
    row("seconds", [f"{run.seconds:.1f}" for run in runs])
    for title, name in (("batches", "batch"), ("losses", "loss")):
        columns = [[line[name] for _, line in sorted(run.lines.items())] for run in runs]
        same = columns[0] == columns[1] and not killed.repeated
        row(title, [str(len(column)) for column in columns], same)
    for name in straight.result["digests"]:
        values = [str(run.result["digests"][name]) for run in runs]
        row(name, values, values[0] == values[1])
    console.print(table)
    if differences:
        console.print(f"Not bit-identical: {'; '.join(differences)}.", style="bold red")
    else:
        console.print("Bit-identical: batches, losses, weights, random states.", style="bold green")


def draw(path: Path, straight: Course, killed: Course) -> Path:
    """Draws both loss curves and the deviation between them.

    Args:
        path: the picture to write, a PNG.
        straight: the run straight through.
        killed: the run that was killed and resumed.

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def losses(run: Course) -> tuple[list[int], list[float]]:
        iterations = sorted(run.lines)
        return iterations, [float.fromhex(run.lines[k]["loss"]) for k in iterations]

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
        f"SIGKILL after {killed.killed_at},\nresumed from {killed.result['resumed_from']}",
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
