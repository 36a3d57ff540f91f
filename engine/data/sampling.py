"""Batch samplers that start at any batch, and loaders rebuilt around them."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, Final, TypeGuard, TypeVar, cast

import numpy
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from crosstrain.backends import World, random_state

from .order import Batch, batches_from, computes_its_order, is_seekable, samples_from
from .own_states import OwnStates, Raw
from .shares import Dealt, Waiting, deal, deal_spans
from .streams import KeyedIndex, KeyedIndices, StreamKey

T = TypeVar("T")

# How many batches of a sampler of unknown type are drawn at once, under random states of its own.
_AHEAD: Final = 64


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
        if not isinstance(batch_sampler, Iterable) or isinstance(batch_sampler, (str, bytes)):
            raise TypeError(
                "Argument batch_sampler should be torch.utils.data.sampler.BatchSampler or another "
                f"iterable of lists of indices, got {type(batch_sampler)}"
            )
        self.batch_sampler: Any = batch_sampler
        self.sampler: Any = getattr(batch_sampler, "sampler", None)
        self.batch_size: Any = getattr(batch_sampler, "batch_size", None)
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

    Where the samplers carry something from pass to pass, their order is drawn some batches at a
    time under states that nobody else sees: what handlers change, or draw from the same generators,
    neither changes the pass nor depends on how far it was drawn ahead.

    Args:
        sampler: the loader's batch sampler, or its sampler where it does not batch.
        batched: whether it gives batches.
        collates: whether collating them may draw random numbers.
        world: among which processes each batch is dealt out.
        own: what the samplers carry from pass to pass.
    """

    def __init__(
        self, sampler: Any, batched: bool, collates: bool, world: World, own: OwnStates
    ) -> None:
        self.sampler = sampler
        self._world = world
        #: The sampler of single samples, if there is one.
        self.inner: Any = getattr(sampler, "sampler", None) if batched else sampler
        #: Whether a loader has asked for the order of this pass.
        self.asked = False
        #: The threads that batches of it were asked for in.
        self.threads: set[int] = set()
        #: Of each batch that was asked for and not given yet: its indices, and what is this
        #: process's; None where nothing is dealt out.
        self.waiting: deque[Waiting] = deque()
        self._batched = batched
        self._collates = collates
        #: Whether the order can be entered anywhere, and ends where its length says.
        self.is_seekable = is_seekable(self.inner) and (
            not batched or type(sampler) is BatchSampler
        )
        self._items: Iterator[Any] = iter(())
        self._own = own
        #: The samplers' states as everybody sees them since the pass was opened, and, in a list of
        #: one, as the order has them that far.
        self.visible: Raw = {}
        self.ahead: list[Raw] = [{}]
        #: Whether the order has nothing from where it was opened.
        self.is_over = False

    def begin(self, key: StreamKey, start: int) -> None:
        """Opens the order of a pass at a batch; draws from the global generators as torch does."""
        if computes_its_order(self.inner) and callable(getattr(self.inner, "set_epoch", None)):
            # An order that is computed from its epoch; it has no random state to tell passes apart.
            self.inner.set_epoch(key.epoch)
        # New ones: an iterator of an earlier pass may still have the old.
        self.waiting, self.threads, self.asked = deque(), set(), False
        keyed = _batch if self._batched else _sample
        keys = key.base, key.streams, self._collates
        parts = self._parts(start)
        self._items = _noted(parts, lambda part: keyed(part, *keys), self.waiting, self.threads)

    def _opened(self, start: int) -> Iterator[Batch]:
        own = self._own if self._own.moves else None
        if self.is_seekable and own is None:
            first, order = self._from(self.order(start), 1)
            self.visible = self._own.raw()
            return chain(first, order)
        # What everybody sees is what the first batches leave, wherever the pass is entered.
        many, entry = (1 if self.is_seekable else _AHEAD), self._own.raw()
        drawn_from = random_state.capture()
        first, order = self._from(self.order(0), many)
        self.visible = self._own.raw()
        if start and self.is_seekable:
            self._own.put(entry)
            random_state.restore(drawn_from)
            first, order = self._from(self.order(start), many)
        elif start:
            left = first[start:]
            first = left or list(islice(order, max(0, start - many), start)) if first else []
            self.is_over = not first
        self.ahead = [self._own.raw(False)]
        self._own.put(self.visible)
        return chain(first, _rest(order, random_state.capture(), own, self.ahead))

    def _from(self, order: Iterator[T], many: int) -> tuple[list[T], Iterator[T]]:
        # Drawn now, while the generators are as they were seeded for this pass.
        first = list(islice(order, many))
        self.is_over = not first
        return first, order

    def _parts(self, start: int) -> Iterator[Dealt]:
        """Returns this process's part of each batch from one on; where there is one, all of it."""
        if self._world.size == 1:
            return (Dealt(one.number, one.first, 0, one.indices) for one in self._opened(start))
        if not self._batched:
            return deal(_lists(self._opened(start)), self._world)
        spans = deal_spans(self.sampler, start, self._world)
        if spans is None:
            return deal(self._opened(start), self._world)
        return chain(*self._from(spans, 1))

    def order(self, start: int) -> Iterator[Batch]:
        """Returns the order from a batch on; drawn when it is asked for, as torch draws it."""
        # Not a generator of this object: that would be a cycle, which keeps the data.
        return (batches_from if self._batched else _singles)(self.sampler, start)

    def walk(self, batches: int) -> None:
        """Draws the order of a pass as far as giving some batches takes it, and gives nothing."""
        order = self.order(max(0, batches - 1))
        if batches:
            next(order, None)
        if self.is_seekable and batches == len(self.sampler):
            # torch draws once more to learn that there is nothing left.
            next(order, None)

    def __iter__(self) -> Iterator[Any]:
        # The same iterator each time: torch's loaders ask twice and use the second.
        self.asked = True
        return self._items

    def __len__(self) -> int:
        return len(self.sampler)


def _noted(
    parts: Iterator[Dealt],
    keyed: Callable[[Dealt], Any],
    waiting: deque[Waiting],
    threads: set[int],
) -> Iterator[Any]:
    """Yields parts of batches with their keys, and notes what is in each, and who asks."""
    for part in parts:
        item = keyed(part)
        waiting.append((item, part.share))
        threads.add(threading.get_ident())
        yield item


def _batch(part: Dealt, base: int, streams: tuple[str, ...], collates: bool) -> KeyedIndices:
    place = (part.number, part.first, collates, part.offset)
    return KeyedIndices(part.indices, base, streams, *place)


def _sample(part: Dealt, base: int, streams: tuple[str, ...], _: bool) -> KeyedIndex:
    # Here positions count what the sampler gives, and not what is in it.
    return KeyedIndex(part.indices, base, streams, part.number, part.offset)


def _lists(order: Iterator[Batch]) -> Iterator[Batch]:
    for item in order:
        if not isinstance(item.indices, (list, numpy.ndarray, torch.Tensor)):
            raise ValueError(
                "With batch_size=None this loader takes one sample an iteration, which cannot be "
                "dealt out to several processes. Give it a batch_size of at least as many as there "
                "are, or a sampler that gives lists of indices."
            )
        yield item


def _singles(sampler: Any, start: int) -> Iterator[Batch]:
    for position, index in enumerate(samples_from(sampler, start), start):
        yield Batch(position, position, index)


def _rest(
    order: Iterator[Batch], states: dict[str, Any], own: OwnStates | None, ahead: list[Raw]
) -> Iterator[Batch]:
    """Draws an order under random states and sampler states of its own, some batches at a time.

    It may draw from the global generators at any batch, between draws of the training.
    """
    while True:
        with random_state.preserved():
            random_state.restore(states)
            visible = {} if own is None else own.raw(False)
            if own is not None:
                own.put(ahead[0], False)
            drawn = list(islice(order, _AHEAD))
            if own is not None:
                ahead[0] = own.raw(False)
                own.put(visible, False)
            states = random_state.capture()
        yield from drawn
        if len(drawn) < _AHEAD:
            return


def update_dataloader(dataloader: DataLoader[Any], new_batch_sampler: Any) -> DataLoader[Any]:
    """Returns a loader that differs from another in its batch sampler only.

    Args:
        dataloader: the loader, which is left as it is.
        new_batch_sampler: takes the place of its batch sampler.

    Raises:
        TypeError: if the loader does not batch, or its dataset is iterable and takes no sampler.
    """
    given: Any = dataloader
    if given.batch_sampler is None or is_iterable(given.dataset):
        raise TypeError(
            "update_dataloader() takes a DataLoader over a map-style dataset, with a batch size; "
            f"this one has batch_size={given.batch_size} and a {type(given.dataset).__name__}."
        )
    loader: DataLoader[Any] = rebuilt(given, batch_sampler=new_batch_sampler)
    return loader


def is_loader(data: Any) -> TypeGuard[DataLoader[Any]]:
    """Tells whether data is a DataLoader of torch's or a subclass's.

    One whose constructor has not run only wraps another: it is iterated over as what it is.
    """
    return isinstance(data, DataLoader) and "dataset" in vars(data)


def is_iterable(dataset: Any) -> bool:
    """Tells whether a dataset is iterable, as opposed to map-style."""
    return isinstance(dataset, IterableDataset)


def rebuilt(loader: Any, **changes: Any) -> Any:
    """Returns a copy of a loader with other attributes, without running its constructor again.

    A constructor of a subclass takes arguments that nobody knows, and torch's own forbids to set
    these attributes later.
    """
    twin: Any = copy.copy(loader)
    attributes = cast("dict[str, Any]", vars(twin))
    # A running iterator with its workers belongs to the original, as does a state that torchdata's
    # loader was given.
    own = {"_iterator": None, "next_iter_state": None}
    attributes.update({name: value for name, value in own.items() if name in attributes})
    attributes.update(changes)
    return twin
