"""Storms over the ranks of a world: `python tests/stress/rank_storm.py --kills 50 --signals 100`.

Kills: one rank of a training under torchrun kills itself with SIGKILL at a random moment, and
torchrun starts all anew, as often as was asked for; each rank's losses and end are compared with
those of a training that nobody killed. Signals: many short trainings; in each SIGTERM arrives at
one rank, and all must save the same iteration and exit with 143.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from crosstrain.backends import add_backend_argument
from crosstrain.ci.trials.processes import Child, ending, torchrun

__all__ = ["kill_storm", "losses_of", "main", "signal_storm"]

_LIFE, _EPOCH = 6, 25


def _launch(folder: Path, backend: str, size: int, restarts: int, *arguments: object) -> str:
    """Runs the training under torchrun to its end; returns what it printed.

    Raises:
        RuntimeError: if it fails, or takes longer than an hour.
    """
    folder.mkdir(parents=True)
    command = torchrun(size, "--max-restarts", restarts)
    command += [str(Path(__file__).with_name("rank_training.py")), "--backend", backend]
    command += ["--folder", str(folder), *map(str, arguments)]
    child = Child(command, variables={"OMP_NUM_THREADS": "1"})
    try:
        text = child.text(timeout=3600)
    finally:
        code = child.end()
    if code:
        raise RuntimeError(f"torchrun ended with {ending(code)}:\n{text[-6000:]}")
    return text


def _read(folder: Path, size: int) -> list[Any]:
    return [json.loads((folder / f"end-{rank}.json").read_text()) for rank in range(size)]


def losses_of(folder: Path, rank: int) -> dict[int, set[float]]:
    """Returns all losses that a rank's lives told of each iteration."""
    found: dict[int, set[float]] = {}
    for text in (folder / f"rank-{rank}").read_text().splitlines():
        try:
            iteration, loss = json.loads(text)
        except (ValueError, TypeError):
            continue  # cut off by a kill, with what the next life wrote behind it
        found.setdefault(iteration, set()).add(loss)
    return found


def kill_storm(backend: str, kills: int, size: int, folder: Path, seed: int) -> list[str]:
    """Trains straight through, and once more under kills; returns what differs, as sentences.

    Args:
        backend: a spec.
        kills: how often a rank is killed.
        size: how many processes.
        folder: an empty one, for both.
        seed: of ranks and moments.

    Raises:
        RuntimeError: if a training does not come to its end.
    """
    iterations = (kills * _LIFE // _EPOCH + 2) * _EPOCH
    common = ("--iterations", iterations, "--seed", seed)
    _launch(folder / "straight", backend, size, 0, *common)
    _launch(folder / "stormy", backend, size, kills, *common, "--kills", kills)
    wrong: list[str] = []
    for rank, (one, other) in enumerate(
        zip(_read(folder / "straight", size), _read(folder / "stormy", size), strict=True)
    ):
        wrong += [f"rank {rank}: {name}" for name in one if one[name] != other[name]]
        straight, stormy = losses_of(folder / "straight", rank), losses_of(folder / "stormy", rank)
        parted = [i for i, losses in stormy.items() if losses != straight[i]]
        if parted:
            wrong.append(f"rank {rank}: the loss of iteration {min(parted)}")
        if set(straight) != set(stormy):
            wrong.append(f"rank {rank}: which iterations were trained")
    return wrong


def signal_storm(
    backend: str, signals: int, size: int, folder: Path, seed: int
) -> tuple[list[str], list[float]]:
    """Lets SIGTERM arrive at one rank of many short trainings.

    Args:
        backend: a spec.
        signals: how many trainings.
        size: how many processes.
        folder: an empty one.
        seed: of ranks and moments.

    Returns:
        What was wrong, as sentences; and the seconds from each signal to the end of the run.

    Raises:
        RuntimeError: if the world does not come to its end.
    """
    _launch(folder, backend, size, 0, "--stops", signals, "--seed", seed)
    ranks = _read(folder, size)
    wrong: list[str] = []
    for number, runs in enumerate(zip(*ranks, strict=True)):
        codes, ends, saved = ({run[part] for run in runs} for part in range(3))
        if codes != {143} or len(ends) != 1 or saved != ends:
            wrong.append(f"run {number}: exit codes {codes}, ended at {ends}, saved at {saved}")
    return wrong, [run[3] for run in ranks[0]]


def main() -> int:
    """Runs the storms and says how they ended: exit code 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_backend_argument(parser)
    parser.add_argument("--kills", type=int, default=0, help="kills of a rank")
    parser.add_argument("--signals", type=int, default=0, help="trainings that get a SIGTERM")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of ranks and moments")
    args = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        if args.signals:
            begun = time.monotonic()
            found, waits = signal_storm(
                args.backend, args.signals, args.processes, Path(place) / "signals", args.seed
            )
            wrong += found
            print(
                f"{args.signals} signals in {time.monotonic() - begun:.0f} s; from the signal to "
                f"the end of the run at most {max(waits):.2f} s."
            )
        if args.kills:
            begun = time.monotonic()
            wrong += kill_storm(
                args.backend, args.kills, args.processes, Path(place) / "kills", args.seed
            )
            print(f"{args.kills} kills in {time.monotonic() - begun:.0f} s.")
    print("\n".join(wrong) or "Bit-identical; each stop saved at one iteration.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
