"""Constants: tensors, numbers and models that a script makes once, and a run only reads.

A random projection, a frozen network, the indices of the samples that are validated on, a number
that was drawn and not typed in: what never changes is in no checkpoint, and a script that is
started again makes it again. Where that draws, and nothing has seeded it, the second is another
one. So a state has digests of what has not changed since its process began, and a resumed run
compares its own with them as it begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

import numpy
import torch

from crosstrain.engine.digest import digest, sketch
from crosstrain.engine.guards import has_memory, is_a, is_dense
from crosstrain.engine.nests import NESTS, SCALARS, is_module
from crosstrain.engine.spread import is_spread, lasting_tensors

from .changed_values import Begun, Place, Values
from .made_again import named
from .signatures import signature_of

# Larger ones are told by some of their numbers.
_WHOLE: Final = 1 << 20
_ITEMS: Final = 1024
_DEPTH: Final = 4
# Fewer numbers or words than that may be settings.
_FEW: Final = 8
# Of decimals: a number that has more is neither typed in nor read off a clock.
_MOST: Final = 9
_DECIMALS: Final = {torch.float64: _MOST, torch.float32: 5}


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
            if expected.get(name := named(place), one) != one and not now.is_only_shown(place)
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
        # One number may be a setting, or the time, unless it has been computed or drawn.
        if is_a(value, float):
            if _is_computed(value):
                found[place] = digest(signature_of(value))
        elif is_a(value, torch.Tensor) and _is_plain(value) and _is_made(value):
            found[place] = digest(value) if value.nbytes <= _WHOLE else sketch([value])
        elif is_a(value, numpy.ndarray) and value.size > 1 and value.dtype != object:
            found[place] = digest(now.signatures[place])
        elif is_a(value, *NESTS) and (of_row := _digest_of_row(value)) is not None:
            found[place] = of_row
    for place, value in now.objects.items():
        if is_module(value):
            tensors = lasting_tensors(value)
            found[place] = sketch([one for one in tensors if _is_plain(one)])
    for place, tensors in now.left_out.items():
        found[place] = sketch([one for one in tensors if _is_plain(one)])
    return found


def _is_made(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor is more than a setting: several numbers, or one that was drawn."""
    if tensor.numel() != 1 or tensor.dtype not in _DECIMALS or is_spread(tensor):
        return tensor.numel() > 1
    number = tensor.item()
    typed = torch.tensor(round(number, _DECIMALS[tensor.dtype]), dtype=tensor.dtype)
    return bool(typed.item() != number)


def _is_plain(tensor: torch.Tensor) -> bool:
    # Of one that is spread over processes, each compares the part that it holds.
    return is_spread(tensor) or (has_memory(tensor) and is_dense(tensor))


def _digest_of_row(nest: Any) -> str | None:
    """Returns a digest of a collection of numbers or words of one kind, or of rows of them.

    None of anything else: what is of several types, or has parts with names, is settings.
    """
    inside = [*nest.values()] if isinstance(nest, dict) else [*nest]
    kinds = {*map(type, inside)}
    if len(kinds) != 1 or (isinstance(nest, dict) and kinds == {dict}):
        return None
    sample = _Sample()
    if not sample.take(nest, _DEPTH):
        return None
    few = sample.count < _FEW and not (kinds == {float} and any(map(_is_computed, inside)))
    return None if few else digest(sample.found)


def _is_computed(number: float) -> bool:
    return round(number, _MOST) != number


class _Sample:
    """Some of what a collection holds, as words that are the same in each process."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.count = 0

    def take(self, value: Any, depth: int) -> bool:
        """Takes a value, or some of it; tells whether it is numbers and words alone."""
        if is_a(value, *SCALARS, numpy.generic):
            self.count += 1
            # The same file may lie in another folder.
            text = value.rpartition("/")[2] if is_a(value, str) else value
            self.found.append(repr(signature_of(text)))
        elif is_a(value, torch.Tensor) and _is_plain(value):
            self.count += value.numel()
            self.found.append(sketch([value]))
        elif is_a(value, numpy.ndarray) and not value.dtype.hasobject:
            self.count += value.size
            self.found.append(digest(signature_of(value)))
        elif is_a(value, *NESTS) and depth > 0:
            self.found.append(str(len(value)))
            return all(self.take(one, depth - 1) for one in _some_of(value))
        else:
            return False
        return True


def _some_of(nest: Any) -> list[Any]:
    if isinstance(nest, dict):
        nest = itertools.chain(nest.keys(), nest.values())
    elif isinstance(nest, (set, frozenset)):
        nest = sorted(nest, key=repr)
    inside = [*nest]
    return inside[:: -(-len(inside) // _ITEMS) or 1]
