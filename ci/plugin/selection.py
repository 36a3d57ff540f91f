"""Which backends a session of pytest tests, and which of them a test is run on."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crosstrain.backends import Availability, BackendError, UnknownBackend, get, names, probe
from crosstrain.backends.registry import short
from crosstrain.ci.matrix.selection import available_specs
from crosstrain.ci.options import words

#: Names backends where `--backends` does not.
VARIABLE = "CROSSTRAIN_BACKENDS"
#: What `--require-backends` stands for without a value.
EVERYTHING = "<all>"


@dataclass(frozen=True)
class Row:
    """A backend as a test gets it.

    Args:
        spec: the backend's spec; empty where a test has none.
        skip: why the test cannot be run; empty if it can.
        fail: whether that is a failure.
    """

    spec: str
    skip: str = ""
    fail: bool = False


class _Found(NamedTuple):
    availability: Availability
    capabilities: frozenset[str]


@dataclass
class Selection:
    """The backends of a session. Each is looked at once, when that is first needed.

    Args:
        asked: the specs that were asked for; empty: those that are available here.
        all_required: whether each one that was asked for has to be available.
        used: the specs that tests run on, so far as they are known.
    """

    asked: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    all_required: bool = False
    used: set[str] = field(default_factory=set[str])
    _found: dict[str, _Found] = field(default_factory=dict[str, _Found])
    _specs: tuple[str, ...] | None = None

    @property
    def explicit(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.asked or self.required)

    def specs(self) -> tuple[str, ...]:
        """Returns the backends to test on, in order."""
        if self._specs is None:
            chosen = self.asked or tuple(available_specs())
            self._specs = tuple(dict.fromkeys((*chosen, *self.required)))
        return self._specs

    def look(self, spec: str) -> _Found:
        """Returns what is known of a backend; raises `UnknownBackend` if there is no such."""
        if spec not in self._found:
            try:
                capabilities = get(spec).capabilities
            except UnknownBackend:
                raise
            # Its probe tells the reason.
            except BackendError:
                capabilities = frozenset()
            self._found[spec] = _Found(probe(spec), capabilities)
        return self._found[spec]

    def is_required(self, spec: str) -> bool:
        """Tells whether it is a failure if a backend is not available."""
        return spec in self.required or (self.all_required and spec in self.specs())

    def start(self) -> None:
        """Opens one backend of each name that tests run on, and closes it, if there are several."""
        here = (spec for spec in self.used if spec and self.look(spec).availability.ok)
        specs = {spec.partition(":")[0]: spec for spec in here}
        for spec in specs.values() if len(specs) > 1 else ():
            # If it does not open, its tests say so. A third party's may raise anything.
            with contextlib.suppress(Exception):
                get(spec).open().close()

    def missing(self) -> dict[str, str]:
        """Returns the backends that are required and not available, each with its reason."""
        return {
            spec: _why(spec, self.look(spec).availability)
            for spec in self.specs()
            if self.is_required(spec) and not self.look(spec).availability.ok
        }

    def rows(self, about: Iterable[str], needs: Iterable[str]) -> list[Row]:
        """Returns a row for each backend that a test is run on, or one that says why on none.

        Args:
            about: the specs that the test is about; empty: any.
            needs: the capabilities that a backend must have for it.
        """
        about, needs = tuple(map(short, about)), frozenset(needs)
        for spec in about:
            self.look(spec)
        specs = self.specs()
        if about:
            specs = tuple(s for s in about if s in specs) if self.explicit else about
        if not specs:
            text = f"It is about {', '.join(about)}; selected are {', '.join(self.specs())}."
            return [Row("", text)]
        rows = [self._row(spec) for spec in specs if self._has(spec, needs)]
        if rows:
            return rows
        return [Row("", f"It needs {', '.join(sorted(needs))}, which {', '.join(specs)} lack.")]

    def _has(self, spec: str, needs: frozenset[str]) -> bool:
        found = self.look(spec)
        return not found.availability.ok or needs <= found.capabilities

    def _row(self, spec: str) -> Row:
        availability = self.look(spec).availability
        if availability.ok:
            return Row(spec)
        if self.is_required(spec):
            return Row(spec, f"It is required. {_why(spec, availability)}", True)
        return Row(spec, f"Backend '{spec}' is not available: {availability.reason}")

    def table(self) -> list[str]:
        """Returns a line for each backend: those selected, and those that cannot run here."""
        specs = list(self.specs())
        if not self.asked:
            known = {spec.partition(":")[0] for spec in specs}
            specs += [name for name in names() if name not in known | {"auto", "null"}]
        width = max(map(len, specs), default=0)
        lines: list[str] = []
        for spec in specs:
            found = self.look(spec).availability if spec in self.specs() else probe(spec)
            text = _line(found)
            if not found.ok and spec in self.specs() and self.is_required(spec):
                text = f"REQUIRED, {text}"
            lines.append(f"{spec:{width}}  {text}")
        return lines


def _line(found: Availability) -> str:
    if not found.ok:
        return f"not here: {found.reason}"
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    return "; ".join(part for part in (versions, *found.devices) if part)


def _why(spec: str, found: Availability) -> str:
    return f"Backend '{spec}' is not available: {found.reason} Remedy: {found.remedy}"


def _parse(texts: Iterable[str], source: str) -> tuple[str, ...]:
    """Reads lists of specs with commas between them; each in its shortest form."""
    try:
        specs = [spec for text in texts for spec in words(text)]
    except argparse.ArgumentTypeError as error:
        raise UnknownBackend(f"{source}: {error}") from None
    return tuple(dict.fromkeys(map(short, specs)))


def from_options(
    backends: Iterable[str], required: Collection[str], environment: Mapping[str, str]
) -> Selection:
    """Returns the selection that a command line asks for, all of which exists."""
    given, source = [*backends], "--backends"
    if not given and environment.get(VARIABLE):
        given, source = [environment[VARIABLE]], VARIABLE
    named = [text for text in required if text != EVERYTHING]
    selection = Selection(
        _parse(given, source), _parse(named, "--require-backends"), EVERYTHING in required
    )
    for spec in (*selection.asked, *selection.required):
        selection.look(spec)
    return selection
