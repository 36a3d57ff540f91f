"""Cursor: where a deterministic run is in its data, and how it gets there.

The position, and the ways to it: onwards, back to a saved one, over to other data. The pass that is
open there is an `OpenPass`; that the data of a saved position is what it was, `verification.py`
measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from crosstrain.backends import random_state
from crosstrain.engine.proof import Proof, Strictness
from crosstrain.engine.random_states import random_states_kept

from .batch_before import hold, is_comparable, record
from .flows import Dataflow, Iterate, how_exchanged
from .kinds import dataflow_of
from .open_pass import OpenPass, Spot
from .own_data import own_data
from .shares import BatchShare, Shards, world_of
from .streams import StreamKey, rank_seed, step_seed
from .verification import Verification

if TYPE_CHECKING:
    from crosstrain.backends import Backend

_NONE_YET: Final = {"reason": "the state was written before the first batch of a pass"}
_HANDLERS_CHANGE: Final = (
    " It is of the epoch before, and there are handlers of EPOCH_STARTED: if they change the data "
    "for their epoch, and all of it, the run goes on as it was all the same."
)


class Cursor:
    """Gives a run its batches, and knows how many it has given, of which pass of which data.

    Args:
        backend: iterates over the data, with prefetching where the device gains by it.
        shards: the logical shards that each batch is dealt out to; None: to the processes.
    """

    def __init__(self, backend: Backend | None, shards: Shards | None = None) -> None:
        self._backend = backend
        self._shards = shards
        # Not a method of this object: a cycle around a loader would keep its workers.
        self._iterate: Iterate = iter if backend is None else backend.batches
        # What keys the random streams of the run's data: that of each call is the next one's.
        self._key = StreamKey(0, 0)
        #: The data that the run is in; None before it was opened.
        self.flow: Dataflow | None = None
        self.reset()

    def reset(self) -> None:
        """Goes to where no run has begun."""
        if self.flow is not None:
            self.flow.close()
        self.flow = None
        # The pass of it that gives the batches.
        self._open_pass = OpenPass(iter(()))
        # How many batches that has given, and of how many the step is done.
        self._fetched = self._consumed = 0
        # Which pass of the run it is, and how often the data was exchanged.
        self._pass = self._exchanges = 0
        # Whether it has begun.
        self._begun = False
        # What was made for data before that is opened.
        self._prepared: Dataflow | None = None
        # A pass that was opened, and compared, before the handlers of an epoch's beginning ran.
        self._opened_before: OpenPass | None = None

    def rewind(self) -> None:
        """Goes to where no run has begun, in data of which is known what it was made with."""
        flow = self.seen
        self.reset()
        self._prepared = flow

    @property
    def seen(self) -> Dataflow | None:
        """The data that the run is in, or is opened next."""
        return self.flow or self._prepared

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._open_pass)
        self._fetched += 1
        return item

    def step_done(self) -> None:
        """Says that the step of the batch that was given last is done."""
        self._consumed = self._fetched

    @property
    def share(self) -> BatchShare | None:
        """What this process has of the last batch; None where batches are not dealt out."""
        return self._open_pass.share

    @property
    def between_batches(self) -> bool:
        """Whether the step of every batch that was given is done."""
        return self._fetched == self._consumed

    # ------------------------------------------------------------ what a state has of it

    def position(self) -> dict[str, Any] | None:
        """Returns where this is, as plain values; None before the data was opened."""
        if self.flow is None:
            return None
        return {
            "pass": self._pass,
            "batch": self._consumed,
            "exchanges": self._exchanges,
            "data": self.flow.fingerprint(),
            "flow": self.flow.state(),
            "before": self._before(self.flow),
        }

    def _before(self, flow: Dataflow) -> dict[str, Any]:
        """Returns what a state keeps of the batch that was consumed last."""
        if flow.unrepeatable is not None:
            return {"reason": flow.unrepeatable}
        if self._consumed == 0:
            if not self._exchanges:
                return dict(_NONE_YET)
            # Data that was exchanged is told by what it has in it.
            samples, world = flow.samples(), world_of(self._backend)
            told = None if samples is None else record(hold(samples), None, world)
            return {**_NONE_YET, "samples": told}
        if not self.between_batches:
            return {"reason": "the state was written in the middle of an iteration"}
        return self.last_batch() or {
            "reason": "the state was written before the run had fetched a batch"
        }

    def last_batch(self) -> dict[str, Any] | None:
        """Returns what is kept of the batch that was given last; None if none was."""
        last, indices = self._open_pass.given
        return None if last is None else record(last, indices, world_of(self._backend))

    # ------------------------------------------------------------ back to a saved position

    def watch(self, data: Any) -> None:
        """Notes what data is like before handlers change it."""
        before = self.flow
        if data is not None and (before is None or before.data is not own_data(data)):
            self._prepared = self._prepared_for(data)

    def _prepared_for(self, data: Any) -> Dataflow:
        """Returns the dataflow that was made for data already, or a new one."""
        flow = self._prepared
        return self._flow_of(data) if flow is None or flow.data is not own_data(data) else flow

    def prepare(self, position: Mapping[str, Any], data: Any) -> None:
        """Sets what handlers see of data to what it was when a position in it was written."""
        flow = self._prepared_for(data)
        opened = self._opened_before
        # What was opened already has its state.
        if flow.goes_with(position) and (opened is None or opened.flow is not flow):
            flow.prepare(position["flow"])
            self._prepared = flow

    def show(self, position: Mapping[str, Any], data: Any) -> None:
        """Does what `prepare` does, but that the data is opened as if it had not been shown."""
        flow = self._prepared = self._prepared_for(data)
        if flow.goes_with(position):
            flow.show(position["flow"])

    def check_before(
        self,
        position: Mapping[str, Any],
        data: Any,
        key: StreamKey,
        proof: Proof,
        strictness: Strictness,
    ) -> bool:
        """Compares the batch before a position at an epoch's beginning, before handlers run.

        What handlers of that beginning have changed by then is not to be told from what went wrong:
        a difference is a warning. Returns whether there was something to compare.
        """
        flow = self._prepared_for(data)
        if not flow.goes_with(position):
            return False
        before: Any = position.get("before")
        state, reason = position["flow"], is_comparable(before, world_of(self._backend))
        if reason is None and strictness == "off":
            return False
        if reason is not None and state.get("ended") is not False:
            # Nothing says that its iterator was there before handlers were called.
            return False
        self._prepared = flow
        flow.workers_then = position.get("workers")
        spot = self._spot(flow, key, position["pass"], position["batch"])
        check = Verification(spot, state, proof, strictness, _HANDLERS_CHANGE)
        if reason is None:
            self._opened_before = check.compare_ahead(before)
            return True
        proof.unchecked.append(f"the batch before: {reason}")
        self._opened_before = check.open_ahead()
        return False

    def go_to(
        self,
        position: Mapping[str, Any],
        data: Any,
        key: StreamKey,
        proof: Proof,
        strictness: Strictness = "error",
        other: str | None = None,
    ) -> Any:
        """Opens data at a position; leaves the global generators in any state.

        The batch before the position is fetched once more, and compared with what the state keeps
        of it; `other` says why it may be another one now. A process that has no random states to
        restore then calls `seed_anew`.

        Returns:
            The batch before; None where it was not fetched.
        """
        self._key = key
        flow, self._prepared = self._prepared_for(data), None
        opened, self._opened_before = self._opened_before, None
        flow.check(position)
        flow.workers_then = position.get("workers")
        self.flow = flow
        self._take_place(position)
        if opened is not None and opened.flow is flow:
            # It was compared already.
            self._open_pass = opened
            return None
        spot = self._spot(flow, key, self._pass, self._consumed)
        check = Verification(spot, position["flow"], proof, strictness, how_exchanged(position))
        self._open_pass = check.open(position.get("before"), other)
        return check.batch_before

    def _take_place(self, position: Mapping[str, Any]) -> None:
        self._pass, self._exchanges = position["pass"], position["exchanges"]
        self._fetched = self._consumed = position["batch"]
        self._begun = True

    def rehearse(self, data: Any, key: StreamKey, proof: Proof, strictness: Strictness) -> None:
        """Fetches the first batch of data that is opened next twice, and compares."""
        self._prepared = flow = self._prepared_for(data)
        begun, spot = flow.begun(), self._spot(flow, key, self._pass, self._consumed)
        Verification(spot, begun, proof, strictness).rehearse()
        if begun is not None:
            flow.prepare(begun)

    def fits(self, position: Mapping[str, Any], data: Any) -> bool:
        """Tells whether data is of the kind and the lengths of that which a position is in."""
        then: Mapping[str, Any] = position["data"]
        return then == self._flow_of(data).fingerprint()

    def go_on_with(self, position: Mapping[str, Any], data: Any, key: StreamKey) -> None:
        """Opens the data of the next run where one has ended, in this process or another."""
        self._take_place(position)
        self.open(data, key)

    def go_to_pass(self, number: int, batch: int, data: Any, key: StreamKey) -> None:
        """Opens data at a batch of a pass, as if this run had not had it before."""
        self._key, self.flow = key, self._flow_of(data)
        self._pass, self._consumed = number, batch
        self._open(self.flow, None, True)

    # ------------------------------------------------------------ onwards, and to other data

    def open(self, data: Any, key: StreamKey) -> None:
        """Opens data where the run is in it: at its beginning, or where it has paused."""
        self._key = key
        before, state = self.flow, None
        flow = before
        if flow is None or flow.data is not own_data(data):
            if before is not None:
                before.close()
            # One that is there knows what the data was made with, and what has changed since.
            flow = self.flow = self._prepared_for(data)
        self._prepared = None
        if self._begun and before is not None:
            # Other data of the same kind, given to the second half of a run, goes on as well.
            state = before.state() if before.fingerprint() == flow.fingerprint() else None
            if state is not None and before is not flow:
                # This dataset is as it was given.
                state = {name: value for name, value in state.items() if name != "dataset"}
        self._open(flow, state, not self._begun)

    def open_next_pass(self, data: Any, key: StreamKey) -> None:
        """Opens data anew, from its beginning."""
        self._end_pass()
        self._pass += 1
        self._consumed, self._begun = 0, False
        self.open(data, key)

    def exchange(
        self, position: Mapping[str, Any] | None = None, key: StreamKey | None = None
    ) -> None:
        """Says that other data is opened next, as another pass of the run.

        Args:
            position: where the run was that goes on so; None: where this is.
            key: what keyed the random streams there.
        """
        if position is not None:
            assert key is not None
            self._leave(position, key)
            self._pass, self._exchanges = position["pass"], position["exchanges"]
        elif self._begun:
            self._end_pass()
        self._exchanges += 1
        if position is not None or self._begun:
            self._pass += 1
            self._consumed, self._begun = 0, False

    def _leave(self, position: Mapping[str, Any], key: StreamKey) -> None:
        """Ends the pass of a position, as the run did that was saved when it left it.

        Its samplers have then drawn the rest; what is set now may draw from their generators.
        """
        flow, opened = self._prepared, self._opened_before
        self._opened_before = None
        if flow is None or not flow.goes_with(position):
            return
        batch = position["batch"]
        with random_states_kept(self._backend):
            if opened is None or opened.flow is not flow:
                opened = self._spot(flow, key, position["pass"], batch).open(position["flow"])
            flow.end(batch, opened.ended)
            opened.close()

    def close(self) -> None:
        """Lets go of iterators and workers; the position stays."""
        if self.flow is not None and self._begun:
            self.flow.close()
            self._end_pass()
            self._open_pass.close()

    def _end_pass(self) -> None:
        if self.flow is not None:
            self.flow.end(self._consumed, self._open_pass.ended)

    def seed_anew(self) -> None:
        """Seeds host and device for going on at this position without the states of before.

        They follow from the seed, the pass, the batch and the rank.
        """
        place = StreamKey(self._key.seed, self._pass, rank=world_of(self._backend).rank)
        self._seed(place.seed_at(self._consumed))

    # ------------------------------------------------------------ opening

    def _open(self, flow: Dataflow, state: Mapping[str, Any] | None, seeds: bool) -> None:
        """Opens the data at the position.

        The pass's seeding of the global generators stays in force where it begins (`seeds`); where
        a run goes on within a pass, they are left as they were.
        """
        if not seeds:
            with random_states_kept(self._backend):
                self._open_here(flow, state)
            return
        seed = (self._key.seed + self._pass) % 2**63
        self._seed(seed)
        self._open_here(flow, state)
        rank = world_of(self._backend).rank
        if flow.apart:
            # The data goes on drawing from that seed.
            self._seed(rank_seed(step_seed(seed), rank))
        elif rank and not flow.owners and self._shards is None:
            # The order was drawn alike everywhere; what the training draws is to differ.
            self._seed(rank_seed(seed, rank))

    def _seed(self, seed: int) -> None:
        # Every device's generators too.
        random_state.seed(seed)
        if self._backend is not None:
            self._backend.seed(seed)

    def _open_here(self, flow: Dataflow, state: Mapping[str, Any] | None) -> None:
        opened = self._spot(flow, self._key, self._pass, self._consumed).open(state)
        if self._consumed:
            opened.take_last(self._open_pass)
        self._open_pass = opened
        self._fetched, self._begun = self._consumed, True

    def _spot(self, flow: Dataflow, key: StreamKey, number: int, batch: int) -> Spot:
        world = world_of(self._backend)
        key = key._replace(epoch=number, rank=world.rank if flow.owners else 0)
        return Spot(flow, key, batch, world, self._shards)

    def _flow_of(self, data: Any) -> Dataflow:
        return dataflow_of(data, self._iterate, world_of(self._backend), self._shards)
