"""Digests of what a training is made of, short, and of the whole where it is spread over processes.

They are those of `crosstrain.engine.digest`, cut to 16 digits: what they are compared with is of
our own making. The engine takes the part of a tensor that lies in its process; these gather the
parts, so that all processes call them together.
"""

from __future__ import annotations

from typing import Any

from crosstrain.backends.placement import map_tensors
from crosstrain.engine import digest as nests

_DIGITS = 16


def digest(value: Any) -> str:
    """Returns 16 hexadecimal digits that differ wherever two nests differ in a bit or a type."""
    return nests.digest(_gathered(value))[:_DIGITS]


def leaf_digests(value: Any, name: str) -> dict[str, str]:
    """Returns the digest of each leaf of a nest by its path, the first part of which is a name."""
    leaves = nests.leaves(_gathered(value))
    return {f"{name}{leaf.path}": f"{leaf.kind} {leaf.digest[:_DIGITS]}" for leaf in leaves}


def _gathered(value: Any) -> Any:
    return map_tensors(value, lambda one: one.full_tensor() if hasattr(one, "full_tensor") else one)
