"""Time and memory to the first batch of a run resumed at half of an epoch, beside peers.

    python benchmarks/resume_seek.py [--sizes 100000 1000000 10000000]

Each figure is taken in a process of its own: the median time of some rounds from loading the state
to the first batch (batch size 32, shuffled, no workers, a dataset that gives its index), and that
process's peak memory. Peers resume as their documents say. `fresh` is torch's DataLoader at an
epoch's start: what every run pays that does not resume. Peers that are missing are said to be so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

BATCH = 32
# Sizes that a permutation in memory is too much for; only PermutationSampler goes on to them.
BEYOND = (10**10,)


Action = Callable[[], Any]


class Indices:
    """A dataset of any size that gives its index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class _Reached(Exception):
    """The first batch is there."""


def fresh(size: int) -> Callable[[], Action]:
    from torch.utils.data import DataLoader

    def make() -> Action:
        loader = DataLoader(Indices(size), batch_size=BATCH, shuffle=True)
        return lambda: next(iter(loader))

    return make


def _engine(library: str, size: int, **loader_settings: Any) -> Callable[[], Action]:
    from torch.utils.data import DataLoader

    if library == "ours":
        from crosstrain.engine import DeterministicEngine
    else:
        from ignite.engine import DeterministicEngine

    batches = -(-size // BATCH)
    state = {
        "iteration": batches // 2,
        "epoch_length": batches,
        "max_epochs": 1,
        "rng_states": None,
    }

    def reached(engine: Any, batch: Any) -> None:
        raise _Reached

    def make() -> Action:
        loader = DataLoader(Indices(size), batch_size=BATCH, **loader_settings)
        engine = DeterministicEngine(reached)
        engine.logger.disabled = True

        def go() -> None:
            engine.load_state_dict(state)
            with contextlib.suppress(_Reached):
                engine.run(loader)
                raise AssertionError("no batch")

        return go

    return make


def ours(size: int) -> Callable[[], Action]:
    return _engine("ours", size, shuffle=True)


def ours_permutation(size: int) -> Callable[[], Action]:
    from crosstrain.engine import PermutationSampler

    return _engine("ours", size, sampler=PermutationSampler(size))


def ignite(size: int) -> Callable[[], Action]:
    return _engine("ignite", size, shuffle=True)


def torchdata(size: int) -> Callable[[], Action]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        return StatefulDataLoader(Indices(size), batch_size=BATCH, shuffle=True)

    first = loader()
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()
    # The state at half of the epoch, without fetching up to there.
    half = -(-size // BATCH) // 2
    state["_num_yielded"] = state["_sampler_iter_yielded"] = half
    sampler = state["_sampler_iter_state"]
    sampler["samples_yielded"] = sampler["sampler_iter_state"]["yielded"] = half * BATCH

    def make() -> Action:
        resumed = loader()

        def go() -> None:
            resumed.load_state_dict(state)
            next(iter(resumed))

        return go

    return make


CASES = {
    "fresh": fresh,
    "ours": ours,
    "ours, PermutationSampler": ours_permutation,
    "ignite": ignite,
    "torchdata": torchdata,
}


def measure(case: str, size: int, rounds: int) -> None:
    """Measures one case in this process and prints the result as JSON."""
    try:
        make = CASES[case](size)
    except ModuleNotFoundError as error:
        print(json.dumps({"missing": str(error)}))
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make()()
    times = []
    for _ in range(rounds):
        go = make()
        started = time.perf_counter()
        go()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"ms": statistics.median(times) * 1e3, "mib": peak / 1024, "added": peak - before}
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        measure(args.case, args.sizes[0], args.rounds)
        return
    print(
        f"{'samples':>14}  {'':26} {'ms':>10} {'MiB peak':>9} {'MiB added':>9}  ours is faster by"
    )
    for size in (*args.sizes, *BEYOND):
        found: dict[str, Any] = {}
        for case in CASES if size not in BEYOND else ("ours, PermutationSampler",):
            command = [sys.executable, __file__, "--case", case, "--sizes", str(size)]
            command += ["--rounds", str(args.rounds)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[case] = json.loads(output.splitlines()[-1])
        for case, result in found.items():
            if "missing" in result:
                print(f"{size:>14,}  {case:26} not installed: {result['missing']}")
                continue
            ratio = result["ms"] / found["ours"]["ms"] if "ours" in found else float("nan")
            shown = f"{ratio:.1f} x" if case != "ours" and ratio == ratio else ""
            print(
                f"{size:>14,}  {case:26} {result['ms']:>10.2f} {result['mib']:>9.0f} "
                f"{result['added'] / 1024:>9.1f}  {shown}"
            )


if __name__ == "__main__":
    main()
