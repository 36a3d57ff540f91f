"""A storm of kills over one run: `python tests/stress/storm.py --kills 100`.

The demo's training is killed with SIGKILL at random moments, again and again, while it starts,
trains and saves, until it has been killed as often as was asked for; then it may end. Its batches,
losses, weights and random states are compared with those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from crosstrain.backends import BackendError, add_backend_argument, get
from crosstrain.ci.demo.command import Course, DemoFailed, compare, launch

__all__ = ["main", "storm"]

_EVERY = 2
# Iterations of an epoch, and how many of them a life makes between two kills on average.
_EPOCH, _LIFE = 30, 6


def storm(backend: str, kills: int, workers: int, folder: Path, seed: int) -> list[str]:
    """Runs a training straight through, and once more under kills.

    Args:
        backend: a spec.
        kills: how often the second run is killed.
        workers: worker processes of the loader, in every second life; none in the others.
        folder: where both keep their checkpoints; an empty one.
        seed: of the moments of the kills.

    Returns:
        What differs, as sentences; empty where no bit does.

    Raises:
        DemoFailed: if a training fails, or ends before it has been killed often enough.
    """
    epochs = kills * _LIFE // _EPOCH + 2
    for name in ("straight", "stormy"):
        (folder / name).mkdir(parents=True)
    straight, stormy = Course(), Course()
    _live(straight, launch(backend, epochs, 0, 1000, folder / "straight"), None, 0.0)
    moments = random.Random(seed)
    for kill in range(kills):
        process = launch(backend, epochs, workers * (kill % 2), _EVERY, folder / "stormy")
        # One in ten while it starts; the others some iterations on, anywhere within one.
        starting = moments.random() < 0.1
        after = 0 if starting else moments.randint(1, 2 * _LIFE - 1)
        delay = moments.uniform(0, 3) if starting else moments.uniform(0, 0.03)
        done = _live(stormy, process, after, delay)
        if done:
            raise DemoFailed(f"The training ended after {kill} kills of {kills}.")
        print(f"\rkill {kill + 1} of {kills}, iteration {max(stormy.lines, default=0)}", end="")
        sys.stdout.flush()
    print()
    _live(stormy, launch(backend, epochs, 0, _EVERY, folder / "stormy"), None, 0.0)
    return compare(straight, stormy)


def _live(
    course: Course, started: tuple[subprocess.Popen[str], Path], after: int | None, delay: float
) -> bool:
    """Follows one process to its end, and kills it some iterations on; tells if it ended itself."""
    process, errors = started
    assert process.stdout is not None
    killer = threading.Timer(delay, _kill, (process.pid,))
    if after == 0:
        killer.start()
    seen = 0
    for text in process.stdout:
        if not text.endswith("\n"):
            break  # cut off by the kill
        line = json.loads(text)
        course.take(line)
        seen += "iteration" in line
        if after and seen == after:
            killer.start()
            after = None
        elif after == 0 and seen == 2 * _LIFE:
            # It started faster than was thought, and would train to its end.
            _kill(process.pid)
    process.wait()
    killer.cancel()
    if process.returncode not in (0, -signal.SIGKILL):
        raise DemoFailed(f"A training ended with {process.returncode}:\n{errors.read_text()}")
    return process.returncode == 0


def _kill(group: int) -> None:
    # It may have ended by itself meanwhile.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main() -> int:
    """Runs a storm and says how it ended: exit code 0 if no bit differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_backend_argument(parser)
    parser.add_argument("--kills", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        get(args.backend)
        with tempfile.TemporaryDirectory() as folder:
            differences = storm(args.backend, args.kills, args.workers, Path(folder), args.seed)
    except (BackendError, DemoFailed) as error:
        print(f"storm: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    if differences:
        print(f"Not bit-identical after {args.kills} kills: {'; '.join(differences)}.")
        return 1
    print(f"Bit-identical after {args.kills} kills, in {seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
