"""Reports to test with: what a matrix of a few cells might have found."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from crosstrain.ci.matrix.outcome import Outcome
from crosstrain.ci.matrix.report import Run

TITLES = {
    "boundary": "stopped at an epoch's end",
    "middle": "stopped in the middle of an epoch",
    "port": "ported to another backend and back",
}

Cells = Collection[tuple[str, str]]


def sample_outcome(spec: str, scenario: str, failed: bool = False) -> Outcome:
    """The outcome of a cell that ran; its losses depend on the spec."""
    losses = tuple(2.0 / k + (0.0 if spec == "cpu" else 1e-3 * k) for k in range(1, 9))
    return Outcome(
        spec=spec,
        scenario=scenario,
        status="failed" if failed else "passed",
        reason="From iteration 5 on the losses differ." if failed else "",
        seconds=1.5,
        losses=losses,
        resumed_losses=(*losses[:4], *(loss + 0.25 for loss in losses[4:])) if failed else losses,
        figures={"stopped_at": 4, "largest": 0.125, "ported_to": "cpu"},
        versions={"torch": "2.13.0"},
        hardware={"machine": "here", "cores": 2, "devices": ["AMD EPYC"]},
    )


def sample_run(
    name: str,
    backends: Sequence[str] = ("cpu", "cpu:bf16"),
    *,
    scenarios: Sequence[str] = tuple(TITLES),
    required: Sequence[str] = (),
    failed: Cells = (),
    not_run: Cells = (),
    unavailable: Mapping[str, str] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Run:
    """What a machine might have run, all passed but for what the arguments say."""
    absent = unavailable or {}
    outcomes: list[Outcome] = []
    for scenario in scenarios:
        for spec in backends:
            if spec in absent:
                reason = absent[spec]
                outcomes.append(
                    Outcome(spec=spec, scenario=scenario, status="unavailable", reason=reason)
                )
            elif (spec, scenario) not in not_run:
                outcomes.append(sample_outcome(spec, scenario, (spec, scenario) in failed))
    return Run(
        name=name,
        started="2026-11-24T02:31:07+00:00",
        seconds=12.5,
        interrupted=bool(not_run),
        backends=tuple(backends),
        required=tuple(required),
        scenarios={scenario: TITLES[scenario] for scenario in scenarios},
        machine={"host": name, "processor": "AMD EPYC", "cores": "2"},
        versions={"torch": "2.13.0", **(versions or {})},
        devices={spec: () if spec in absent else ("AMD EPYC",) for spec in backends},
        outcomes=tuple(outcomes),
    )
