"""``crosstrain demo``: trains, kills the training, resumes it, and shows what differs, if any."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from crosstrain.backends import add_backend_argument, get
from crosstrain.ci.trials.course import Course, first_difference, losses_of
from crosstrain.ci.trials.order import OURS, Order
from crosstrain.ci.trials.processes import Kill, TrainingChild, TrainingFailed

from .options import UsageError, at_least, folder, require_demo

# Iterations between two checkpoints.
_EVERY = 10
# The digests of the last iteration, by what the table calls them.
_ENDS = ("weights", "optimizer", "random states")
# A narrower terminal has a list in place of the table, which would cut its words.
_TABLE = 80

_TITLE, _HEADS = "One training, two courses", ("straight through", "killed and resumed")
_SAME = {None: "", True: "[green]identical[/]", False: "[red]different[/]"}

_Row = tuple[str, list[str], bool | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the subcommand."""
    add_backend_argument(parser)
    parser.add_argument("--epochs", type=at_least(1), default=5, help="epochs (default: 5)")
    parser.add_argument(
        "--workers", type=at_least(0), default=2, help="worker processes of the loader (default: 2)"
    )
    parser.add_argument(
        "--out",
        type=folder,
        default=Path("crosstrain-demo"),
        help="folder for checkpoints and the picture (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0 if the killed and resumed run ended with the bits of the one that ran straight through, 1
        if not or if a training failed.
    """
    console = Console()
    require_demo("sklearn", "matplotlib")
    get(args.backend)
    folders = _fresh_folders(args.out)
    console.print(
        f"Training a small convolutional network on 1,437 real handwritten digits, on "
        f"[bold]{args.backend}[/], twice: straight through, and killed and resumed."
    )
    try:
        straight, killed, kill_at = _train_both(args, folders, console)
    except TrainingFailed as error:
        print(f"crosstrain demo: {error}", file=sys.stderr)
        return 1
    difference = first_difference(straight, killed)
    print_table(console, straight, killed, kill_at, difference)
    picture = _draw(args.out / "demo.png", straight, killed, kill_at)
    console.print(f"Loss curves and deviation: {picture}", soft_wrap=True)
    return 1 if difference else 0


def _fresh_folders(out: Path) -> tuple[Path, Path]:
    """Returns empty folders for the two runs, in place of those that an earlier demo left."""
    folders = (out / "straight", out / "killed")
    for place in folders:
        marker = place / ".crosstrain-demo"
        if marker.exists():
            shutil.rmtree(place)
        elif place.exists() and any(place.iterdir()):
            raise UsageError(
                f"{place} holds files that no demo wrote. Name another folder with --out."
            )
        place.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return folders


def _train_both(
    args: argparse.Namespace, folders: tuple[Path, Path], console: Console
) -> tuple[Course, Course, int]:
    """Returns what the two runs did, and after which iteration the second one was killed."""
    straight, killed = Course(), Course()
    options = {"epochs": args.epochs}
    order = Order(
        args.backend, f"{OURS}:digits", None, options, 2026, workers=args.workers, every=_EVERY
    )
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:

        def follow(place: Path, course: Course, bar: TaskID, kill: Kill | None = None) -> None:
            """Runs one process of a training, and takes in and shows what it says."""
            with TrainingChild(place / "stderr.txt", replace(order, folder=str(place))) as child:
                for line in child.train(course, kill):
                    if "iteration" in line:
                        loss = float.fromhex(line["loss"])
                        progress.update(bar, completed=line["iteration"], note=f"loss {loss:.3f}")

        bar = progress.add_task("straight through", total=None, note="importing torch")
        follow(folders[0], straight, bar)
        total = straight.total
        progress.update(bar, total=total)
        # In the middle of an epoch, and between two checkpoints.
        kill_at = total // args.epochs * (args.epochs // 2) + total // args.epochs // 2
        kill_at += kill_at % _EVERY == 0
        bar = progress.add_task("killed and resumed", total=total, note="")
        follow(folders[1], killed, bar, Kill(kill_at))
        progress.update(bar, note=f"SIGKILL after iteration {kill_at}; resuming")
        follow(folders[1], killed, bar)
        resumed = killed.resumed_from[-1]
        progress.update(bar, note=f"killed after {kill_at}, resumed from {resumed}")
    return straight, killed, kill_at


def print_table(
    console: Console, straight: Course, killed: Course, kill_at: int, difference: str
) -> None:
    """Prints the two runs side by side, whether they are the same bits, and a first difference."""
    rows = _rows(straight, killed, kill_at)
    if console.width < _TABLE:
        console.print(_TITLE, style="bold")
        for name, values, same in rows:
            console.print(f"{name}: {_SAME[same]}", highlight=False)
            for head, value in zip(_HEADS, values, strict=True):
                console.print(f"  {head:<18} {value}", highlight=False, soft_wrap=True)
    else:
        table = Table(title=_TITLE)
        table.add_column("", no_wrap=True)
        for head in _HEADS:
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("same bits?", justify="center", no_wrap=True)
        for name, values, same in rows:
            table.add_row(name, *values, _SAME[same])
        console.print(table)
    if difference:
        console.print(f"Not bit-identical. {difference}", style="bold red", markup=False)
    else:
        console.print("Bit-identical: batches, losses, weights, random states.", style="bold green")


def _rows(straight: Course, killed: Course, kill_at: int) -> list[_Row]:
    """Returns the name of each row, the values of both runs, and whether they have to be equal."""
    courses = (straight, killed)
    found: list[_Row] = [
        ("test accuracy", [f"{course.metrics['accuracy']:.2%}" for course in courses], None),
        ("iterations", [str(course.total) for course in courses], None),
        ("killed after iteration", ["-", str(kill_at)], None),
        ("resumed from iteration", ["-", str(killed.resumed_from[-1])], None),
        ("seconds", [f"{course.seconds:.1f}" for course in courses], None),
    ]
    for title, name in (("batches", "batch"), ("losses", "loss")):
        columns = [[row[name] for _, row in sorted(course.rows.items())] for course in courses]
        same = columns[0] == columns[1] and not killed.repeated
        found.append((title, [str(len(column)) for column in columns], same))
    for name in _ENDS:
        values = [str(course.rows[course.total][name]) for course in courses]
        found.append((name, values, values[0] == values[1]))
    return found


def _draw(path: Path, straight: Course, killed: Course, kill_at: int) -> Path:
    """Draws both loss curves and the deviation between them as a PNG; returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper, lower = axes
    x, y = sorted(straight.rows), losses_of(straight)
    u, v = sorted(killed.rows), losses_of(killed)
    upper.plot(x, y, color="#9ecae1", linewidth=4, label="straight through")
    upper.plot(u, v, color="#08519c", linewidth=1, label="killed and resumed")
    for axis in (upper, lower):
        axis.axvline(kill_at, color="#cb181d", linestyle="--", linewidth=1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    upper.annotate(
        f"SIGKILL after {kill_at},\nresumed from {killed.resumed_from[-1]}",
        (kill_at, max(y)),
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
