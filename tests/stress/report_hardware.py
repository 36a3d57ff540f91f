"""The page of a machine under docs/hardware/: Markdown of what `ci/gpu_report.sh` left there."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crosstrain.ci.matrix.outcome import InvalidReport
from crosstrain.ci.matrix.progress import MARKS, duration
from crosstrain.ci.matrix.report import FILE_NAME, Report, Run

__all__ = ["PARTS", "fails_for_apex_alone", "main", "markdown"]

PARTS = ("tests", "matrix", "benchmarks")


class _Result(NamedTuple):
    """How a part ended: its exit code, how long it took in seconds, and when that was."""

    code: int
    seconds: int
    ended: str


def markdown(folder: Path) -> str:
    """Returns the page.

    Args:
        folder: what `ci/gpu_report.sh` wrote; parts that have not run may be missing.
    """
    return "\n".join(
        [
            f"# {folder.name}",
            "",
            "Written by `ci/gpu_report.sh`; do not edit it.",
            "",
            *_parts(folder),
            *_environment(folder),
            *_matrix(folder),
            *_text(folder / "benchmarks.txt", "Benchmarks"),
            *_summary(folder / "tests.txt"),
        ]
    )


def fails_for_apex_alone(folder: Path) -> bool:
    """Tells whether a matrix fails because of the missing apex and for no other reason.

    Args:
        folder: what `ci/gpu_report.sh` wrote.
    """
    run = _run(folder)
    if run is None or run.interrupted:
        return False
    broken = [outcome for outcome in run.outcomes if run.is_broken(outcome)]
    return bool(broken) and all(
        one.status == "unavailable" and one.spec.partition(":")[0] == "apex" for one in broken
    )


def _result(folder: Path, part: str) -> _Result | None:
    try:
        code, seconds, ended = (folder / f"{part}.result").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return None
    return _Result(int(code), int(seconds), ended)


def _run(folder: Path) -> Run | None:
    try:
        return Report.read(folder / "matrix").runs[0]
    except (InvalidReport, IndexError):
        return None


def _parts(folder: Path) -> Iterator[str]:
    yield from ("| part | result | took | ended |", "|---|---|---|---|")
    for part in PARTS:
        found = _result(folder, part)
        if found is None:
            begun = (folder / f"{part}.txt").exists()
            yield f"| {part} | {'was cut off' if begun else 'has not run'} | | |"
        else:
            verdict = "passed" if found.code == 0 else f"failed with exit code {found.code}"
            yield f"| {part} | {verdict} | {duration(found.seconds)} | {found.ended} |"
    yield ""
    missing = _content(folder / "apex.txt").strip()
    if missing:
        yield from ("apex is missing, and its part with it:", "", *_fenced(missing), "")


def _environment(folder: Path) -> Iterator[str]:
    yield from ("## Machine", "")
    yield from (*_fenced(_content(folder / "device.txt").strip() or "unknown"), "")
    try:
        found: dict[str, Any] = json.loads(_content(folder / "environment.json"))
    except ValueError:
        return
    rows: dict[str, str] = {name: str(found[name]) for name in ("python", "platform")}
    rows["crosstrain"] = str(found["crosstrain"])
    backends: Any = found["backends"]
    for backend in backends:
        rows.update({str(name): str(number) for name, number in backend["versions"].items()})
    run = _run(folder)
    if run is not None:
        rows |= {**run.machine, **run.versions}
    yield from ("| | |", "|---|---|")
    yield from (f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows.items())
    yield ""


def _matrix(folder: Path) -> Iterator[str]:
    run = _run(folder)
    yield from ("## Matrix", "")
    if run is None:
        printed = _content(folder / "matrix.txt").splitlines()
        cells = [line for line in printed if re.match(r"\[ *\d+/\d+\]", line)]
        if cells:
            yield from ("It was cut off, and left no page. What it had printed:", "")
            yield from (*_fenced("\n".join(cells)), "")
        else:
            yield from (f"There is no matrix/{FILE_NAME}: it has not run, or not to its end.", "")
        return
    page, data = (f"{folder.name}/matrix/{name}" for name in ("index.html", FILE_NAME))
    yield f"[The page]({page}) has figures and curves, [this file]({data}) the data."
    yield from (
        "",
        f"| scenario | {' | '.join(run.backends)} |",
        f"|---|{'---|' * len(run.backends)}",
    )
    for scenario in run.scenarios:
        cells: list[str] = []
        for spec in run.backends:
            outcome = run.outcome(spec, scenario)
            cells.append(f"{MARKS[outcome.status][0]} {outcome.status}")
        yield f"| {scenario} | {' | '.join(cells)} |"
    yield ""
    for outcome in run.outcomes:
        if run.is_broken(outcome) and outcome.status != "unavailable":
            yield f"{outcome.scenario} on {outcome.spec}, {outcome.status}:"
            yield from ("", *_fenced(outcome.reason), "")


def _summary(file: Path) -> Iterator[str]:
    """The last lines of pytest's output: why something failed or was skipped, and the counts."""
    lines = _content(file).splitlines()
    starts = [number for number, line in enumerate(lines) if "short test summary" in line]
    first = starts[-1] if starts else max(0, len(lines) - 3)
    yield from ("## Tests", "")
    yield from _fenced("\n".join(lines[first:]) or "They have not run.")


def _text(file: Path, title: str) -> Iterator[str]:
    yield from (f"## {title}", "")
    yield from (*_fenced(_content(file).strip() or "They have not run."), "")


def _content(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _fenced(text: str) -> list[str]:
    # Longer than any fence in the text.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}text", *text.splitlines(), fence]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the page of a folder, or tell whether its matrix fails for apex alone.

    Args:
        arguments: the arguments; those of the process by default.

    Returns:
        0; with `--fails-for-apex-alone` 1 if it does not.
    """
    parser = argparse.ArgumentParser(prog="python tests/stress/report_hardware.py")
    parser.add_argument("folder", type=Path, help="what ci/gpu_report.sh wrote")
    parser.add_argument(
        "--fails-for-apex-alone", action="store_true", help="print nothing; exit with 1 if not"
    )
    args = parser.parse_args(arguments)
    folder = args.folder.resolve()
    if args.fails_for_apex_alone:
        return 0 if fails_for_apex_alone(folder) else 1
    print(markdown(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
