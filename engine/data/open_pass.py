"""An open pass: a place at which data is opened, and the batches that it gives from there on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from crosstrain.backends import World

from .batch_before import Held
from .flows import Dataflow
from .shares import BatchShare, ShardedBatch, Shards
from .streams import StreamKey, plain_indices, seed_host


class Spot(NamedTuple):
    """A place in data at which it can be opened.

    Args:
        flow: the data.
        key: what keys the pass, and says which it is.
        batch: how many batches of the pass come before.
        world: which process of how many this is.
        shards: the logical shards that each batch is dealt out to; None: to the processes.
    """

    flow: Dataflow
    key: StreamKey
    batch: int
    world: World
    shards: Shards | None

    def open(self, state: Mapping[str, Any] | None, again: int = 0) -> OpenPass:
        """Opens the data here; `state` and `again` are as of `Dataflow.open`."""
        seed_host(self.key.host_seed)
        iterator = self.flow.open(self.key, self.batch, state, again)
        if self.shards is None or not self.flow.is_dealt:
            return OpenPass(iterator, self.flow)
        return _ShardedPass(iterator, self.flow, self.shards, self.world)


class OpenPass:
    """Gives the batches of a pass that was opened, and knows what it gave last.

    Args:
        iterator: over what is left of the pass.
        flow: the data, where there is any: it tells what was fetched and not given yet.
    """

    def __init__(self, iterator: Iterator[Any], flow: Dataflow | None = None) -> None:
        self._iterator = iterator
        #: The data.
        self.flow = flow
        self._held = None if flow is None else flow.held
        self._waiting = None if flow is None else flow.waiting
        #: Whether it has no further batch, as far as is known.
        self.ended = False
        #: What this process has of the last batch; None where batches are not dealt out.
        self.share: BatchShare | None = None
        # The last batch as it was fetched, with its indices, as far as they are known.
        self._last: Held | None = None
        self._last_indices: Any = None

    def __next__(self) -> Any:
        try:
            item = next(self._iterator)
        except StopIteration:
            self.ended = True
            raise
        if self._held:
            self._last = self._held.popleft()
        if self._waiting:
            self._last_indices, self.share = self._waiting.popleft()
        elif self.flow is not None and self.flow.is_dealt:
            raise RuntimeError(
                f"{type(self.flow.data).__name__} gives more batches than its batch sampler has "
                "lists, so it is not known how many samples of a batch are this process's. Give "
                "DeterministicEngine.run() a torch.utils.data.DataLoader."
            )
        return item

    @property
    def given(self) -> tuple[Held | None, Any]:
        """The last batch as it was fetched, with its indices as they are recorded."""
        return self._last, plain_indices(self._last_indices)

    def take_last(self, other: OpenPass) -> None:
        """Takes the batch that another gave last for the one before its own."""
        self._last, self._last_indices = other._last, other._last_indices

    def close(self) -> None:
        """Lets go of what it iterates over; what it gave last is still known."""
        self._iterator = iter(())


class _ShardedPass(OpenPass):
    """Gives the parts of each batch that are this process's logical shards, put together."""

    def __init__(
        self, iterator: Iterator[Any], flow: Dataflow, shards: Shards, world: World
    ) -> None:
        super().__init__(iterator, flow)
        self._own, self._processes = shards.own, world.size

    def __next__(self) -> ShardedBatch:
        parts: list[Any] = []
        shares: list[BatchShare] = []
        held: list[Held] = []
        indices: list[Any] = []
        for _ in self._own:
            parts.append(super().__next__())
            assert self.share is not None
            shares.append(self.share)
            last, own = self.given
            if last is not None:
                held.append(last)
            indices.append(own)
        self._last = [item for item, _ in held], [one for _, many in held for one in many]
        self._last_indices = indices
        samples = sum(share.samples for share in shares)
        self.share = BatchShare(samples, shares[0].total, self._processes)
        return ShardedBatch(parts, shares, self._own.start)
