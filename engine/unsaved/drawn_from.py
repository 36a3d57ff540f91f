"""Generators, iterators and loaders that a step or a handler draws from and nobody has named.

A second loader, a `torch.Generator`, an iterator: each has a position of its own. Where a function
of the user's refers to one (by its closure, its globals, its object's attributes) and no checkpoint
holds it, a resumed run draws other values from it than the run that was saved, though the loop's
own batches are exact. That is said when the state is first taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from crosstrain.engine.data.generators import GLOBAL_GENERATORS, generators_in
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import is_others
from crosstrain.engine.source.uses import ALL, Use

from .functions import TORCHS_OWN, TRAINED
from .used import Used
from .walk import Walk, is_source


def unnamed_sources(used: Used) -> list[str]:
    """Returns what functions draw from, by where it was found, each once."""
    walk = _Sources(used)
    walk.from_functions(used.functions)
    named = {id(value) for value in used.named}
    left_out = used.saved.sources.items()
    return [*walk.found.values(), *(where for one, where in left_out if one not in named)]


class _Sources(Walk):
    """Looks for what has a position, in all that an object holds: used or not, it may be."""

    def __init__(self, used: Used) -> None:
        super().__init__(used)
        self.found: dict[int, str] = {}

    def look(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes a source, or looks into what a value is made of."""
        where = f"{owner}, its {name!r}"
        if id(value) in self._known or is_source(value):
            self._note(value, where)
        elif isinstance(value, DataLoader):
            for own, generator in _generators_of(value) if depth > 0 else ():
                self._note(generator, f"{where}, {own}")
            if depth > 0 and value.num_workers == 0:
                # Workers begin each pass with what it holds in this process.
                self.value(value.dataset, owner, f"{name}.dataset", depth, ALL)
        else:
            super().look(value, owner, name, depth, uses)

    def _note(self, value: Any, where: str) -> None:
        ended = inspect.isgenerator(value) and value.gi_frame is None
        if is_source(value) and not ended and id(value) not in self._known | GLOBAL_GENERATORS:
            self.found.setdefault(id(value), f"{where} (a {type(value).__name__})")

    def engine(self, engine: Any, where: str) -> None:
        """Leaves another engine, such as an evaluator, to itself: what it draws is no training."""

    def note_state(self, value: Any, owner: str, name: str, depth: int) -> None:
        """Looks into an object of the user's, whatever its state has of it."""
        if depth > 0 and not is_others(type(value)) and not isinstance(value, TRAINED):
            self.attributes(value, owner, name, depth, frozenset())

    def attributes(
        self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]
    ) -> None:
        """Looks into all attributes of an object, and what its methods use."""
        if isinstance(value, DataLoader):
            return
        super().attributes(value, owner, name, depth, uses)
        if ("all", id(value)) not in self._seen and not is_others(type(value)):
            self._seen.add(("all", id(value)))
            own = TORCHS_OWN if isinstance(value, TRAINED) else ()
            for attribute, item in attributes_of(value).items():
                if attribute not in own:
                    self.value(item, owner, f"{name}.{attribute}", depth - 1, frozenset())


def _generators_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yields the generators that the order of a loader's samples is drawn from."""
    yield "its generator", loader.generator
    for name in ("sampler", "batch_sampler"):
        for where, generator in generators_in(getattr(loader, name, None), name).items():
            yield f"its {where}", generator
