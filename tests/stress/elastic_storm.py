"""Kills a training in logical shards, and goes on with another number of processes, many times.

Run ``python tests/stress/elastic_storm.py --kills 50``. Each training is killed at random
iterations until it is through, each time with a random number of processes, and has to end with the
bits of the same training in one process that nobody stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from crosstrain.ci.trials.processes import torchrun

SUPPORT = Path(__file__).resolve().parents[1] / "support"
# What is trained: see KINDS there. Each has 16 iterations.
KINDS = ("images", "overflows", "words", "eight", "own")
ITERATIONS = 16


def start(size: int, folder: Path, kind: str, *more: str) -> subprocess.CompletedProcess[str]:
    program = str(SUPPORT / "elastic_program.py")
    return subprocess.run(
        [sys.executable, *torchrun(size), program, str(folder), kind, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def results(folder: Path, size: int, kind: str) -> list[dict[str, Any]]:
    files = [folder / f"{rank}-of-{size}.json" for rank in range(size)]
    return [json.loads(file.read_text())[kind] for file in files]


def storm(
    kind: str, pick: random.Random, left: int, straight: dict[str, Any]
) -> tuple[int, list[int]]:
    """Trains to the end through kills; returns their number, and how many processes there were."""
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    done, sizes = 0, list[int]()
    kills = sorted(pick.sample(range(1, ITERATIONS), min(left, pick.randrange(3, 7))))
    for kill_after in [*kills, 0]:
        size = pick.choice([w for w in (1, 2, 4) if not sizes or w != sizes[-1]])
        sizes.append(size)
        told = ("--save", "--kill-after", str(kill_after)) if kill_after else ("--save",)
        found = start(size, folder, kind, *told)
        if kill_after:
            done += 1
            if found.returncode == 0:
                raise SystemExit(f"{kind}: the kill after {kill_after} did not happen: {sizes}")
        elif found.returncode:
            raise SystemExit(f"{kind}: {sizes} failed: {found.stdout}{found.stderr}")
    for rank, one in enumerate(results(folder, sizes[-1], kind)):
        count = len(one["losses"])
        if one["digest"] != straight["digest"] or one["losses"] != straight["losses"][-count:]:
            raise SystemExit(f"{kind}: rank {rank} differs after kills at {kills} with {sizes}")
    shutil.rmtree(folder)
    return done, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pick, done, began = random.Random(args.seed), 0, time.perf_counter()
    straight: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in KINDS:
            found = start(1, folder, kind)
            if found.returncode:
                raise SystemExit(found.stderr)
            straight[kind] = results(folder, 1, kind)[0]
    number = 0
    while done < args.kills:
        kind = KINDS[number % len(KINDS)]
        number += 1
        kills, sizes = storm(kind, pick, args.kills - done, straight[kind])
        done += kills
        print(f"{kind}: {kills} kills, processes {sizes}: identical", flush=True)
    took = time.perf_counter() - began
    print(f"{done} kills in {number} trainings: all identical to one process ({took:.0f} s)")


if __name__ == "__main__":
    main()
