"""The registry: finds backends by entry point and loads each on first use. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import os
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import BackendError, BackendUnavailable, UnknownBackend
from .protocol import Availability, Backend

__all__ = ["GROUP", "VARIABLE", "add_backend_argument", "default_spec", "get", "names", "probe"]

GROUP = "crosstrain.backends"
VARIABLE = "CROSSTRAIN_BACKEND"


def names() -> list[str]:
    """Returns the names of all registered backends, sorted, whether they can run here or not."""
    return sorted(_entry_points())


def default_spec() -> str:
    """Returns the spec that is used where none is given: CROSSTRAIN_BACKEND, or `cpu`."""
    return os.environ.get(VARIABLE) or "cpu"


def get(spec: str | None = None, **settings: Any) -> Backend:
    """Returns the backend of a spec, not opened yet; nothing is ever used in its place.

    Args:
        spec: `name` or `name:option`, such as `cpu:bf16`; None: what `default_spec` says.
        **settings: passed to the backend's class.

    Raises:
        UnknownBackend: if there is no backend of this name, or it has no such option.
        BackendUnavailable: if it cannot run here, with the reason and the remedy.
    """
    spec = default_spec() if spec is None else spec
    kind, option = _find(spec)
    found = kind.probe()
    if not found.ok:
        raise BackendUnavailable(spec, found.reason, found.remedy)
    backend: Backend = kind(option, **settings)
    return backend


def probe(spec: str) -> Availability:
    """Tells whether a spec can run here; never raises.

    A spec that does not exist, or a backend whose module does not import, is not available, with
    that as the reason.
    """
    try:
        kind, _ = _find(spec)
        found: Availability = kind.probe()
    except BackendError as error:
        return Availability(False, str(error), f"Use one of: {', '.join(names())}.")
    # A third party's backend may raise anything; the table of all backends must still be printed.
    except Exception as error:  # noqa: BLE001
        return Availability(
            False,
            f"Its probe raised {type(error).__name__}: {error}",
            "Report this to the authors of the backend: a probe must not raise.",
        )
    return found


def add_backend_argument(parser: argparse.ArgumentParser) -> None:
    """Gives a command line the argument `--backend SPEC`, with the usual default and help."""
    parser.add_argument(
        "--backend",
        metavar="SPEC",
        default=default_spec(),
        help="hardware and precision: NAME or NAME:OPTION, where NAME is one of "
        f"{', '.join(names())} (default: ${VARIABLE} or cpu; now %(default)s)",
    )


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _find(spec: str) -> tuple[Any, str]:
    """Returns the class and the option that a spec names."""
    name, _, option = spec.partition(":")
    known = _entry_points()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UnknownBackend(
            f"There is no backend '{name}' (of spec '{spec}').{hint} Backends: "
            f"{', '.join(sorted(known))}."
        )
    kind = known[name].load()
    options: tuple[str, ...] = kind.options
    if ":" not in spec:
        option = options[0]
    elif option not in options:
        close = difflib.get_close_matches(option, options, n=1)
        hint = f" Did you mean '{name}:{close[0]}'?" if close else ""
        raise UnknownBackend(
            f"Backend '{name}' has no option '{option}' (of spec '{spec}').{hint} Options: "
            f"{', '.join(options)}."
        )
    return kind, option
