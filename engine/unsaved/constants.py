"""Constants: tensors, arrays and models that a script makes once, and that a run only reads.

A random projection, a frozen target network, the indices of the samples that are validated on: what
never changes is in no checkpoint, and a script that is started again makes it again. Where that
draws, and nothing has seeded it, the second is another one. So a state has digests of what has not
changed since its process began, and a resumed run compares its own with them as it begins.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy
import torch

from crosstrain.engine.digest import digest, sketch
from crosstrain.engine.guards import has_memory, is_a, is_dense
from crosstrain.engine.nests import is_module
from crosstrain.engine.spread import is_spread, lasting_tensors

from .changed_values import Begun, Place, Values
from .made_again import named

# Larger ones are told by some of their numbers.
_WHOLE = 1 << 20


class Constants:
    """Digests of what a run reads and had when it began."""

    def __init__(self) -> None:
        self._begun: dict[Place, str] = {}
        self._expected: dict[str, str] = {}
        #: By name, of those that have not changed when a state was taken last.
        self.unchanged: dict[str, str] = {}

    def expect(self, record: Mapping[str, str]) -> None:
        """Takes those of the run whose state is gone on from."""
        self._expected = dict(record)

    def begin(self, now: Values) -> list[str]:
        """Notes what there is as a run begins; returns the names of what had other contents."""
        self._begun, self.unchanged = _digests(now), {}
        expected, self._expected = self._expected, {}
        return [
            name
            for place, one in self._begun.items()
            if expected.get(name := named(place), one) != one
        ]

    def sift(self, now: Values, begun: Begun) -> None:
        """Keeps what has not changed since then, for a state that is taken."""
        self.unchanged = {
            named(place): one
            for place, one in self._begun.items()
            if place in now.signatures and now.signatures[place] == begun.signatures.get(place)
        }


def _digests(now: Values) -> dict[Place, str]:
    found: dict[Place, str] = {}
    for place, value in now.values.items():
        # One number may be a setting, or the time.
        if is_a(value, torch.Tensor) and _is_plain(value) and value.numel() > 1:
            found[place] = digest(value) if value.nbytes <= _WHOLE else sketch([value])
        elif is_a(value, numpy.ndarray) and value.size > 1 and value.dtype != object:
            found[place] = digest(now.signatures[place])
    for place, value in now.objects.items():
        if is_module(value):
            tensors = lasting_tensors(value)
            found[place] = sketch([one for one in tensors if _is_plain(one)])
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    # Of one that is spread over processes, each compares the part that it holds.
    return is_spread(tensor) or (has_memory(tensor) and is_dense(tensor))
