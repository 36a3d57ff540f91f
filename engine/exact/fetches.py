"""Handlers that fetch from the training's own dataset, where the number of workers has changed.

What a loader draws while it is iterated over by somebody else depends on its workers. Without any,
datasets draw in the main process; with some, they draw in the workers, and samplers are asked for
more than was taken. The training's own passes are kept apart from that; a handler's are not.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch.utils.data import DataLoader

from .reads import tree_of, with_parents
from .unnamed import Walk

__all__ = ["who_fetches"]


def who_fetches(functions: Mapping[str, Any], data: Any, known: Iterable[int]) -> str | None:
    """Returns which of some functions may iterate over a loader, or one like it; None: none does.

    Args:
        functions: the step and the handlers, by what to call them.
        data: the loader that is trained with; one of its dataset with as many workers is like it.
        known: what is not looked into, by `id`.
    """
    walk = _Loaders(data, set(known))
    for name, function in functions.items():
        walk.function(function, name, 4)
    return walk.where


class _Loaders(Walk):
    """Looks for a loader, and those like it."""

    def __init__(self, data: Any, known: set[int]) -> None:
        super().__init__(known)
        self._data = data
        self.where: str | None = None

    def variables(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        """Yields those that a function does more with than to ask their length."""
        asked = _only_asked(function.__code__)
        found = super().variables(function)
        return ((name, value) for name, value in found if name not in asked)

    def value(self, value: Any, name: str, depth: int) -> None:
        """Notes such a loader, or looks into what else a function refers to."""
        if isinstance(value, DataLoader):
            loader: Any = value
            same = getattr(loader, "dataset", None) is self._data.dataset
            if same and loader.num_workers == self._data.num_workers:
                self.where = self.where or name
            return
        super().value(value, name, depth)


@lru_cache(maxsize=256)
def _only_asked(code: Any) -> frozenset[str]:
    """Returns the variables of a function of which only the length is asked."""
    tree = tree_of(code)
    if tree is None:
        return frozenset()
    asked: set[str] = set()
    more: set[str] = set()
    for node, above in with_parents(tree):
        if isinstance(node, ast.Name):
            parent = above[-1]
            length = (
                isinstance(parent, ast.Call)
                and isinstance(parent.func, ast.Name)
                and parent.func.id == "len"
            )
            (asked if length else more).add(node.id)
    return frozenset(asked - more)
