"""Handlers that fetch from the training's own dataset, where the number of workers has changed.

What a loader draws while it is iterated over by somebody else depends on its workers. Without any,
datasets draw in the main process; with some, they draw in the workers, and samplers are asked for
more than was taken. The training's own passes are kept apart from that; a handler's are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from .forgotten import UsesWalk
from .reads import Use

__all__ = ["who_fetches"]


def who_fetches(functions: Mapping[str, Any], data: Any, known: Iterable[int]) -> str | None:
    """Returns which of some functions may iterate over a loader, or one like it; None: none does.

    Args:
        functions: the step and the handlers, by what to call them.
        data: the loader that is trained with; one of its dataset with as many workers is like it.
        known: what is not looked into, by `id`.
    """
    walk = _Loaders(data, known)
    for name, function in functions.items():
        walk.function(function, name, 4)
    return walk.where


class _Loaders(UsesWalk):
    """Looks for a loader, and those like it."""

    def __init__(self, data: Any, known: Iterable[int]) -> None:
        super().__init__(known)
        self._data = data
        self.where: str | None = None

    def value(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes such a loader, if it is iterated over or passed on, or looks into what it is."""
        if not isinstance(value, DataLoader):
            super().value(value, owner, name, depth, uses)
            return
        loader: Any = value
        # Its length may be asked, and its attributes.
        if getattr(loader, "dataset", None) is not self._data.dataset or all(u.path for u in uses):
            return
        if loader.num_workers == self._data.num_workers:
            self.where = self.where or f"{owner}, its {name!r}"
