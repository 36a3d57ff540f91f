"""The options of ``crosstrain matrix``, and how its parts are put together."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from rich.console import Console

from crosstrain.backends import Availability
from crosstrain.ci.options import UsageError, above_zero, add_words, at_least, folder, require_demo
from crosstrain.ci.trials.scenarios import SCENARIOS
from crosstrain.ci.trials.target import Target

from .outcome import Cell, Outcome
from .progress import print_summary, progress_on
from .report import Report, Run, merged
from .report_html import page
from .report_junit import junit
from .run_all import CellPlan, run_cells
from .selection import Selection, chosen_scenarios, exclusive_specs, selected

# Exit codes; after a signal it is that of a shell for a process that a signal ended.
OK, BROKEN = 0, 1

_TIMEOUT = 600.0
_MOST_JOBS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain matrix``."""
    _add_what(parser.add_argument_group("what to run"))
    _add_how(parser.add_argument_group("how"))
    _add_reports(parser.add_argument_group("reports"))


def _add_what(what: argparse._ArgumentGroup) -> None:
    columns = "the columns, such as cpu,cpu:bf16 (default: all that can run here)"
    required = "columns that make the matrix fail where they cannot run"
    add_words(what, "--backends", "SPEC", columns)
    add_words(what, "--require", "SPEC", required)
    add_words(what, "--scenarios", "NAME", "the rows (default: all)")
    what.add_argument(
        "--target",
        metavar="MODULE:FUNCTION",
        help="your own training in place of the scenarios' (see docs/matrix.md)",
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--jobs",
        metavar="N",
        type=at_least(1),
        help=f"cells at a time (default: one for two cores, at most {_MOST_JOBS})",
    )
    how.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=above_zero,
        default=_TIMEOUT,
        help="how long a cell may take (default: %(default)g)",
    )


def _add_reports(reports: argparse._ArgumentGroup) -> None:
    reports.add_argument(
        "--report",
        metavar="DIR",
        type=folder,
        help="write index.html, matrix.json, junit.xml and the logs of cells that did not pass",
    )
    reports.add_argument(
        "--name",
        metavar="NAME",
        help="what this machine is called in the report (default: its host name)",
    )
    reports.add_argument(
        "--merge",
        metavar="REPORT",
        type=Path,
        nargs="+",
        help="run nothing; put these reports, folders or matrix.json files, into one in --report",
    )


def run(args: argparse.Namespace) -> int:
    """Run the matrix, or merge reports.

    Returns:
        0 if every cell passed or was skipped; 1 if one did not, or a required backend is missing;
        130 after Ctrl-C and 143 after SIGTERM, with the report of what had ended until then.
    """
    if args.merge:
        return _merge(args)
    if args.target is None:
        # The scenarios' own trainings are on its digits.
        require_demo("sklearn")
    else:
        Target.parse(args.target)
    return _run(args, Console(highlight=False))


def _run(args: argparse.Namespace, console: Console) -> int:
    scenarios = chosen_scenarios(args.scenarios)
    selection = selected(args.backends, args.require)
    for spec in selection.backends:
        # At once and not after an hour: what is missing makes this run fail in any case.
        if not selection.found[spec].ok:
            console.print(
                f"{spec} is required and missing: {_why(selection.found[spec])}", markup=False
            )
    titles = {name: SCENARIOS[name].title for name in scenarios}
    with contextlib.ExitStack() as stack:
        place = args.report or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = _plan(args, selection, scenarios, place.resolve())
        began, started = time.monotonic(), datetime.datetime.now(datetime.UTC)
        outcomes, stopped_by = _outcomes(plan, selection, list(titles), console)
        result = Run(
            name=args.name or platform.node() or "this machine",
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 3),
            interrupted=stopped_by is not None,
            target=args.target,
            backends=selection.backends,
            required=selection.required,
            scenarios=titles,
            machine={
                "host": platform.node(),
                "platform": platform.platform(),
                "processor": _processor(),
                "cores": str(_cores()),
                "python": platform.python_version(),
            },
            versions=_versions(selection, outcomes),
            devices={spec: tuple(found.devices) for spec, found in selection.found.items()},
            outcomes=tuple(outcomes),
            absent={name: _why(found) for name, found in selection.absent.items()},
        )
        report = Report((result,))
        print_summary(console, result)
        if args.report:
            written = write_reports(report, args.report)
            console.print(f"report: {written}", markup=False, soft_wrap=True)
    if stopped_by is not None:
        return 128 + stopped_by
    return BROKEN if report.broken() else OK


def _plan(
    args: argparse.Namespace, selection: Selection, scenarios: Sequence[str], place: Path
) -> CellPlan:
    return CellPlan(
        # Scenario by scenario, so that a broken one shows before all of a backend has run.
        cells=tuple(
            Cell(spec, scenario)
            for scenario in scenarios
            for spec in selection.backends
            if selection.found[spec].ok
        ),
        folder=place,
        timeout=args.timeout,
        jobs=args.jobs or max(1, min(_MOST_JOBS, _cores() // 2)),
        exclusive=exclusive_specs(selection.backends),
        target=args.target,
    )


def _why(found: Availability) -> str:
    return " ".join(f"{found.reason} {found.remedy}".split())


def _outcomes(
    plan: CellPlan, selection: Selection, scenarios: Sequence[str], console: Console
) -> tuple[list[Outcome], signal.Signals | None]:
    """Runs the cells; gives the outcomes, and the signal that stopped it, if one did."""
    outcomes = [
        Outcome(spec=spec, scenario=scenario, status="unavailable", reason=_why(found))
        for scenario in scenarios
        for spec, found in selection.found.items()
        if not found.ok
    ]
    # SIGTERM, which CI sends when a job is cancelled, ends the cells in order, as Ctrl-C does.
    stopped_by = signal.SIGINT

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = signal.SIGTERM
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with (
            progress_on(console, selection.backends, scenarios, outcomes) as progress,
            contextlib.closing(run_cells(plan, progress)) as results,
        ):
            for outcome in results:
                outcomes.append(outcome)
    except KeyboardInterrupt:
        return outcomes, stopped_by
    finally:
        signal.signal(signal.SIGTERM, before)
    return outcomes, None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    """The name of the CPU's model, which decides the bits of its arithmetic."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _versions(selection: Selection, outcomes: Sequence[Outcome]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("crosstrain", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    reported: list[Mapping[str, str]] = [one.versions for one in selection.found.values()]
    for versions in [*reported, *(outcome.versions for outcome in outcomes)]:
        found.update(versions)
    return found


def _merge(args: argparse.Namespace) -> int:
    if not args.report:
        raise UsageError("--merge needs --report DIR, where the one report is written.")
    if args.backends or args.scenarios or args.target or args.name:
        raise UsageError(
            "--merge runs nothing: --backends, --scenarios, --target and --name do not go with it."
        )
    report = merged(Report.read(path) for path in args.merge)
    written = write_reports(report, args.report)
    broken = report.broken()
    for one, outcome in broken:
        name = f"{one.name}: {outcome.scenario} on {outcome.spec}: {outcome.status}"
        print(f"{name}: {outcome.reason}")
    idle = ("unavailable", "skipped")
    ran = {one.spec for run in report.runs for one in run.outcomes if one.status not in idle}
    missing = [spec for spec in args.require if spec not in ran]
    for spec in missing:
        print(f"required, but it ran on no machine: {spec}", file=sys.stderr)
    interrupted = [one.name for one in report.runs if one.interrupted]
    if interrupted:
        print(f"interrupted, so not every cell has run: {', '.join(interrupted)}", file=sys.stderr)
    cells = sum(len(one.outcomes) for one in report.runs)
    print(f"{len(report.runs)} runs, {cells} cells, {len(broken)} broken; report: {written}")
    return BROKEN if broken or missing or interrupted else OK


def write_reports(report: Report, folder: Path) -> Path:
    """Write a report in its three forms."""
    report.write(folder)
    (folder / "junit.xml").write_bytes(junit(report))
    target = folder / "index.html"
    # A reason may hold what a process printed, which need not be text.
    target.write_text(page(report), encoding="utf-8", errors="replace")
    return target
