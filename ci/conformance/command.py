"""Puts any backend through the checks, from a test or the command line: see docs/backends.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crosstrain.backends import BackendError

from .case import NOTHING, SCALING, Case, NonConformance, TargetBackend
from .checks import CHECKS

# By how much, as a share, results may differ from those of fp32 on the CPU: enough for bf16.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Finding:
    """One promise of the step protocol that a backend does not keep: which check says what."""

    check: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.problem}"


def applicable(target: TargetBackend, option: str | None = None) -> list[str]:
    """Return the names of the checks that apply to a backend, in the order in which they run.

    A backend whose ``capabilities`` hold ``null`` runs no arithmetic, so nothing is asked about
    its results; one without ``loss_scaling`` is not asked to skip an overflow. Arguments and errors
    are those of `check_backend`.
    """
    case = _made(target, option, _TOLERANCE)
    return [case.check] if isinstance(case, Finding) else _applicable(case)


def _made(target: TargetBackend, option: str | None, tolerance: float) -> Case | Finding:
    """Returns the case, or what is wrong with a backend that cannot be looked at."""
    try:
        return Case(target, option, tolerance)
    except (BackendError, ValueError):
        raise
    # The backend under test may raise anything, anywhere: that is what is to be found.
    except Exception as error:  # noqa: BLE001
        return Finding(
            "probe",
            f"It raised {type(error).__name__} when it was probed and made: {error}. A probe must "
            "not raise: it returns Availability(False, reason, remedy).",
        )


def _applicable(case: Case) -> list[str]:
    try:
        has = case.new().capabilities
    # A backend that cannot even be made is put through every check, which then say what is wrong.
    except Exception:  # noqa: BLE001
        return list(CHECKS)
    return [
        name
        for name, check in CHECKS.items()
        if not (check.computes and NOTHING in has) and not (check.scales and SCALING not in has)
    ]


def check_backend(
    target: TargetBackend,
    option: str | None = None,
    *,
    checks: Iterable[str] | None = None,
    tolerance: float = _TOLERANCE,
) -> list[Finding]:
    """Put a backend through the checks and return what it does not keep.

    Args:
        target: a spec such as ``cpu:bf16``, or a backend's class, registered or not.
        option: the option, where ``target`` is a class; the first by default.
        checks: the names of the checks to run; by default all that are applicable.
        tolerance: by how much, as a share, results may differ from those of plain torch in fp32 on
            the CPU. The default is wide enough for bf16.

    Returns:
        The findings; an empty list from a backend that conforms.

    Raises:
        UnknownBackend: if there is no such spec.
        BackendUnavailable: if the backend cannot run here, which is no finding about it.
        ValueError: if there is no check of a name.
    """
    case = _made(target, option, tolerance)
    if isinstance(case, Finding):
        return [case]
    names = _applicable(case) if checks is None else list(checks)
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ValueError(f"There are no checks {unknown}. Checks: {', '.join(CHECKS)}.")
    found: list[Finding] = []
    for name in names:
        try:
            with case.isolated():
                CHECKS[name].run(case)
        except NonConformance as problem:
            found.append(Finding(name, str(problem)))
        # The backend under test may raise anything, anywhere: that is what is to be found.
        except Exception as error:  # noqa: BLE001
            found.append(Finding(name, f"It raised {type(error).__name__}: {error}"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks on the specs of a command line and print a line for each check.

    Returns:
        0 if all of the backends conform, 1 if one does not, 2 if one does not exist or cannot run
        here.
    """
    parser = argparse.ArgumentParser(
        prog="python -m crosstrain.ci.conformance",
        description="Put backends through everything that the step protocol promises.",
    )
    parser.add_argument("spec", nargs="+", help="NAME or NAME:OPTION, such as cpu:bf16")
    worst = 0
    for spec in parser.parse_args(arguments).spec:
        try:
            names = applicable(spec)
        except BackendError as error:
            print(error, file=sys.stderr)
            worst = 2
            continue
        for name in names:
            found = check_backend(spec, checks=[name])
            print(f"{'FAIL' if found else 'ok':4} {spec} {name}", *found, sep="\n     ")
            worst = max(worst, 1 if found else 0)
    return worst
