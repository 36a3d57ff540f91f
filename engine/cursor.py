"""Cursor: where a deterministic run is in its data, and how it gets there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from crosstrain.backends import random_state

from .dataflow import Dataflow, Iterate, NoData, ReplayedFlow, SequenceFlow, StatefulFlow
from .mapflow import MapFlow
from .own_states import is_stateful
from .sampling import is_iterable, is_loader
from .snapshot import random_states_kept
from .streams import StreamKey, seed_host

if TYPE_CHECKING:
    from crosstrain.backends import Backend

__all__ = ["Cursor", "dataflow_of"]


class Cursor:
    """Gives a run its batches, and knows how many it has given, of which pass of which data.

    Args:
        backend: iterates over the data, with prefetching where the device gains by it.
    """

    def __init__(self, backend: Backend | None) -> None:
        self._backend = backend
        # Not a method of this object: a cycle around a loader would keep its workers.
        self._iterate: Iterate = iter if backend is None else backend.batches
        self._iterator: Iterator[Any] = iter(())
        self._flow: Dataflow | None = None
        self.reset()

    def reset(self) -> None:
        """Goes to where no run has begun."""
        if self._flow is not None:
            self._flow.close()
        self._flow = None
        self._iterator = iter(())
        #: How many batches the pass has given, and of how many the step is done.
        self.fetched = self.consumed = 0
        #: Whether a pass has been opened.
        self.opened = False
        self._pass = self._exchanges = 0
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        self.fetched += 1
        return item

    @property
    def between_batches(self) -> bool:
        """Whether the step of every batch that was given is done."""
        return self.fetched == self.consumed

    def position(self) -> dict[str, Any] | None:
        """Returns where this is, as plain values; None before the data was opened."""
        if self._flow is None:
            return None
        return {
            "pass": self._pass,
            "batch": self.consumed,
            "exchanges": self._exchanges,
            "data": self._flow.fingerprint(),
            "flow": self._flow.state(),
        }

    def go_to(self, position: Mapping[str, Any], data: Any, key: StreamKey) -> None:
        """Opens data at a position; leaves the global generators in any state.

        Args:
            position: what `position` returned.
            data: the data.
            key: the run's seed and streams.

        Raises:
            ValueError: if it is not the data that the position is in.
        """
        flow = dataflow_of(data, self._iterate)
        _check_data(position, flow.fingerprint())
        self._flow = flow
        self._pass, self._exchanges = position["pass"], position["exchanges"]
        self.consumed = position["batch"]
        self._open_flow(key, position["flow"])

    def go_to_pass(self, number: int, batch: int, data: Any, key: StreamKey) -> None:
        """Opens data at a batch of a pass, as if this run had not had it before."""
        self._flow = dataflow_of(data, self._iterate)
        self._pass, self.consumed = number, batch
        self._open(key, None, True)

    def open(self, data: Any, key: StreamKey) -> None:
        """Opens data where the run is in it: at its beginning, or where it has paused."""
        before, state = self._flow, None
        if before is None or before.data is not data:
            if before is not None:
                before.close()
            self._flow = dataflow_of(data, self._iterate)
        assert self._flow is not None
        if self.opened and before is not None:
            # Other data of the same kind, given to the second half of a run, goes on as well.
            state = before.state() if before.fingerprint() == self._flow.fingerprint() else None
        self._open(key, state, not self.opened)

    def open_next_pass(self, data: Any, key: StreamKey) -> None:
        """Opens data anew, from its beginning."""
        if self._flow is not None:
            self._flow.end(self.consumed, self._ended)
        self._pass += 1
        self.consumed = 0
        self.opened = False
        self.open(data, key)

    def exchange(self, position: Mapping[str, Any] | None = None) -> None:
        """Says that other data is opened next, as another pass of the run.

        Args:
            position: where the run is, if it has not gone there yet.
        """
        if position is not None:
            self._pass, self._exchanges = position["pass"], position["exchanges"]
        elif not self.opened:
            return
        elif self._flow is not None:
            self._flow.end(self.consumed, self._ended)
        self._pass += 1
        self._exchanges += 1
        self.consumed = 0
        self.opened = False

    def close(self) -> None:
        """Lets go of iterators and workers; the position stays."""
        if self._flow is not None and self.opened:
            self._flow.close()
            self._flow.end(self.consumed, self._ended)
            self._iterator = iter(())

    def _open(self, key: StreamKey, state: Mapping[str, Any] | None, seeds: bool) -> None:
        """Opens the data at the position.

        Args:
            key: the run's seed and streams.
            state: the dataflow's state there, if it has one.
            seeds: whether the pass's seeding of the global generators stays in force, as where it
                begins; where a run goes on within a pass, they are left as they were.
        """
        if not seeds:
            with random_states_kept(self._backend):
                self._open_flow(key, state)
            return
        seed = (key.seed + self._pass) % 2**63
        # Every device's generators too.
        random_state.seed(seed)
        if self._backend is not None:
            self._backend.seed(seed)
        self._open_flow(key, state)

    def _open_flow(self, key: StreamKey, state: Mapping[str, Any] | None) -> None:
        assert self._flow is not None
        seed_host((key.seed + self._pass) % 2**63)
        self._iterator = self._flow.open(key._replace(epoch=self._pass), self.consumed, state)
        self.fetched, self.opened, self._ended = self.consumed, True, False


def dataflow_of(data: Any, iterate: Iterate) -> Dataflow:
    """Returns the dataflow for a kind of data.

    Args:
        data: what `Engine.run` was given; None for a run without data.
        iterate: makes an iterator of data that may be fetched ahead.
    """
    if data is None:
        return NoData(data)
    dataset = data.dataset if is_loader(data) else None
    if is_loader(data) and not is_iterable(dataset):
        return MapFlow(data, iterate)
    if is_stateful(data):
        return StatefulFlow(data, data)
    if is_loader(data) and data.num_workers == 0 and is_stateful(dataset):
        return StatefulFlow(data, dataset)
    return SequenceFlow(data, iterate) if _is_sequence(data) else ReplayedFlow(data)


def _is_sequence(data: Any) -> bool:
    return isinstance(data, (Sequence, torch.Tensor, numpy.ndarray))


def _check_data(position: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    then: Mapping[str, Any] = position["data"]
    if then == now:
        return
    count = position["exchanges"]
    exchanged = f" after set_data() had exchanged the data {count} times" if count else ""
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    changes = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in names]
    raise ValueError(
        f"The state was written{exchanged} with other data than run() was given: a position in one "
        f"is none in the other ({'; '.join(changes)}). Give run() the data, batch size, sampler "
        "and dataset that the run had when the state was written."
    )
