"""The registry: finds backends by entry point and loads each on first use. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import BackendError, BackendUnavailable, UnknownBackend
from .protocol import Availability, Backend

__all__ = ["GROUP", "VARIABLE", "add_backend_argument", "default_spec", "get", "names", "probe"]

GROUP = "crosstrain.backends"
VARIABLE = "CROSSTRAIN_BACKEND"

# What people write for a backend whose name looks different.
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "amp": "cuda-amp", "torch_xla": "xla"}


def names() -> list[str]:
    """Returns the names of all registered backends, sorted, whether they can run here or not."""
    return sorted({point.name for point in entry_points(group=GROUP)})


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
        BackendError: if two packages have registered different backends under this name.
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
    except BackendUnavailable as error:
        return Availability(False, error.reason, error.remedy)
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


def _find(spec: str) -> tuple[Any, str]:
    """Returns the class and the option that a spec names."""
    name, colon, option = spec.partition(":")
    kind = _load(spec, _entry_point(spec, name))
    options: tuple[str, ...] = kind.options
    if not colon:
        return kind, options[0]
    if option not in options:
        close = _nearest(option, options)
        hint = f" Did you mean '{name}:{close}'?" if close else ""
        raise UnknownBackend(
            f"Backend '{name}' has no option '{option}' (of spec '{spec}').{hint} Options: "
            f"{', '.join(options)}."
        )
    return kind, option


def _entry_point(spec: str, name: str) -> EntryPoint:
    known = names()
    if name not in known:
        meant = _MEANT.get(name.lower())
        close = meant if meant in known else _nearest(name, known)
        hint = f" Did you mean '{close}'?" if close else ""
        raise UnknownBackend(
            f"There is no backend '{name}' (of spec '{spec}').{hint} Backends: {', '.join(known)}."
        )
    points = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if len(points) > 1:
        raise BackendError(
            f"Several installed packages register a backend '{name}': {', '.join(sorted(points))}. "
            "Uninstall all but one, or ask their authors for another name."
        )
    return next(iter(points.values()))


def _load(spec: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            spec,
            f"Its class '{point.value}' could not be imported: {error}.",
            "Repair or uninstall the package that registers it.",
        ) from error


def _nearest(word: str, words: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return close[0] if close else None
