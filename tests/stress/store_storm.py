"""A storm of kills while checkpoints are on their way to an S3 server.

    python tests/stress/store_storm.py --kills 200 [--ranks 2]

One process after the other trains, saves every second iteration, and is killed with SIGKILL while
a part of a checkpoint, or the request that completes it, is on its way. The next goes on. What was
said to be saved has to be there each time; the losses and the last weights have to be those of a
training that was left alone, to the bit; and no upload may be left at the end. Exit code 0 says so.

With `--ranks` the model is sharded over so many processes, each of which uploads its part; one of
them is killed, or all at once, and those that are left have to end by themselves.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
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
from store_program import EPOCH, train, train_rank

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
    """Says when the n-th checkpoint of a life is on its way, and slows it down.

    Args:
        held: for how many seconds each of its requests is held up.
    """

    def __init__(self, held: float) -> None:
        self._held = held
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
            time.sleep(self._held)


@dataclass
class _World:
    """The processes of a life.

    Args:
        server: forks them off.
        ranks: how many there are; 0: one, whose model is not sharded.
        iterations: see `store_program`.
    """

    server: ForkServer
    ranks: int
    iterations: int

    def start(self, url: str, place: Path, every: int) -> list[int]:
        """Starts the processes of a life; returns their ids."""
        order = (url, str(place), self.iterations, every)
        if not self.ranks:
            return [self.server.start(train, *order)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [
            self.server.start(train_rank, *order, rank, self.ranks, port)
            for rank in range(self.ranks)
        ]

    def run(self, url: str, place: Path) -> None:
        """Starts them, with checkpoints at the end only, and waits."""
        codes = [self.server.wait(pid) for pid in self.start(url, place, 10**6)]
        assert not any(codes), codes


def storm(kills: int, folder: Path, seed: int, ranks: int = 0, tell: bool = False) -> Storm:
    """Kills a training again and again while it uploads.

    Args:
        kills: how often.
        folder: an empty one.
        seed: of the moments.
        ranks: over how many processes the model is sharded; 0: it is not.
        tell: whether to print how far it is.
    """
    result, draw, watch = Storm(), random.Random(seed), _Watch(0.15 if ranks else 0.02)
    iterations = (kills * _EVERY * (_SAVES - 1) // EPOCH + 2) * EPOCH
    straight, stormy = folder / "straight", folder / "stormy"
    for place in (straight, stormy):
        place.mkdir(parents=True)
    with s3_server() as address:
        make_bucket(address, "storm")
        proxy = Proxy(address)
        proxy.disturb = watch
        with (
            reached(proxy.address),
            ForkServer("store_program", "torch._dynamo", "s3fs") as server,
        ):
            url = "s3://storm/run"
            world = _World(server, ranks, iterations)
            world.run(str(straight / "c"), straight)
            for number in range(kills):
                _live(world, url, stormy, watch, draw, result)
                if tell:
                    print(f"\rkill {number + 1} of {kills}, saved {_saved(stormy)}", end="")
                    sys.stdout.flush()
            watch.begin(10**6)
            world.run(url, stormy)
        proxy.close()
        if left := uploads(address, "storm"):
            result.problems.append(f"{left} uploads are left")
    _compare(straight, stormy, result)
    return result


def _live(
    world: _World,
    url: str,
    place: Path,
    watch: _Watch,
    draw: random.Random,
    result: Storm,
) -> None:
    # Each rank has an upload in parts of its own.
    watch.begin(draw.randint(1, _SAVES * max(world.ranks, 1)))
    pids = world.start(url, place, _EVERY)
    if not watch.arrived.wait(120):
        result.problems.append("a life has uploaded nothing within 120 s")
    time.sleep(draw.uniform(0.0, 0.4))
    during = watch.what
    killed = [draw.choice(pids)] if draw.random() < 0.5 else pids
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        code = world.server.wait(pid)
        if (code != -signal.SIGKILL) if pid in killed else code in (0, -signal.SIGKILL):
            result.problems.append(f"a life has ended with {code}")
    result.kills += 1
    result.during[f"{during}, {len(killed)} of {len(pids)}" if world.ranks else during] += 1
    found, told = Checkpoint.latest(url), _saved(place)
    if found.passed_over:
        result.problems.append(f"passed over after a kill: {found.describe()}")
    newest = 0 if found.manifest is None else found.manifest.iteration or 0
    if newest < told:
        result.problems.append(f"iteration {told} was said to be saved, and {newest} is there")


def _saved(place: Path) -> int:
    return max((int(path.read_text() or 0) for path in place.glob("saved*")), default=0)


def _compare(straight: Path, stormy: Path, result: Storm) -> None:
    for path in straight.glob("losses*"):
        _compare_process(straight, stormy, path.name.removeprefix("losses"), result)


def _compare_process(straight: Path, stormy: Path, own: str, result: Storm) -> None:
    losses = f"losses{own}"
    expected = dict(line.split() for line in (straight / losses).read_text().splitlines())
    lines = [line.split() for line in (stormy / losses).read_text().splitlines()]
    result.lost = max(result.lost, len(lines) - len(expected))
    if {number for number, _ in lines} != set(expected):
        result.problems.append("iterations are missing")
    wrong = [number for number, loss in lines if expected.get(number) != loss]
    if wrong:
        result.problems.append(f"the loss of iteration {wrong[0]} is another")
    if (straight / f"end{own}").read_text() != (stormy / f"end{own}").read_text():
        result.problems.append("the last weights are others")


def main() -> int:
    """Runs a storm and says how it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=0, help="processes of a sharded model")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = storm(args.kills, Path(folder), args.seed, args.ranks, tell=True)
    print(f"\n{result.kills} kills in {time.perf_counter() - began:.0f} s: {dict(result.during)}")
    print(f"{result.lost} iterations were trained again, {result.lost / result.kills:.1f} a kill.")
    for problem in result.problems:
        print(problem)
    if not result.problems:
        print("Nothing was lost but what was not complete; the last weights are the same bits.")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
