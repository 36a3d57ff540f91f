"""A storm of kills over one run: `python tests/stress/storm.py --kills 100`.

The demo's training is killed with SIGKILL at random moments, again and again, while it starts,
trains and saves, until it has been killed as often as was asked for; then it may end. Its batches,
losses, weights and random states are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from crosstrain.backends import BackendError, add_backend_argument, get
from crosstrain.ci.trials.course import Course, first_difference
from crosstrain.ci.trials.order import OURS, Order
from crosstrain.ci.trials.processes import TrainingChild, TrainingFailed

__all__ = ["main", "storm"]

_EVERY = 2
# Iterations of an epoch, and how many of them a life makes between two kills on average.
_EPOCH, _CHILD = 30, 6


def storm(backend: str, kills: int, workers: int, folder: Path, seed: int, scheme: str = "") -> str:
    """Runs a training straight through, and once more under kills.

    Args:
        backend: a spec.
        kills: how often the second run is killed.
        workers: worker processes of the loader, in every second life; none in the others.
        folder: where both keep their checkpoints; an empty one.
        seed: of the moments of the kills.
        scheme: `file://`: the second one keeps its checkpoints in the folder as in a store.

    Returns:
        The first thing that differs, as a sentence; empty where no bit does.

    Raises:
        TrainingFailed: if a training fails, or ends before it has been killed often enough.
    """
    options = {"epochs": kills * _CHILD // _EPOCH + 2}
    for name in ("straight", "stormy"):
        (folder / name).mkdir(parents=True)
    straight, stormy = Course(), Course()
    order = Order(backend, f"{OURS}:digits", str(folder / "straight"), options, seed=2026)
    log = folder / "stderr.txt"
    _live(straight, order, log, None, 0.0)
    order = replace(order, folder=f"{scheme}{folder}/stormy", every=_EVERY)
    moments = random.Random(seed)
    for kill in range(kills):
        # One in ten while it starts; the others some iterations on, anywhere within one.
        starting = moments.random() < 0.1
        after = 0 if starting else moments.randint(1, 2 * _CHILD - 1)
        delay = moments.uniform(0, 3) if starting else moments.uniform(0, 0.03)
        done = _live(stormy, replace(order, workers=workers * (kill % 2)), log, after, delay)
        if done:
            raise TrainingFailed(f"The training ended after {kill} kills of {kills}.")
        print(f"\rkill {kill + 1} of {kills}, iteration {stormy.total}", end="")
        sys.stdout.flush()
    print()
    _live(stormy, order, log, None, 0.0)
    return first_difference(straight, stormy)


def _live(course: Course, order: Order, log: Path, after: int | None, delay: float) -> bool:
    """Follows one process to its end, and kills it some iterations on; tells if it ended itself."""
    with TrainingChild(log, order) as life:
        if after == 0:
            life.kill_after(delay)
        seen = 0
        for line in life.train(course):
            seen += "iteration" in line
            if after and seen == after:
                life.kill_after(delay)
                after = None
            elif after == 0 and seen == 2 * _CHILD:
                # It started faster than was thought, and would train to its end.
                life.kill()
        return not life.killed


def main() -> int:
    """Runs a storm and says how it ended: exit code 0 if no bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_backend_argument(parser)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--scheme", default="", choices=["", "file://"], help="a store's, or none")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        get(args.backend)
        with tempfile.TemporaryDirectory() as folder:
            given = (args.backend, args.kills, args.workers, Path(folder), args.seed)
            difference = storm(*given, args.scheme)
    except (BackendError, TrainingFailed) as error:
        print(f"storm: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    if difference:
        print(f"Not bit-identical after {args.kills} kills. {difference}")
        return 1
    print(f"Bit-identical after {args.kills} kills, in {seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
