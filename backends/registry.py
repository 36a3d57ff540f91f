"""The registry: finds backends by entry point and loads each on first use. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from .errors import BackendError, BackendUnavailable, UnknownBackend
from .protocol import Availability, Backend
from .tpu_host import import_risk

if TYPE_CHECKING:
    from .auto import Choice

GROUP = "crosstrain.backends"
VARIABLE = "CROSSTRAIN_BACKEND"

# The one name that is not a backend but chooses one.
AUTO = "auto"

# What people write for a backend whose name looks different.
_MEANT = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "amp": "cuda-amp",
    "torch_xla": "xla",
    # AMD's GPUs are `cuda` to torch.
    "rocm": "cuda",
    "hip": "cuda",
    "amd": "cuda",
    "apple": "mps",
    "metal": "mps",
    "intel": "xpu",
    "ascend": "npu",
    "gaudi": "hpu",
}


def names() -> list[str]:
    """Returns the names of all backends, sorted, whether they can run here or not.

    `auto` is among them: it stands for the best of the others that can.
    """
    return sorted({AUTO, *(point.name for point in _registered())})


def default_spec() -> str:
    """Returns the spec that is used where none is given: CROSSTRAIN_BACKEND, or `cpu`."""
    return os.environ.get(VARIABLE) or "cpu"


def get(spec: str | None = None, **settings: Any) -> Backend:
    """Returns the backend of a spec, not opened yet; nothing is ever used in its place.

    Args:
        spec: `name` or `name:option`, such as `cpu:bf16`; `auto` for the best that this machine
            really supports, which is logged; None: what `default_spec` says.
        **settings: passed to the backend's class.

    Raises:
        UnknownBackend: if there is no backend of this name, or it has no such option.
        BackendUnavailable: if it cannot run here, with the reason and the remedy.
        BackendError: if two packages have registered different backends under this name.
    """
    spec = default_spec() if spec is None else spec
    if spec == AUTO:
        spec = _chosen().spec
    kind, option = _find(spec)
    found = kind.probe(option)
    if not found.ok:
        raise BackendUnavailable(spec, found.reason, found.remedy)
    backend: Backend = kind(option, **settings)
    return backend


def short(spec: str) -> str:
    """Returns the shortest spec that means the same: `cpu` for `cpu:fp32`.

    Any other is returned as it is, those too that do not exist: `get` says so.
    """
    name, _, option = spec.partition(":")
    try:
        kind, _ = _find(spec)
    except BackendError:
        return spec
    return name if option == kind.options[0] else spec


def probe(spec: str) -> Availability:
    """Tells whether a spec can run here; never raises.

    A spec that does not exist, or a backend whose module does not import, is not available, with
    that as the reason.
    """
    try:
        if spec == AUTO:
            choice = _chosen()
            return replace(choice.found, devices=[f"chooses {choice.spec}: {choice.why}"])
        kind, option = _find(spec)
        found: Availability = kind.probe(option if ":" in spec else None)
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


def _chosen() -> Choice:
    from .auto import choose

    return choose(probe)


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


def _registered() -> tuple[EntryPoint, ...]:
    """Returns the entry points of all backends, read anew where a package has come or gone."""
    return _read(tuple(map(_as_it_is, sys.path)))


@lru_cache(maxsize=1)
def _read(_: tuple[tuple[int, ...], ...]) -> tuple[EntryPoint, ...]:
    # Every package that is installed is opened for it, which takes longer than a small step does.
    return tuple(entry_points(group=GROUP))


def _as_it_is(folder: str) -> tuple[int, ...]:
    """Returns which folder it is, and when it last changed; () if no package is installed there."""
    try:
        found = os.stat(folder or ".")
        state = found.st_dev, found.st_ino, found.st_mtime_ns
        return state if _has_packages(folder, state) else ()
    except OSError:
        return ()


@lru_cache(maxsize=64)
def _has_packages(folder: str, _: tuple[int, ...]) -> bool:
    # The folder of a script may hold any number of files, and another script's is another.
    if not os.path.isdir(folder or "."):
        return True  # an archive
    with os.scandir(folder or ".") as files:
        return any(one.name.endswith((".dist-info", ".egg-info", ".egg")) for one in files)


def _entry_point(spec: str, name: str) -> EntryPoint:
    known = names()
    if name == AUTO:
        raise UnknownBackend(
            f"'auto' chooses the option, too: '{spec}' is not a spec. Write 'auto'."
        )
    if name not in known:
        meant = _MEANT.get(name.lower())
        close = meant if meant in known else _nearest(name, known)
        hint = f" Did you mean '{close}'?" if close else ""
        raise UnknownBackend(
            f"There is no backend '{name}' (of spec '{spec}').{hint} Backends: {', '.join(known)}."
        )
    points = {point.value: point for point in _registered() if point.name == name}
    if len(points) > 1:
        raise BackendError(
            f"Several installed packages register a backend '{name}': {', '.join(sorted(points))}. "
            "Uninstall all but one, or ask their authors for another name."
        )
    return next(iter(points.values()))


def _load(spec: str, point: EntryPoint) -> Any:
    risk = None if "torch" in sys.modules else import_risk()
    if risk is not None:
        raise BackendUnavailable(spec, *risk)
    try:
        return point.load()
    # A module may fail in any way when it is imported, and so may torch, with what it loads.
    except Exception as error:
        raise BackendUnavailable(
            spec,
            f"Its class '{point.value}' could not be imported: {type(error).__name__}: {error}",
            "Repair or uninstall the package that fails: it, torch, or one that torch loads.",
        ) from error


def _nearest(word: str, words: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return close[0] if close else None
