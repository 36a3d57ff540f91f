"""`crosstrain demo`: trains, kills the training, resumes it, and shows whether anything differs."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crosstrain.backends import add_backend_argument, get
from crosstrain.ci.options import UsageError, at_least, folder, require_demo
from crosstrain.ci.trials.course import first_difference
from crosstrain.ci.trials.order import Order
from crosstrain.ci.trials.processes import Kill, Life, TrainingFailed

from .report import DemoRun, draw, print_table

_EVERY = 10


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
        straight, killed = _train_both(args, folders, console)
    except TrainingFailed as error:
        print(f"crosstrain demo: {error}", file=sys.stderr)
        return 1
    difference = first_difference(straight.course, killed.course)
    print_table(console, straight, killed, difference)
    picture = draw(args.out / "demo.png", straight, killed)
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
) -> tuple[DemoRun, DemoRun]:
    straight, killed = DemoRun(), DemoRun()
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("straight through", total=None, note="importing torch")
        _follow(args, folders[0], straight, _shown(progress, bar), None)
        total = straight.course.total
        progress.update(bar, total=total)
        # In the middle of an epoch, and between two checkpoints.
        kill_at = total // args.epochs * (args.epochs // 2) + total // args.epochs // 2
        kill_at += kill_at % _EVERY == 0
        bar = progress.add_task("killed and resumed", total=total, note="")
        _follow(args, folders[1], killed, _shown(progress, bar), kill_at)
        progress.update(bar, note=f"SIGKILL after iteration {killed.killed_at}; resuming")
        _follow(args, folders[1], killed, _shown(progress, bar), None)
        resumed = killed.course.resumed_from[-1]
        progress.update(bar, note=f"killed after {killed.killed_at}, resumed from {resumed}")
    return straight, killed


def _shown(progress: Any, bar: Any) -> Callable[[dict[str, Any]], None]:
    def show(line: dict[str, Any]) -> None:
        if "iteration" in line:
            loss = float.fromhex(line["loss"])
            progress.update(bar, completed=line["iteration"], note=f"loss {loss:.3f}")

    return show


def _follow(
    args: argparse.Namespace,
    place: Path,
    run: DemoRun,
    show: Callable[[dict[str, Any]], None],
    kill_at: int | None,
) -> None:
    """Runs one process of a training, takes in what it says, and kills it where it shall be."""
    started = time.perf_counter()
    order = Order(
        args.backend,
        str(place),
        "digits",
        {"epochs": args.epochs},
        seed=2026,
        workers=args.workers,
        every=_EVERY,
    )
    with Life(place / "stderr.txt", order) as life:
        if kill_at is not None:
            run.killed_at = kill_at
            life.kill_when(Kill(kill_at))
        for line in life.train():
            run.course.take(line)
            show(line)
    run.seconds += time.perf_counter() - started
