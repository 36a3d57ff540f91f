"""The options of ``crosstrain diff``, and how what it found is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crosstrain.ci.options import above_zero

from .diff import Comparison, Difference, as_json, compare, span
from .file import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain diff``."""
    parser.add_argument("left", type=Path, help="a trace, written by TraceRecorder")
    parser.add_argument("right", type=Path, help="another")
    parser.add_argument(
        "--tolerance",
        type=above_zero,
        help="compare the loss and the norms with this relative tolerance (default: bit by bit on "
        "one kind of device; across kinds 1e-3, and 2e-2 in bf16 and fp16)",
    )
    parser.add_argument("--exact", action="store_true", help="compare bit by bit across kinds too")
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def run(args: argparse.Namespace) -> int:
    """Compare the traces and print where they part.

    Returns:
        0 if they do not part, 1 if they do.
    """
    left, right = Trace(args.left), Trace(args.right)
    found = compare(left, right, tolerance=args.tolerance, exact=args.exact)
    if args.json:
        print(json.dumps(_report(left, right, found), indent=1))
    else:
        print("\n".join(_lines(left, right, found)))
    return 0 if found.difference is None else 1


def _report(left: Trace, right: Trace, found: Comparison) -> dict[str, Any]:
    return {
        "left": str(left.path),
        "right": str(right.path),
        "equal": found.difference is None,
        **asdict(found),
        "difference": as_json(found.difference),
    }


def _lines(left: Trace, right: Trace, found: Comparison) -> Iterator[str]:
    for name, trace in (("left", left), ("right", right)):
        backend = trace.environment.get("backend") or "no backend"
        resumed = [str(header.after) for header in trace.headers[1:]]
        lives = f", resumed after {', '.join(resumed)}" if resumed else ""
        torn = ", its last line cut off" if trace.torn else ""
        yield f"{name:<6} {trace.path}: {backend}, iterations {span(trace)}{lives}{torn}"
    how = "bit by bit" if found.tolerance is None else f"by norms, within {found.tolerance:g}"
    yield f"Compared {how}, over {found.iterations} iterations. {found.why}"
    if found.unrecorded:
        yield f"{found.unrecorded} iterations in between are in one of the traces only."
    for condition in found.conditions:
        yield f"recorded under other conditions: {condition}"
    difference = found.difference
    if difference is None:
        yield "No difference."
        return
    yield f"They part at {difference}."
    if difference.left is not None and difference.right is not None:
        yield f"  left {difference.left!r}, right {difference.right!r}{_deviation(difference)}"
    if difference.others:
        yield f"  {difference.others} more of what is recorded of that iteration differ, all later"


def _deviation(difference: Difference) -> str:
    left, right = difference.left, difference.right
    if left is None or right is None or left == right:
        # The same norm of other bits, which is what a last digit or a changed order makes.
        return ": the same to all digits, of other bits" if left == right else ""
    return f": relative deviation {abs(left - right) / max(abs(left), abs(right)):.2g}"
