"""`crosstrain demo`: trains, kills the training, resumes it, and shows whether anything differs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crosstrain.backends import add_backend_argument, get

__all__ = ["Course", "DemoFailed", "add_arguments", "compare", "launch", "run"]

_EVERY = 10


class DemoFailed(Exception):
    """A training of the demo ended with an error; its message is the training's own."""


@dataclass
class Course:
    """What a run did, over all its processes.

    Args:
        lines: by iteration, what the training printed of it; of the last process that did it.
        result: what the training printed at its end.
        killed_at: the iteration after which the process was killed.
        seconds: how long it took, starting of processes included.
        repeated: iterations that two processes did with different batches or losses.
    """

    lines: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    killed_at: int | None = None
    seconds: float = 0.0
    repeated: list[int] = field(default_factory=list[int])

    def take(self, line: dict[str, Any]) -> None:
        """Keeps a line of the training's output."""
        if "iteration" in line:
            before = self.lines.get(line["iteration"])
            if before is not None and before != line:
                self.repeated.append(line["iteration"])
            self.lines[line["iteration"]] = line
        elif "result" in line:
            self.result = line["result"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of the subcommand."""
    add_backend_argument(parser)
    parser.add_argument("--epochs", type=_positive, default=5, help="epochs (default: 5)")
    parser.add_argument(
        "--workers", type=int, default=2, help="worker processes of the loader (default: 2)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("crosstrain-demo"),
        help="folder for checkpoints and the picture (default: %(default)s)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Runs the demo.

    Returns:
        0 if the killed and resumed run ended with the bits of the one that ran straight through, 1
        if not or if a training failed.

    Raises:
        BackendError: if the backend is unknown or cannot run here.
    """
    from rich.console import Console

    console = Console()
    missing = [name for name in ("sklearn", "matplotlib") if not importlib.util.find_spec(name)]
    if missing:
        console.print(
            f"The demo needs {' and '.join(missing)}: pip install 'crosstrain\\[demo]'", style="red"
        )
        return 2
    get(args.backend)
    folders = _fresh_folders(args.out)
    console.print(
        f"Training a small convolutional network on 1,437 real handwritten digits, on "
        f"[bold]{args.backend}[/], twice: straight through, and killed and resumed."
    )
    try:
        straight, killed = _train_both(args, folders, console)
    except DemoFailed as error:
        console.print(str(error), style="red", markup=False)
        return 1
    from .report import draw, print_table

    differences = compare(straight, killed)
    print_table(console, straight, killed, differences)
    picture = draw(args.out / "demo.png", straight, killed)
    console.print(f"Loss curves and deviation: {picture}")
    return 1 if differences else 0


def _fresh_folders(out: Path) -> tuple[Path, Path]:
    """Returns empty folders for the two runs, in place of those that an earlier demo left."""
    folders = (out / "straight", out / "killed")
    for folder in folders:
        marker = folder / ".crosstrain-demo"
        if marker.exists():
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise SystemExit(
                f"crosstrain demo: {folder} holds files that no demo wrote. Name another folder "
                "with --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return folders


def _train_both(
    args: argparse.Namespace, folders: tuple[Path, Path], console: Any
) -> tuple[Course, Course]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    straight, killed = Course(), Course()
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("straight through", total=None, note="")
        _follow(args, folders[0], straight, _shown(progress, bar), None)
        total = len(straight.lines)
        # In the middle of an epoch, and between two checkpoints.
        kill_at = total // args.epochs * (args.epochs // 2) + total // args.epochs // 2
        kill_at += kill_at % _EVERY == 0
        bar = progress.add_task("killed and resumed", total=total, note="")
        _follow(args, folders[1], killed, _shown(progress, bar), kill_at)
        progress.update(bar, note=f"SIGKILL after iteration {killed.killed_at}; resuming")
        _follow(args, folders[1], killed, _shown(progress, bar), None)
        resumed = killed.result["resumed_from"]
        progress.update(bar, note=f"killed after {killed.killed_at}, resumed from {resumed}")
    return straight, killed


def _shown(progress: Any, bar: Any) -> Callable[[dict[str, Any]], None]:
    def show(line: dict[str, Any]) -> None:
        if "total" in line:
            progress.update(bar, total=line["total"], completed=line["resumed_from"] or 0)
        elif "iteration" in line:
            loss = float.fromhex(line["loss"])
            progress.update(bar, completed=line["iteration"], note=f"loss {loss:.3f}")

    return show


def launch(
    backend: str, epochs: int, workers: int, every: int, folder: Path
) -> tuple[subprocess.Popen[str], Path]:
    """Starts a process of the demo's training.

    Args:
        backend: a spec.
        epochs: how many epochs in all.
        workers: worker processes of the loader.
        every: iterations between two checkpoints.
        folder: where the training keeps its checkpoints.

    Returns:
        The process, whose stdout is a line of JSON for each iteration, and the file of its stderr.
    """
    command = [sys.executable, "-m", "crosstrain.ci.demo.training", "--backend", backend]
    command += ["--epochs", str(epochs), "--workers", str(workers)]
    command += ["--every", str(every), "--folder", str(folder)]
    errors = folder / "stderr.txt"
    with errors.open("w") as stderr:
        # A group of its own: the kill takes the loader's workers along, as a scheduler's does.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
    return process, errors


def _follow(
    args: argparse.Namespace,
    folder: Path,
    course: Course,
    show: Callable[[dict[str, Any]], None],
    kill_at: int | None,
) -> None:
    """Runs one process of a training, reads what it prints, and kills it where it shall be.

    Raises:
        DemoFailed: if the process ends otherwise than it should.
    """
    started = time.perf_counter()
    process, errors = launch(args.backend, args.epochs, args.workers, _EVERY, folder)
    try:
        assert process.stdout is not None
        for text in process.stdout:
            line = json.loads(text)
            course.take(line)
            show(line)
            if kill_at is not None and line.get("iteration", 0) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                course.killed_at = line["iteration"]
                break
    finally:
        if sys.exc_info()[0] is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        course.seconds += time.perf_counter() - started
    if kill_at is None and process.returncode != 0:
        raise DemoFailed(
            f"The training ended with exit code {process.returncode}:\n{errors.read_text()}"
        )


def compare(straight: Course, killed: Course) -> list[str]:
    """Returns what differs between two runs, each as a sentence; nothing where no bit does."""
    found: list[str] = []
    for name in ("batch", "loss"):
        apart = [
            iteration
            for iteration, line in straight.lines.items()
            if killed.lines.get(iteration, {}).get(name) != line[name]
        ]
        if apart:
            found.append(f"{name} differs first at iteration {min(apart)}")
    if killed.repeated:
        found.append(f"iteration {min(killed.repeated)} was repeated otherwise after the kill")
    for name, value in straight.result["digests"].items():
        if killed.result["digests"][name] != value:
            found.append(f"{name} differ at the end")
    return found
