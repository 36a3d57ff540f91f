"""``crosstrain doctor``: every backend, available or not, why, and what to do about it."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version

from crosstrain.backends import Availability, names, probe

__all__ = ["Diagnosis", "add_arguments", "diagnose", "run"]


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found about one backend.

    Args:
        spec: the backend's name, or the spec that was required, such as ``cpu:bf16``.
        required: whether the caller asked for it by ``--require``.
        availability: what its probe says.
    """

    spec: str
    required: bool
    availability: Availability

    @property
    def missing(self) -> bool:
        """Whether it was required and is not available."""
        return self.required and not self.availability.ok


def diagnose(required: list[str]) -> list[Diagnosis]:
    """Probe every registered backend, and each required spec that is not a plain name.

    Args:
        required: specs that have to be available.

    Returns:
        One diagnosis for each backend in the registry's order, then one for each further spec.
    """
    specs = list(dict.fromkeys([*names(), *required]))
    return [Diagnosis(spec, spec in required, probe(spec)) for spec in specs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain doctor``.

    Args:
        parser: the parser of this subcommand.
    """
    parser.add_argument(
        "--json", action="store_true", help="print JSON on stdout in place of the table"
    )
    parser.add_argument(
        "--require",
        metavar="SPEC[,SPEC...]",
        type=_specs,
        action="extend",
        default=[],
        help="exit with 1 unless each of these is available, such as cpu:bf16; may be repeated",
    )


def _specs(text: str) -> list[str]:
    specs = [spec.strip() for spec in text.split(",")]
    if not all(specs):
        raise argparse.ArgumentTypeError(
            f"{text!r} has an empty entry; write names of backends with a comma between them, "
            "such as cpu,cpu:bf16"
        )
    return specs


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis of every backend.

    Args:
        args: what :func:`add_arguments` declared.

    Returns:
        0, or 1 if a required backend is not available; those are named on stderr.
    """
    diagnoses = diagnose(args.require)
    if args.json:
        print(_as_json(diagnoses))
    else:
        _print_table(diagnoses)
    missing = [diagnosis for diagnosis in diagnoses if diagnosis.missing]
    for diagnosis in missing:
        found = diagnosis.availability
        words = f"required but not available: {diagnosis.spec}: {found.reason} {found.remedy}"
        print(" ".join(words.split()), file=sys.stderr)
    return 1 if missing else 0


def _as_json(diagnoses: list[Diagnosis]) -> str:
    report = {
        "crosstrain": version("crosstrain"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "missing": [diagnosis.spec for diagnosis in diagnoses if diagnosis.missing],
        "backends": [
            {"spec": diagnosis.spec, "required": diagnosis.required}
            | asdict(diagnosis.availability)
            for diagnosis in diagnoses
        ],
    }
    return json.dumps(report, indent=2)


def _print_table(diagnoses: list[Diagnosis]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"crosstrain {version('crosstrain')} on Python {platform.python_version()}")
    table.add_column("Backend", no_wrap=True)
    table.add_column("Available", no_wrap=True)
    # One column for all that is long: three of them would each be a few letters wide.
    table.add_column("What was found, and what to do", overflow="fold")
    for diagnosis in diagnoses:
        found = diagnosis.availability
        versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
        lines = [found.reason, found.remedy, versions, *found.devices]
        table.add_row(
            escape(diagnosis.spec),
            "[green]yes[/green]" if found.ok else "[red]no[/red]",
            escape("\n".join(line for line in lines if line)),
            end_section=True,
        )
    Console().print(table)
