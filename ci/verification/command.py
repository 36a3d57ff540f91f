"""The options of ``crosstrain verify``, and how its verdict is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from crosstrain.backends import add_backend_argument
from crosstrain.ci.options import above_zero, at_least, file_to_write, folder

from .run import RunResult, Verdict, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain verify``."""
    parser.add_argument(
        "target",
        help="your training: PACKAGE.MODULE:FUNCTION or FILE.py:FUNCTION, a function of a spec "
        "that returns crosstrain.ci.Training",
    )
    add_backend_argument(parser)
    _add_course(parser)
    parser.add_argument(
        "--time-limit",
        type=above_zero,
        default=900.0,
        metavar="SECONDS",
        help="for all of it (default: %(default)g)",
    )
    parser.add_argument(
        "--keep",
        type=folder,
        metavar="DIR",
        help="leave traces and checkpoints in this empty folder",
    )
    parser.add_argument(
        "--json", type=file_to_write, metavar="PATH", help="write the verdict to this file"
    )


def _add_course(parser: argparse.ArgumentParser) -> None:
    """Declares where the training is stopped and killed, and by what it goes on."""
    parser.add_argument(
        "--nproc-per-node",
        type=_numbers(1),
        default=[1],
        metavar="N,N,...",
        help="train in N processes, which torchrun starts on this machine: all are stopped "
        "together, one at random is killed, and the traces of all are compared; several numbers: "
        "each resumed start takes the next, for a training in logical shards (default: 1)",
    )
    parser.add_argument(
        "--at",
        type=_numbers(1),
        metavar="K,K,...",
        help="stop after these iterations and resume in a fresh process with another seed "
        "(default: in the middle of an epoch, and at the end of one)",
    )
    parser.add_argument(
        "--kills",
        type=at_least(0),
        default=2,
        metavar="N",
        help="kill a run N times with SIGKILL at random moments (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=_numbers(0),
        default=[0],
        metavar="N,N,...",
        help="worker processes of the loader: the first for the straight run, and on in turn with "
        "each resumed process (default: 0)",
    )
    parser.add_argument(
        "--every",
        type=at_least(1),
        metavar="N",
        help="iterations between two checkpoints of the killed run",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the straight run and the kills (default: 0)"
    )


def _numbers(least: int) -> Callable[[str], list[int]]:
    """Returns the type of a list of whole numbers of at least so much."""
    number = at_least(least)

    def numbers(text: str) -> list[int]:
        try:
            return [number(word) for word in text.split(",")]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}; write a list such as 3,10,20") from None

    return numbers


def run(args: argparse.Namespace) -> int:
    """Verify the training and print what was found.

    Returns:
        0 if it resumes exactly, 1 if it does not.
    """
    console = Console(highlight=False)
    # Before torch is imported, which takes a while.
    console.print(
        f"Verifying {args.target} on {args.backend}, each run in fresh processes.",
        markup=False,
        soft_wrap=True,
    )
    with _progress(console) as progress:
        verdict = verify(
            args.target,
            args.backend,
            nproc_per_node=args.nproc_per_node,
            at=args.at,
            kills=args.kills,
            workers=args.workers,
            seed=args.seed,
            every=args.every,
            time_limit=args.time_limit,
            folder=args.keep,
            progress=progress,
        )
    if args.json is not None:
        args.json.write_text(json.dumps(verdict.as_json(), indent=1) + "\n")
    print_verdict(console, verdict)
    return 0 if verdict.exact else 1


@contextmanager
def _progress(console: Console) -> Generator[Callable[[str, int, int], None]]:
    """Shows each run while it goes on: a bar on a terminal, a line when it begins elsewhere."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=console, transient=True) as display:

        def show(name: str, iteration: int, total: int) -> None:
            if name not in bars:
                for task in bars.values():
                    display.stop_task(task)
                title = f"run {len(bars) + 1}: {name}"
                bars[name] = display.add_task(title, total=total or None)
                if not console.is_terminal:
                    console.print(title)
            display.update(bars[name], completed=iteration)

        yield show


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print a table of the runs, and what was found with its usual causes."""
    count = verdict.nproc_per_node
    shown = ", ".join(map(str, count)) if isinstance(count, tuple) else str(count)
    many = f" in {shown} processes" if count != 1 else ""
    table = Table(
        title=f"{verdict.target} on {verdict.backend}{many}, {verdict.iterations} iterations"
    )
    for title in ("run", "resumed from", "workers", "seconds", "same bits as the straight run?"):
        table.add_column(title)
    for result in verdict.runs:
        table.add_row(
            f"{result.name}{_short(result)}",
            ", ".join(map(str, result.resumed_from)) or "-",
            ", ".join(map(str, dict.fromkeys(result.workers))),
            f"{result.seconds:.1f}",
            _said(result),
        )
    console.print(table)
    for warning in verdict.warnings:
        console.print(f"Warned of: {warning}", style="yellow", markup=False)
    if verdict.exact:
        console.print(f"It resumes exactly ({verdict.seconds:.0f} s).", style="bold green")
        return
    _explain(console, verdict)


def _short(result: RunResult) -> str:
    asked = result.name.split()[1] if result.name.startswith("killed") else ""
    short = asked.isdigit() and int(asked) != result.killed
    return f" (ended after {result.killed})" if short else ""


def _said(result: RunResult) -> str:
    if result.difference is not None:
        return f"[red]{escape(str(result.difference))}[/]"
    if result.problem:
        return "[red]ended with an error[/]"
    # It has the same bits, as two straight runs have.
    return "[green]identical[/]" if result.resumed else "[yellow]never resumed before its end[/]"


def _explain(console: Console, verdict: Verdict) -> None:
    if verdict.status == "not repeatable":
        console.print(
            "It does not repeat: two runs that nobody interrupted, with the same seed, differ.",
            style="bold red",
        )
    else:
        console.print("It does not resume exactly.", style="bold red")
    difference = verdict.difference
    if difference is None:
        console.print(verdict.problem, markup=False)
        return
    console.print(f"First difference: {difference}.", markup=False)
    if difference.left is not None and difference.right is not None:
        console.print(
            f"  {difference.left!r} in the straight run, {difference.right!r} in the other"
        )
    console.print("What usually causes it:")
    for cause in verdict.causes:
        console.print(f"- {cause}", markup=False)
    if verdict.problem:
        console.print(f"The run also ended with an error: {verdict.problem}", markup=False)
