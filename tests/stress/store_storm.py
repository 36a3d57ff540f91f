"""A storm of kills while checkpoints are on their way to an S3 server.

    python tests/stress/store_storm.py --kills 200

One process after the other trains, saves every second iteration, and is killed with SIGKILL while
a part of a checkpoint, or the request that completes it, is on its way. The next goes on. What was
said to be saved has to be there each time; the losses and the last weights have to be those of a
training that was left alone, to the bit; and no upload may be left at the end. Exit code 0 says so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from fork_server import ForkServer
from s3_server import Proxy, Request, make_bucket, reached, s3_server, uploads
from store_program import EPOCH, train

from crosstrain.engine import Checkpoint

# Iterations between two saves, and saves of a life at most.
_EVERY, _SAVES = 2, 3


@dataclass
class Storm:
    """What a storm has come to.

    Args:
        kills: how many there were.
        during: what was on its way, how often.
        lost: iterations that were trained again, in all.
        problems: what should not be.
    """

    kills: int = 0
    during: Counter[str] = field(default_factory=Counter[str])
    lost: int = 0
    problems: list[str] = field(default_factory=list[str])


class _Watch:
    """Says when the n-th checkpoint of a life is on its way, and slows it down."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.what = ""
        self.wanted = 0
        self._begun = 0

    def begin(self, wanted: int) -> None:
        self.arrived.clear()
        self.wanted, self._begun = wanted, 0

    def __call__(self, request: Request) -> None:
        if request.method == "POST" and "uploads" in request.path:
            self._begun += 1
        if self._begun >= self.wanted and (request.is_part or request.completes):
            self.what = "a part" if request.is_part else "the completing request"
            self.arrived.set()
            time.sleep(0.02)


def storm(kills: int, folder: Path, seed: int, tell: bool = False) -> Storm:
    """Kills a training again and again while it uploads.

    Args:
        kills: how often.
        folder: an empty one.
        seed: of the moments.
        tell: whether to print how far it is.
    """
    result, draw, watch = Storm(), random.Random(seed), _Watch()
    iterations = (kills * _EVERY * (_SAVES - 1) // EPOCH + 2) * EPOCH
    straight, stormy = folder / "straight", folder / "stormy"
    for place in (straight, stormy):
        place.mkdir(parents=True)
    with s3_server() as address, ForkServer("store_program", "torch._dynamo", "s3fs") as alone:
        make_bucket(address, "storm")
        assert alone.run(train, str(straight / "c"), str(straight), iterations, 10**6) == 0
        proxy = Proxy(address)
        proxy.disturb = watch
        with (
            reached(proxy.address),
            ForkServer("store_program", "torch._dynamo", "s3fs") as server,
        ):
            url = "s3://storm/run"
            for number in range(kills):
                _live(server, url, stormy, iterations, watch, draw, result)
                if tell:
                    print(f"\rkill {number + 1} of {kills}, saved {_saved(stormy)}", end="")
                    sys.stdout.flush()
            watch.begin(10**6)
            assert server.run(train, url, str(stormy), iterations, 10**6) == 0
        proxy.close()
        if left := uploads(address, "storm"):
            result.problems.append(f"{left} uploads are left")
    _compare(straight, stormy, result)
    return result


def _live(
    server: ForkServer,
    url: str,
    place: Path,
    iterations: int,
    watch: _Watch,
    draw: random.Random,
    result: Storm,
) -> None:
    watch.begin(draw.randint(1, _SAVES))
    pid = server.start(train, url, str(place), iterations, _EVERY)
    if not watch.arrived.wait(120):
        result.problems.append("a life has uploaded nothing within 120 s")
    time.sleep(draw.uniform(0.0, 0.4))
    os.kill(pid, signal.SIGKILL)
    if server.wait(pid) != -signal.SIGKILL:
        result.problems.append("a life has ended by itself")
    result.kills += 1
    result.during[watch.what] += 1
    found, told = Checkpoint.latest(url), _saved(place)
    if found.passed_over:
        result.problems.append(f"passed over after a kill: {found.describe()}")
    newest = 0 if found.manifest is None else found.manifest.iteration or 0
    if newest < told:
        result.problems.append(f"iteration {told} was said to be saved, and {newest} is there")


def _saved(place: Path) -> int:
    path = place / "saved"
    return int(path.read_text() or 0) if path.exists() else 0


def _compare(straight: Path, stormy: Path, result: Storm) -> None:
    expected = dict(line.split() for line in (straight / "losses").read_text().splitlines())
    lines = [line.split() for line in (stormy / "losses").read_text().splitlines()]
    result.lost = len(lines) - len(expected)
    if {number for number, _ in lines} != set(expected):
        result.problems.append("iterations are missing")
    wrong = [number for number, loss in lines if expected.get(number) != loss]
    if wrong:
        result.problems.append(f"the loss of iteration {wrong[0]} is another")
    if (straight / "end").read_text() != (stormy / "end").read_text():
        result.problems.append("the last weights are others")


def main() -> int:
    """Runs a storm and says how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = storm(args.kills, Path(folder), args.seed, tell=True)
    print(f"\n{result.kills} kills in {time.perf_counter() - began:.0f} s: {dict(result.during)}")
    print(f"{result.lost} iterations were trained again, {result.lost / result.kills:.1f} a kill.")
    for problem in result.problems:
        print(problem)
    if not result.problems:
        print("Nothing was lost but what was not complete; the last weights are the same bits.")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
