"""Plays many composed runs and lists those that differ and do not say why, or crash.

Runs that are identical and were warned of all the same are counted, and listed with --alarms.

    python tests/stress/compositions.py --count 2000
    python tests/stress/compositions.py --seed 17

Seeds of failures are kept in a file, one composition a line, and played first the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from compositions import CRASHED, FAILED, Verdict, compose, judge


def main() -> int:
    """Plays the compositions; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=None, help="only this one, with its details")
    parser.add_argument("--alarms", action="store_true", help="list what was warned of in vain")
    parser.add_argument("--failures", type=Path, default=Path("compositions-failed.jsonl"))
    options = parser.parse_args()
    if options.seed is not None:
        composition = compose(options.seed)
        print(composition.text())
        print(judge(composition))
        return 0
    counts: Counter[str] = Counter()
    failed = 0
    with options.failures.open("a") as file:
        for seed in range(options.first, options.first + options.count):
            composition = compose(seed)
            try:
                verdict = judge(composition)
            except Exception:  # noqa: BLE001  any is a failure
                verdict = Verdict(CRASHED, traceback.format_exc()[-800:])
            counts[verdict.outcome] += 1
            counts["identical, but warned of"] += bool(verdict.alarms)
            if options.alarms:
                for alarm in verdict.alarms:
                    print(f"{seed}: warned of, and identical: {alarm}")
            if verdict.outcome in FAILED:
                failed += 1
                print(f"{seed}: {verdict.outcome}: {verdict.detail}\n  {composition.text()}")
                record = {"seed": seed, "outcome": verdict.outcome, "detail": verdict.detail}
                print(json.dumps(record), file=file, flush=True)
    print(dict(counts))
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
