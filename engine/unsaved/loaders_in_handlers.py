"""Loaders that handlers iterate over, and their workers in a resumed run.

What a loader draws while it is iterated over by somebody else depends on its workers. Without any,
datasets draw in the main process; with some, they draw in the workers, and samplers are asked for
more than was taken. Persistent workers draw a seed from the main process when they begin, and not
with each pass. The training's own passes are kept apart from that; a handler's are not. So a state
keeps the workers of each loader that a handler may iterate over. A resume begins persistent ones
anew as if they had never ended; where it finds another number of workers, it fetches a few samples
to see whether that draws at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import default_collate

from crosstrain.backends import random_state
from crosstrain.engine.data.attributes import Attributes
from crosstrain.engine.data.order import draws_at_once
from crosstrain.engine.data.sampling import is_iterable, is_loader
from crosstrain.engine.digest import digest
from crosstrain.engine.progress import data_length
from crosstrain.engine.source.uses import Use

from .used import Used
from .walk import Walk


@dataclass
class Fetched:
    """What handlers may iterate over.

    Args:
        loaders: by where they were found.
        training: where the one that is trained with was found, or one like it.
    """

    loaders: dict[str, Any] = field(default_factory=dict[str, Any])
    training: str | None = None

    def record(self) -> dict[str, dict[str, Any]]:
        """Returns what a state keeps of each: its workers, and whether they have begun and stay."""
        return {
            name: {
                "workers": loader.num_workers,
                "stays": _stays(loader),
                "begun": getattr(loader, "_iterator", None) is not None,
            }
            for name, loader in self.loaders.items()
        }

    def go_on(self, then: Mapping[str, Mapping[str, Any]]) -> None:
        """Has persistent workers that had begun, as `record` told, begin anew without a seed."""
        for name, loader in self.loaders.items():
            had_begun = then.get(name, {}).get("begun", False)
            if had_begun and _stays(loader) and getattr(loader, "_iterator", None) is None:
                vars(loader)["_get_iterator"] = partial(_begun_iterator, loader)

    def differences(self, then: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
        """Returns which loaders draw otherwise than they did, as `record` told then, and why."""
        found: list[tuple[str, str]] = []
        for name, loader in self.loaders.items():
            if (before := then.get(name)) is None:
                continue
            now, workers = _stays(loader), before["workers"]
            same = loader.num_workers == workers
            if now != before["stays"]:
                why = (
                    "persistent workers draw a seed once, others with each pass: it had "
                    f"{_workers(workers, before['stays'])} and has "
                    f"{_workers(loader.num_workers, now)}"
                )
            elif name == self.training or (same and not (now and before["begun"])):
                continue
            else:
                what = _what_draws(loader)
                if what is None:
                    continue
                why = f"what {what} draws in its persistent workers goes on in the same ones only"
                if not same:
                    why = (
                        f"what {what} draws follows from num_workers, which was {workers} and is "
                        f"{loader.num_workers}"
                    )
            found.append((name, why))
        return found


def _stays(loader: Any) -> bool:
    return bool(getattr(loader, "persistent_workers", False)) and loader.num_workers > 0


def _workers(count: int, stays: bool) -> str:
    return f"num_workers={count}, persistent_workers={stays}"


def _begun_iterator(loader: Any) -> Any:
    """Returns a loader's iterator whose workers' seed is drawn from nothing that anybody sees."""
    vars(loader).pop("_get_iterator", None)
    own = loader.generator
    loader.generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    try:
        return loader._get_iterator()
    finally:
        loader.generator = own


def who_fetches(used: Used, data: Any) -> Fetched:
    """Returns over which loaders the functions of a run may iterate, that it trains with `data`.

    A loader of the same dataset with as many workers is like that.
    """
    walk = _Loaders(used, data)
    for name, function in used.functions.items():
        walk.function(function, name, 4)
    return walk.fetched


def _what_draws(loader: Any) -> str | None:
    """Returns what of a loader draws by its number of workers; None: fetching draws nothing.

    What that changes of its dataset, and of random states, is put back.
    """
    dataset = loader.dataset
    kind = type(dataset).__name__
    if is_iterable(dataset):
        return f"its {kind}, of which each worker has a part,"
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if not draws_at_once(sampler):
        return f"its {type(sampler).__name__}, which is asked for more than was taken,"
    count = data_length(dataset) or 0
    collate = loader.collate_fn
    attributes = Attributes(dataset, collate_fn=collate)
    kept = attributes.take()
    with random_state.preserved():
        before = digest(random_state.capture())
        try:
            # What it opens for itself, such as a file, workers are not to inherit.
            twin = copy.copy(dataset)
            samples = [twin[index] for index in sorted({0, count // 2, max(count - 1, 0)})]
            if collate is not default_collate and loader.batch_sampler is not None:
                collate(samples)
        except Exception:  # noqa: BLE001  its indices may be no numbers: then it may draw
            return f"its {kind}"
        finally:
            attributes.give(kept)
        drew = digest(random_state.capture()) != before
    return f"its {kind} or what collates its samples" if drew else None


class _Loaders(Walk):
    """Looks for a loader, and those like it."""

    def __init__(self, used: Used, data: Any) -> None:
        super().__init__(used, {id(used.engine)})
        self._data = data
        self.fetched = Fetched()

    def look(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes such a loader, if it is iterated over or passed on, or looks into what it is."""
        if not is_loader(value):
            super().look(value, owner, name, depth, uses)
            return
        # Its length may be asked, and its attributes. What `list` makes of it may not be used.
        if uses and all(use.path for use in uses):
            return
        where, trained = f"{owner}, its {name!r}", self._data
        self.fetched.loaders.setdefault(where, value)
        like = value.dataset is getattr(trained, "dataset", None) and (
            value.num_workers == getattr(trained, "num_workers", None)
        )
        if (value is trained or like) and not is_iterable(value.dataset):
            self.fetched.training = self.fetched.training or where
