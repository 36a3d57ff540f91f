"""Streams apart: what is drawn while data is fetched here leaves the step's random streams alone.

Python's, NumPy's and torch's global generators are set aside for the time of a fetch. The samples
of a map-style dataset are keyed one by one, so that nothing is kept of what fetching them leaves
(`Secluded`). Other data goes on drawing where its last fetch ended (`Apart`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch

from crosstrain.backends import random_state

from .streams import leave


class Secluded:
    """Fetches in the main process, and leaves that process's own random streams as they were."""

    def __init__(self, iterator: Iterator[Any], streams: tuple[str, ...]) -> None:
        self._iterator = iterator
        self._python = "python" in streams
        self._torch = "torch" in streams
        self._numpy = _NumpyAside() if "numpy" in streams else None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        python = random.getstate() if self._python else None
        state = torch.default_generator.get_state() if self._torch else None
        aside = self._numpy
        if aside is not None:
            aside.begin()
        try:
            return next(self._iterator)
        finally:
            leave()
            if python is not None:
                random.setstate(python)
            if state is not None:
                torch.default_generator.set_state(state)
            if aside is not None:
                aside.end()


class Apart:
    """Fetches in the main process, with random streams that only this data draws from.

    They begin as the global generators are when this is made.
    """

    def __init__(self, iterator: Iterator[Any], states: Mapping[str, Any] | None = None) -> None:
        self._iterator = iterator
        self._numpy = _NumpyAside()
        with random_state.preserved():
            if states is not None:
                random_state.restore(states)
            self._python = random.getstate()
            self._torch = torch.default_generator.get_state()
            self._numpy.take_over()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.call(self._iterator.__next__)

    def call(self, function: Callable[[], Any]) -> Any:
        """Calls a function that draws from these streams, and returns what it does."""
        python, state = random.getstate(), torch.default_generator.get_state()
        random.setstate(self._python)
        torch.default_generator.set_state(self._torch)
        self._numpy.begin()
        try:
            return function()
        finally:
            self._numpy.end()
            self._python, self._torch = random.getstate(), torch.default_generator.get_state()
            random.setstate(python)
            torch.default_generator.set_state(state)

    def states(self) -> dict[str, Any]:
        """Returns the states of these streams, as tensors and plain types."""
        found: dict[str, Any] = self.call(random_state.capture)
        return found


class _Gauss:
    """Stands in for a bit generator, whose state is 2.5 KB, where only the rest is wanted."""

    state: Any = {"bit_generator": "MT19937"}  # noqa: RUF012  read as NumPy reads it


class _NumpyAside:
    """Puts NumPy's global generator aside, and back as it was.

    Taking its state and setting it copies 2.5 KB element by element; exchanging the bit generator
    behind it copies nothing, but drops the second of a pair of normal variates that it may hold.
    """

    def __init__(self) -> None:
        self._own: Any = numpy.random.MT19937(0)
        self._module: Any = numpy.random
        self._global: Any = getattr(numpy.random.mtrand, "_rand", None)
        self._kept: Any = None
        # With second variates, where there are any.
        self._state: Any = None
        self._own_state: Any = None
        self._remembers = False

    def take_over(self) -> None:
        """Makes the other go on from where the global one is, and remember where it is."""
        state = self._module.get_state(legacy=False)
        kind = type(self._module.get_bit_generator())
        self._own = kind(0)
        self._own.state = {name: state[name] for name in ("bit_generator", "state")}
        self._remembers, self._own_state = True, state if state["has_gauss"] else None

    def begin(self) -> None:
        """Puts it aside: what is drawn from now on comes from another."""
        self._kept = self._module.get_bit_generator()
        self._state = self._module.get_state(legacy=False) if self._holds_variate() else None
        self._module.set_bit_generator(self._own)
        if self._own_state is not None:
            self._module.set_state(self._own_state)

    def end(self) -> None:
        """Puts it back."""
        if self._remembers:
            held = self._holds_variate()
            self._own_state = self._module.get_state(legacy=False) if held else None
        self._module.set_bit_generator(self._kept)
        if self._state is not None:
            self._module.set_state(self._state)

    def _holds_variate(self) -> bool:
        """Tells whether there is a second variate, or there might be."""
        held = getattr(self._global, "_bit_generator", None)
        if held is None:
            return True
        self._global._bit_generator = _Gauss
        try:
            return bool(self._global.get_state(legacy=False)["has_gauss"])
        finally:
            self._global._bit_generator = held
