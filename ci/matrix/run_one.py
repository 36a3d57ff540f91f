"""Plays one scenario on one backend: a cell of the matrix, in a process of its own.

`python -m crosstrain.ci.matrix.run_one SPEC SCENARIO --folder DIR` plays it and writes
`outcome.json` into the folder. It exits with 0 if an outcome was written, whatever it says. Imports
no torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosstrain.ci.trials.course import losses_of
from crosstrain.ci.trials.play import NotApplicable, Play
from crosstrain.ci.trials.processes import TrainingFailed
from crosstrain.ci.trials.scenarios import COMPUTES_NOTHING, SCENARIOS, Scenario

from .outcome import OUTCOME, Outcome, Status


def play_cell(
    spec: str, scenario: Scenario, folder: Path, target: str | None = None, seed: int | None = None
) -> Outcome:
    """Plays a scenario on a backend.

    Args:
        spec: the backend.
        scenario: one of `SCENARIOS`.
        folder: what is written goes into a new folder in this one, which is removed; but what its
            processes have printed stays here, unless it passed or was skipped.
        target: a user's training, as `module:function`; None: the scenario's own.
        seed: of the moments of kills; drawn if None.

    Returns:
        What became of it. It is not written anywhere yet.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="cell-", dir=folder) as name:
        place = Path(name)
        outcome = _played(spec, scenario, place, target, seed)
        if outcome.status not in ("passed", "skipped"):
            for printed in place.glob("*.txt"):
                printed.rename(folder / printed.name)
    return outcome


def _played(spec: str, scenario: Scenario, place: Path, target: str | None, seed: int) -> Outcome:
    """Plays it in an empty folder; see `play_cell`."""
    started = time.perf_counter()
    found: dict[str, Any] = {}

    def outcome(status: Status, reason: str, **more: Any) -> Outcome:
        return Outcome(
            spec=spec,
            scenario=scenario.name,
            status=status,
            reason=reason,
            seconds=time.perf_counter() - started,
            versions=found.get("versions", {}),
            hardware={
                "machine": platform.node() or "unknown",
                "cores": len(os.sched_getaffinity(0)),
                "devices": found.get("devices", []),
            },
            **more,
        )

    if target is not None and scenario.own_only:
        return outcome("skipped", scenario.own_only)
    with Play(spec, place, target, seed, scenario.processes) as play:
        try:
            found = play.probe()
            if found["wrong"]:
                return outcome("error", found["wrong"])
            if not found["ok"]:
                return outcome("unavailable", f"{found['reason']} {found['remedy']}")
            lacks = _lacks(scenario, found["capabilities"])
            if lacks:
                return outcome("skipped", lacks)
            problem, figures = scenario.run(play)
        except NotApplicable as reason:
            return outcome("skipped", str(reason))
        except TrainingFailed as error:
            return outcome("error", str(error), **_losses(play))
    conditions = play.straight.environment
    found["versions"] |= {x: str(conditions[x]) for x in ("python", "numpy") if x in conditions}
    status: Status = "failed" if problem else "passed"
    return outcome(status, problem, **_losses(play), figures=figures)


def _losses(play: Play) -> dict[str, tuple[float, ...]]:
    return {"losses": losses_of(play.straight), "resumed_losses": losses_of(play.resumed)}


def _lacks(scenario: Scenario, capabilities: Sequence[str]) -> str:
    if COMPUTES_NOTHING in capabilities:
        return "The backend computes nothing, so there is nothing to resume."
    missing = sorted(scenario.needs - set(capabilities))
    return f"The backend has no {', '.join(missing)}, which the scenario needs." if missing else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays the cell of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m crosstrain.ci.matrix.run_one", description=__doc__
    )
    parser.add_argument("spec", help="NAME or NAME:OPTION, such as cpu:bf16")
    parser.add_argument(
        "scenario", choices=SCENARIOS, metavar="scenario", help=", ".join(SCENARIOS)
    )
    parser.add_argument("--folder", type=Path, required=True, help=f"where {OUTCOME} is written")
    parser.add_argument("--target", metavar="MODULE:FUNCTION", help="your own training")
    parser.add_argument("--seed", type=int, help="of the moments of kills")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    scenario = SCENARIOS[args.scenario]
    outcome = play_cell(args.spec, scenario, args.folder, args.target, args.seed)
    outcome.write(args.folder / OUTCOME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
