"""``crosstrain doctor``: every backend, available or not, why, and what to do about it."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version

from rich.console import Console
from rich.text import Text

from crosstrain.backends import Availability, get, names, probe

from .options import add_words

# One stands for others; the other, made, is this process's device for good.
_UNMADE = frozenset({"auto", "emulated"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain doctor``."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout in place of text")
    add_words(
        parser,
        "--require",
        "SPEC",
        "exit with 1 unless each of these is available, such as cpu:bf16; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis of every backend.

    Returns:
        0, or 1 if a required backend is not available; those are named on stderr.
    """
    found = {spec: probe(spec) for spec in [*names(), *args.require]}
    missing = [spec for spec in found if spec in args.require and not found[spec].ok]
    if args.json:
        print(_as_json(found, args.require, missing))
    else:
        _print_list(found)
    for spec in missing:
        text = f"required but not available: {spec}: {found[spec].reason} {found[spec].remedy}"
        print(" ".join(text.split()), file=sys.stderr)
    return 1 if missing else 0


def _as_json(found: dict[str, Availability], required: list[str], missing: list[str]) -> str:
    report = {
        "crosstrain": version("crosstrain"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "missing": missing,
        "backends": [
            {"spec": spec, "required": spec in required} | asdict(availability)
            for spec, availability in found.items()
        ],
    }
    return json.dumps(report, indent=2)


def _print_list(diagnoses: dict[str, Availability]) -> None:
    """Prints the backends, and what to copy on lines of their own, which nothing wraps."""
    console = Console(highlight=False)
    versions: dict[str, str] = {}
    for found in diagnoses.values():
        versions |= found.versions
    about = "".join(f", {name} {number}" for name, number in versions.items())
    console.print(
        f"crosstrain {version('crosstrain')}, Python {platform.python_version()}{about}",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    width = max(map(len, diagnoses))
    for spec, found in diagnoses.items():
        head = Text(f"{spec:<{width}}  ", "bold")
        head.append("yes" if found.ok else "no ", "green" if found.ok else "red")
        console.print(head, "" if found.ok else found.reason, markup=False, soft_wrap=True)
        lines = [found.remedy] if not found.ok else [*found.devices, _options(spec)]
        for line in "\n".join(line for line in lines if line).splitlines():
            console.print(f"{'':<{width}}      {line}", markup=False, soft_wrap=True)


def _options(spec: str) -> str:
    """Returns the options of a backend that has several, the default first."""
    # A third party's may raise anything, and an option that was asked for has none of its own.
    with contextlib.suppress(Exception):
        options = () if spec in _UNMADE or ":" in spec else get(spec).options
        if len(options) > 1:
            return f"options: {', '.join(options)}"
    return ""
