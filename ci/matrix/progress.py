"""What the terminal shows while the matrix runs: a live table, or a line for each cell."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .outcome import Cell, Outcome, Status
from .report import Run

# A sign, a colour and a word for each status: no one of them is needed to tell them apart.
MARKS: Mapping[Status, tuple[str, str]] = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "error": ("!", "bold red"),
    "timeout": ("∞", "bold red"),
    "unavailable": ("∅", "yellow"),
    "skipped": ("–", "dim"),
    "not run": ("·", "dim"),
}


def duration(seconds: float) -> str:
    """Returns a duration as people read it, such as `4.2 s` or `3:07`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_on(
    console: Console, specs: Sequence[str], scenarios: Sequence[str], known: Sequence[Outcome]
) -> PlainProgress:
    """Returns the progress that suits a console: live on a terminal, plain lines elsewhere."""
    kind = LiveProgress if console.is_terminal and not console.is_dumb_terminal else PlainProgress
    progress = kind(console, specs, scenarios)
    for outcome in known:
        progress.note(outcome)
    return progress


class PlainProgress:
    """Prints a line for each cell that ends. A context manager."""

    def __init__(self, console: Console, specs: Sequence[str], scenarios: Sequence[str]) -> None:
        self._console = console
        self._specs = specs
        self._scenarios = scenarios
        self._began = time.monotonic()
        self._running: dict[Cell, float] = {}
        self._ended: dict[Cell, Outcome] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def started(self, cell: Cell) -> None:
        """Notes that a cell was started."""
        self._running[cell] = time.monotonic()

    def ended(self, outcome: Outcome) -> None:
        """Prints what became of a cell, with its reason."""
        self.note(outcome)
        total = len(self._specs) * len(self._scenarios)
        sign, style = MARKS[outcome.status]
        line = Text(f"[{len(self._ended):>{len(str(total))}}/{total}] ")
        line.append(f"{sign} {outcome.status:<11}", style)
        width = max(map(len, self._specs))
        line.append(f" {outcome.spec:<{width}} {outcome.scenario:<14}")
        line.append(f" {duration(outcome.seconds):>8}")
        if outcome.reason:
            line.append(f"  {outcome.reason}", "dim" if outcome.status == "skipped" else "")
        # Logs are searched by line: they are not wrapped.
        self._console.print(line, soft_wrap=True)

    def note(self, outcome: Outcome) -> None:
        """Counts a cell as ended and prints nothing."""
        self._ended[outcome.cell] = outcome
        self._running.pop(outcome.cell, None)


class LiveProgress(PlainProgress):
    """Shows the matrix as it fills, and above it the reason of each cell that did not pass."""

    def __init__(self, console: Console, specs: Sequence[str], scenarios: Sequence[str]) -> None:
        super().__init__(console, specs, scenarios)
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def ended(self, outcome: Outcome) -> None:
        """Prints the reason of a cell that did not pass above the table."""
        self.note(outcome)
        if outcome.status in ("passed", "skipped"):
            return
        sign, style = MARKS[outcome.status]
        head = Text(f"{sign} {outcome.scenario} on {outcome.spec}: {outcome.status}", style)
        self._console.print(head, Text(outcome.reason), sep="\n")

    def _render(self) -> Group:
        now = time.monotonic()

        def shown(spec: str, scenario: str) -> Text:
            cell = Cell(spec, scenario)
            outcome, since = self._ended.get(cell), self._running.get(cell)
            if outcome is not None:
                sign, style = MARKS[outcome.status]
                return Text(f"{sign} {duration(outcome.seconds)}", style)
            return (
                Text(*MARKS["not run"]) if since is None else Text(f"▸ {now - since:.0f} s", "cyan")
            )

        table = Table(box=None, pad_edge=False)
        _fill(table, self._specs, self._scenarios, shown)
        return Group(table, self._line(now))

    def _line(self, now: float) -> Text:
        total = len(self._specs) * len(self._scenarios)
        line = Text(f"{len(self._ended)}/{total} cells", "bold")
        line.append(f" · {duration(now - self._began)} elapsed · {len(self._running)} running", "")
        counts = Counter(one.status for one in self._ended.values())
        for status, (_, style) in MARKS.items():
            if counts[status]:
                line.append(f" · {counts[status]} {status}", style)
        return line


def _fill(
    table: Table, specs: Sequence[str], scenarios: Sequence[str], shown: Callable[[str, str], Text]
) -> None:
    """Fills in a column for each spec, and a row for each scenario."""
    table.add_column("scenario", no_wrap=True)
    for spec in specs:
        table.add_column(escape(spec), justify="center", overflow="fold")
    for scenario in scenarios:
        table.add_row(scenario, *(shown(spec, scenario) for spec in specs))


def print_summary(console: Console, run: Run) -> None:
    """Prints the matrix of a run and how many cells became what."""

    def shown(spec: str, scenario: str) -> Text:
        status = run.outcome(spec, scenario).status
        sign, style = MARKS[status]
        return Text(f"{sign} {status}", style)

    table = Table(title=f"{run.name}, {duration(run.seconds)}", title_justify="left")
    _fill(table, run.backends, list(run.scenarios), shown)
    console.print(table)
    counts = Counter(run.outcome(*cell).status for cell in product(run.backends, run.scenarios))
    words = [f"{counts[status]} {status}" for status in MARKS if counts[status]]
    console.print(", ".join(words) or "nothing ran")
