"""Batch samplers that start at any batch, and loaders rebuilt around them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader

from crosstrain.backends import random_state

from .order import Batch, batches_from, is_seekable, samples_from
from .streams import KeyedIndex, KeyedIndices, StreamKey

__all__ = ["KeyedSampler", "ReproducibleBatchSampler", "generators_of", "update_dataloader"]

# How many batches of a sampler of unknown type are drawn at once, under random states of its own.
_AHEAD = 64


class ReproducibleBatchSampler(BatchSampler):
    """A batch sampler that starts at any batch; it fetches nothing and keeps no list of batches.

    It gives the batches that the sampler it wraps would give, and draws the same random numbers.

    Args:
        batch_sampler: the batch sampler of a loader, or any iterable of lists of indices.
        start_iteration: the batch that the next iteration starts with; used once.

    Raises:
        TypeError: if `batch_sampler` is not iterable.
    """

    def __init__(self, batch_sampler: Any, start_iteration: int | None = None) -> None:
        if not isinstance(batch_sampler, Iterable):
            raise TypeError(
                "Argument batch_sampler should be torch.utils.data.sampler.BatchSampler or another "
                f"iterable of lists of indices, got {type(batch_sampler)}"
            )
        self.batch_sampler: Any = batch_sampler
        self.sampler = getattr(batch_sampler, "sampler", None)  # type: ignore[assignment]
        self.batch_size = getattr(batch_sampler, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(batch_sampler, "drop_last", False)
        self.start_iteration = start_iteration

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start_iteration = self.start_iteration or 0, None
        for batch in batches_from(self.batch_sampler, start):
            yield batch.indices

    def __len__(self) -> int:
        return len(self.batch_sampler)


class KeyedSampler:
    """Gives a loader the order of one pass at a time, each batch with the key of its streams.

    Args:
        sampler: the loader's batch sampler, or its sampler where it does not batch.
        batched: whether it gives batches.
    """

    def __init__(self, sampler: Any, batched: bool) -> None:
        self.sampler = sampler
        self.batched = batched
        self._items: Iterator[Any] = iter(())

    def begin(self, key: StreamKey, start: int) -> None:
        """Opens the order of a pass at a batch, drawing from the global generators as torch does.

        Args:
            key: what keys the pass.
            start: how many batches, or samples where it does not batch, to leave out.
        """
        inner = getattr(self.sampler, "sampler", None) if self.batched else self.sampler
        if hasattr(inner, "indices") and callable(getattr(inner, "set_epoch", None)):
            # An order that is computed from its epoch; it has no random state to tell passes apart.
            inner.set_epoch(key.epoch)  # type: ignore[union-attr]
        order = self._order(start)
        seekable = is_seekable(inner) and (not self.batched or type(self.sampler) is BatchSampler)
        # Drawn now, while the generators are as they were seeded for this pass.
        order = _primed(order) if seekable else _secluded(order)
        if self.batched:
            self._items = (KeyedIndices(b.indices, key, b.number, b.first) for b in order)
        else:
            self._items = (KeyedIndex(b.indices, key, b.first) for b in order)

    def _order(self, start: int) -> Iterator[Batch]:
        if self.batched:
            yield from batches_from(self.sampler, start)
        else:
            for position, index in enumerate(samples_from(self.sampler, start), start):
                yield Batch(position, position, index)

    def __iter__(self) -> Iterator[Any]:
        # The same iterator each time: torch's loaders ask twice and use the second.
        return self._items

    def __len__(self) -> int:
        return len(self.sampler)


def _primed(order: Iterator[Batch]) -> Iterator[Batch]:
    first = list(islice(order, 1))

    def items() -> Iterator[Batch]:
        yield from first
        yield from order

    return items()


def _secluded(order: Iterator[Batch]) -> Iterator[Batch]:
    """Runs a sampler of unknown type under random states of its own, some batches at a time.

    It may draw from the global generators at any batch, between draws of the training.
    """
    own = random_state.capture()

    def items() -> Iterator[Batch]:
        nonlocal own
        while True:
            with random_state.preserved():
                random_state.restore(own)
                drawn = list(islice(order, _AHEAD))
                own = random_state.capture()
            yield from drawn
            if len(drawn) < _AHEAD:
                return

    return items()


def generators_of(loader: Any) -> dict[str, Any]:
    """Returns the generators that a loader and its samplers hold of their own, by name.

    Args:
        loader: a DataLoader.

    Returns:
        `torch.Generator`, `random.Random` and `numpy.random.Generator` objects, each once.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = {
        "loader": loader,
        "batch_sampler": batch_sampler,
        "sampler": getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None),
    }
    found: dict[str, Any] = {}
    kinds = (torch.Generator, random.Random, numpy.random.Generator)
    for owner, thing in owners.items():
        for name, value in getattr(thing, "__dict__", {}).items():
            if isinstance(value, kinds) and not any(value is known for known in found.values()):
                found[f"{owner}.{name}"] = value
    return found


def update_dataloader(dataloader: DataLoader[Any], new_batch_sampler: Any) -> DataLoader[Any]:
    """Returns a loader that differs from another in its batch sampler only.

    Args:
        dataloader: the loader, which is left as it is.
        new_batch_sampler: takes the place of its batch sampler.

    Raises:
        TypeError: if the loader does not batch, or its dataset is iterable and takes no sampler.
    """
    if getattr(dataloader, "batch_sampler", None) is None:
        raise TypeError(
            "update_dataloader() takes a DataLoader over a map-style dataset with a batch size; "
            f"this one has batch_size={getattr(dataloader, 'batch_size', None)} and a dataset of "
            f"type {type(getattr(dataloader, 'dataset', None)).__name__}."
        )
    return rebuilt(dataloader, batch_sampler=new_batch_sampler)


def rebuilt(loader: Any, **changes: Any) -> Any:
    """Returns a copy of a loader with other attributes, without running its constructor again.

    A constructor of a subclass takes arguments that nobody knows, and torch's own forbids to set
    these attributes later.
    """
    twin = copy.copy(loader)
    # A running iterator with its workers belongs to the original.
    twin.__dict__.update(_iterator=None, **changes)
    return twin
