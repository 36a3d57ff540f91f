"""Cursor: where a deterministic run is in its data, and how it gets there.

The position, the ways to it (onwards, back to a saved one, over to other data) and the proof that
the data there is what it was are one file: each moves the same few values, and none is right alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy
import torch

from crosstrain.backends import World, random_state
from crosstrain.engine.digest import same
from crosstrain.engine.errors import ResumeError
from crosstrain.engine.proof import Proof, Strictness
from crosstrain.engine.random_states import random_states_kept

from .batch_before import Held, compare, compare_twice, differs, hold, is_comparable, record
from .flows import Dataflow, Iterate, NoData, ReplayedFlow, SequenceFlow
from .mapflow import MapFlow
from .own_data import is_map_style, is_own, not_dealt_out, own_data
from .own_states import is_stateful
from .sampling import is_loader
from .shares import ALONE, BatchShare, ShardedBatch, Shards, counted, world_of
from .stateful import StatefulFlow
from .streams import StreamKey, plain_indices, rank_seed, seed_host, step_seed

if TYPE_CHECKING:
    from crosstrain.backends import Backend

_NONE: Final = object()
_NONE_YET: Final = {"reason": "the state was written before the first batch of a pass"}
_HANDLERS_CHANGE: Final = (
    " It is of the epoch before, and there are handlers of EPOCH_STARTED: if they change the data "
    "for their epoch, and all of it, the run goes on as it was all the same."
)
_EXCHANGED: Final = (
    " The run that was saved had exchanged its data, {} time(s): give run() the data that was set "
    "last, or set it in a handler of STARTED that asks trainer.state.iteration."
)
_NO_PLACE: Final = (
    " So its state_dict does not tell what comes next: a shuffle buffer or what was read ahead is "
    "lost, an order is drawn anew, or load_state_dict does not take all of it. Have the state hold "
    "it, or take state_dict away, so that what comes before is fetched and thrown away."
)


@dataclass(frozen=True)
class _Opened:
    """A pass that was opened, and compared, before the handlers of an epoch's beginning ran."""

    flow: Dataflow
    iterator: Iterator[Any]
    ended: bool
    last: Held | None
    indices: Any


class _Check(NamedTuple):
    """The state that data is opened at (None: a new pass), and how it is compared there."""

    state: Any
    proof: Proof
    strictness: Strictness


class Cursor:
    """Gives a run its batches, and knows how many it has given, of which pass of which data.

    Args:
        backend: iterates over the data, with prefetching where the device gains by it.
        shards: the logical shards that each batch is dealt out to; None: to the processes.
    """

    def __init__(self, backend: Backend | None, shards: Shards | None = None) -> None:
        self._backend = backend
        self._logical = shards
        # Not a method of this object: a cycle around a loader would keep its workers.
        self._iterate: Iterate = iter if backend is None else backend.batches
        # What keys the random streams of the run's data: that of each call is the next one's.
        self._key = StreamKey(0, 0)
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
        #: What this process has of the last batch; None where batches are not dealt out.
        self.share: BatchShare | None = None
        self._shares: deque[BatchShare] | None = None
        # The batch that was given last, with its indices, as far as they are known.
        self._last: Held | None = None
        self._last_indices: Any = None
        # The batch before a position, as it was fetched once more.
        self._again: Any = None
        self._held: deque[Held] = deque()
        self._prepared: Dataflow | None = None
        self._opened_before: _Opened | None = None
        self._indices: deque[Any] | None = None
        self._pass = self._exchanges = 0
        self._ended = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        logical = self._logical
        if logical is None or self._shares is None:
            item = self._fetch()
            self.fetched += 1
            return item
        parts: list[Any] = []
        shares: list[BatchShare] = []
        held: list[Held] = []
        indices: list[Any] = []
        for _ in logical.own:
            parts.append(self._fetch())
            assert self.share is not None
            shares.append(self.share)
            if self._last is not None:
                held.append(self._last)
            indices.append(plain_indices(self._last_indices))
        self.fetched += 1
        self._last = [item for item, _ in held], [one for _, many in held for one in many]
        self._last_indices = indices
        self.share = BatchShare(
            sum(share.samples for share in shares), shares[0].total, world_of(self._backend).size
        )
        return ShardedBatch(parts, shares, logical.own.start)

    def _fetch(self) -> Any:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        if self._held:
            self._last = self._held.popleft()
        if self._indices:
            self._last_indices = self._indices.popleft()
        if self._shares is not None and self._flow is not None:
            self.share = counted(self._shares, self._flow.data)
        return item

    def step_done(self) -> None:
        """Says that the step of the batch that was given last is done."""
        self.consumed = self.fetched

    @property
    def between_batches(self) -> bool:
        """Whether the step of every batch that was given is done."""
        return self.fetched == self.consumed

    @property
    def _known(self) -> Dataflow:
        """The data that the run is in, where it has come to some."""
        assert self._flow is not None
        return self._flow

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
            "before": self._before(),
        }

    def _before(self) -> dict[str, Any]:
        """Returns what a state keeps of the batch that was consumed last."""
        flow, last = self._known, self._last
        if flow.unrepeatable is not None:
            return {"reason": flow.unrepeatable}
        if self.consumed == 0:
            return self._exchanged() if self._exchanges else dict(_NONE_YET)
        if not self.between_batches:
            return {"reason": "the state was written in the middle of an iteration"}
        if last is None:
            return {"reason": "the state was written before the run had fetched a batch"}
        return record(*self._given(last), world_of(self._backend))

    def _given(self, last: Any) -> tuple[Any, Any]:
        """Returns the batch that was given last, with its indices as they are recorded."""
        return last, plain_indices(self._last_indices)

    def _exchanged(self) -> dict[str, Any]:
        """Returns what tells data that was exchanged before its first batch."""
        samples = self._known.samples()
        if samples is None:
            return {**_NONE_YET, "samples": None}
        return {**_NONE_YET, "samples": record(hold(samples), None, world_of(self._backend))}

    def _compare_samples(self, before: Any, proof: Proof, strictness: Strictness) -> None:
        """Compares a few samples of data that was exchanged before its first batch."""
        flow = self._known
        if not isinstance(before, Mapping) or "samples" not in before or strictness == "off":
            return
        then = before["samples"]
        samples = None if then is None else flow.samples()
        if then is None or samples is None:
            proof.differs(
                "The state was written after set_data() had exchanged the data and before its "
                "first batch, so that no batch of it could be compared. Make sure that run() is "
                "given that data, and not the data of before.",
                "warn",
            )
            return
        what = "what set_data() had given the run"
        compare(then, hold(samples), None, what, flow.suspects(), proof, strictness)

    def watch(self, data: Any) -> None:
        """Notes what data is like before handlers change it."""
        before = self._flow
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
        if _is_data(position, flow) and (opened is None or opened.flow is not flow):
            flow.prepare(position["flow"])
            self._prepared = flow

    def go_to(
        self,
        position: Mapping[str, Any],
        data: Any,
        key: StreamKey,
        proof: Proof,
        strictness: Strictness = "error",
        other: str | None = None,
    ) -> None:
        """Opens data at a position; leaves the global generators in any state.

        The batch before the position is fetched once more, and compared with what the state keeps
        of it; `other` says why it may be another one now. A process that has no random states to
        restore then calls `seed_anew`.
        """
        self._key = key
        flow, self._prepared = self._prepared_for(data), None
        before_handlers, self._opened_before = self._opened_before, None
        _check_data(position, flow)
        flow.workers_then = position.get("workers")
        self._flow = flow
        self._pass, self._exchanges = position["pass"], position["exchanges"]
        self.consumed = position["batch"]
        if before_handlers is not None and before_handlers.flow is flow:
            # It was opened, and compared, already.
            self._note_opened(flow, before_handlers.iterator)
            self._ended = before_handlers.ended
            self._last, self._last_indices = before_handlers.last, before_handlers.indices
            return
        before: Any = position.get("before")
        check = _Check(position["flow"], proof, strictness)
        if strictness == "off":
            self._open_flow(check.state)
        elif (reason := other or is_comparable(before, world_of(self._backend))) is None:
            self._open_after(before, check)
        else:
            proof.unchecked.append(f"the batch before: {reason}")
            self._compare_samples(before, proof, strictness)
            if other is None:
                self._hear_witness(check)
            if (doubt := flow.doubt(check.state, self._pass)) is not None:
                proof.differs(f"The data may not go on as it was: {doubt}.", "warn")
            self._rehearse(check)
            self._open_flow(self._with_its_end(check.state))

    def _with_its_end(self, state: Any) -> Any:
        """Returns a state that says that its pass has ended, where the data itself takes it so.

        Whether a further batch comes was not known when it was written. Data that has given all of
        its length and gives another batch at once begins another pass by that.
        """
        if state is None or state.get("ended") is not False or "replay" in state:
            return state
        if self._known.fingerprint().get("batches") != self.consumed:
            return state
        return state if self._look_at(state, 0, False) is None else {**state, "ended": True}

    def _open_after(self, before: Mapping[str, Any], check: _Check, note: str = "") -> None:
        """Opens data after the batch before, which is fetched once more and compared."""
        flow, state = self._open_at(before, check, note), check.state
        last = self._last, self._last_indices
        if flow.keeps_anew(state):
            flow.probe(state, True)
            self._fetch_again(state)
            self._tell_kept(check.proof)
            self._open_flow(state)
        # Fetching may have changed it.
        flow.give_dataset(state, "now")
        if state.get("dataset", {}).get("now"):
            # It may have come from what the dataset keeps: the next one need not.
            self._rehearse(check, 0)
            self._open_flow(state)
            flow.give_dataset(state, "now")
            self._last, self._last_indices = last

    def _open_at(self, before: Mapping[str, Any], check: _Check, note: str = "") -> Dataflow:
        """Opens data at the batch before, and compares it; returns the dataflow."""
        flow = self._known
        flow.probe(check.state)
        self._fetch_before(before, check.state)
        self._tell_kept(check.proof)
        place = f"batch {self.consumed} of pass {self._pass + 1}"
        if self._exchanges:
            note += _EXCHANGED.format(self._exchanges)
        last, indices = (None, None) if self._ended else self._given(self._last)
        try:
            compare(
                before, last, indices, place, flow.suspects(), check.proof, check.strictness, note
            )
        except ResumeError:
            # The right data may be given to the next run.
            flow.close()
            raise
        return flow

    def rehearse(self, data: Any, key: StreamKey, proof: Proof, strictness: Strictness) -> None:
        """Fetches the first batch of data that is opened next twice, and compares."""
        self._key, before = key, self._flow
        self._flow = self._prepared = flow = self._prepared_for(data)
        begun = flow.begun()
        self._rehearse(_Check(begun, proof, strictness))
        if begun is not None:
            flow.prepare(begun)
        self._flow, self.opened = before, False

    def _rehearse(self, check: _Check, again: int | None = None) -> None:
        """Fetches a batch twice from the same states: what draws from elsewhere is found."""
        flow, (state, proof, strictness) = self._known, check
        repeatable = flow.rehearsal(self.consumed, state)
        again = repeatable if again is None or repeatable is None else again
        if again is None or strictness == "off":
            return
        first, second = (self._look_at(state, again, bool(self.consumed)) for _ in range(2))
        if first is not None and second is not None:
            place = f"batch {self.consumed + 1 - again} of pass {self._pass + 1}"
            told = record(*first, world_of(self._backend))
            compare_twice(told, *second, place, flow.suspects(), proof, strictness)

    def _look_at(
        self, state: Mapping[str, Any] | None, again: int, beyond: bool
    ) -> tuple[Held, Any] | None:
        """Returns the batch that a state leads to, with its indices, and leaves the data as it was.

        Where its pass has ended there, that is the first of the next pass, if it is to be looked
        `beyond`.
        """
        kept = self._known.kept()
        self._open_flow(state, again)
        self._last = self._last_indices = None
        item = next(self, _NONE)
        if item is _NONE and beyond:
            item = self._first_of_next()
        found = None
        if item is not _NONE:
            found = self._given(hold(item) if self._last is None else self._last)
        self._iterator = iter(())
        self.fetched, self._ended = self.consumed, False
        self._last = self._last_indices = self.share = None
        self._known.put_back(kept)
        return found

    def _hear_witness(self, check: _Check) -> None:
        """Opens data at an earlier state whose next batch is known, and compares."""
        flow, (state, proof, strictness) = self._known, check
        witness = flow.witness(state, self._pass)
        if witness is None:
            return
        last, _ = self._look_at(witness["state"], 0, False) or (None, None)
        what = "the batch after an earlier state of the data"
        compare(witness["next"], last, None, what, flow.suspects(), proof, strictness, _NO_PLACE)

    def _first_of_next(self) -> Any:
        """Returns the first batch of the next pass, where the one that is opened has ended."""
        here = self._pass, self.consumed
        self._pass, self.consumed = self._pass + 1, 0
        self._open_flow(None)
        item = next(self, _NONE)
        self._pass, self.consumed = here
        return item

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
        before: Any = position.get("before")
        if not _is_data(position, flow):
            return False
        reason = is_comparable(before, world_of(self._backend))
        if reason is not None and position["flow"].get("ended") is False:
            proof.unchecked.append(f"the batch before: {reason}")
            self._open_before(position, flow, key, _Check(position["flow"], proof, strictness))
        if reason is not None or strictness == "off":
            return False
        kept = flow.kept()
        flow.workers_then = position.get("workers")
        self._key = key
        self._flow, self._prepared = flow, flow
        self._pass, self.consumed = position["pass"], position["batch"]
        check = _Check(position["flow"], proof, strictness)
        if flow.stays_open:
            # What handlers change of the dataset next, a pass that goes on need not come to see.
            self._open_after(before, check, _HANDLERS_CHANGE)
            self._opened_before = _Opened(
                flow, self._iterator, self._ended, self._last, self._last_indices
            )
        else:
            self._open_at(before, check, _HANDLERS_CHANGE)
            flow.put_back(kept)
        self._leave()
        return True

    def _open_before(
        self, position: Mapping[str, Any], flow: Dataflow, key: StreamKey, check: _Check
    ) -> None:
        """Opens data with a state of its own, whose pass goes on, before handlers change it.

        Where the run that was saved has gone on, its iterator was there before they were called.
        """
        self._key, self._flow, self._prepared = key, flow, flow
        self._pass, self.consumed = position["pass"], position["batch"]
        flow.workers_then = position.get("workers")
        if check.strictness != "off":
            self._hear_witness(check)
            self._rehearse(check)
        state, kept = self._with_its_end(check.state), flow.kept()
        self._open_flow(state)
        # Only by its end is it known to have begun: an iterator may do nothing until it is asked.
        if next(self, _NONE) is not _NONE:
            flow.put_back(kept)
            self._open_flow(state)
        self._opened_before = _Opened(flow, self._iterator, self._ended, None, None)
        self._leave()

    def _leave(self) -> None:
        """Goes back to where no data is opened, after a look at some."""
        self._iterator = iter(())
        self._flow = None
        self.fetched = self.consumed = self._pass = 0
        self.opened = False
        self._last = self._last_indices = None

    def _tell_kept(self, proof: Proof) -> None:
        """Tells what the dataset keeps that a run cannot go on with."""
        if (found := self._known.probed()) is not None:
            proof.differs(f"The data may not go on as it was: {found}.", "warn")

    def draws_by_workers(self) -> str | None:
        """Returns why fetching by others draws otherwise than in the run that was saved, if so."""
        return None if self._flow is None else self._flow.draws_by_workers()

    def lost(self) -> list[str]:
        """Returns the names of what has changed of the dataset and is too large to save."""
        return [] if self._flow is None else self._flow.lost()

    def raced(self) -> list[str]:
        """Returns the names of memory that is shared with workers, and has changed in this pass."""
        return [] if self._flow is None else self._flow.raced()

    def fits(self, position: Mapping[str, Any], data: Any) -> bool:
        """Tells whether data is of the kind and the lengths of that which a position is in."""
        then: Mapping[str, Any] = position["data"]
        return then == self._flow_of(data).fingerprint()

    def go_on_with(self, position: Mapping[str, Any], data: Any, key: StreamKey) -> None:
        """Opens the data of the next run where one has ended, in this process or another."""
        self._pass, self._exchanges = position["pass"], position["exchanges"]
        self.consumed, self.opened = position["batch"], True
        self.open(data, key)

    def _fetch_before(self, before: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Opens data at the batch before, and fetches that."""
        self._fetch_again(state)
        dataset: Mapping[str, Any] = state.get("dataset", {})
        if self._ended or same(dataset.get("now"), dataset.get("opening")):
            return
        if self._last is None or not differs(before, *self._given(self._last)):
            return
        # A handler may have changed the dataset since that batch was fetched.
        first = self._last, self._last_indices
        opening = {**state, "dataset": {**dataset, "now": dataset["opening"]}}
        flow = self._known
        prepared = flow.kept()
        # Twice: a generator that no state has may have come to that batch by the attempt before.
        for _ in range(2):
            self._fetch_again(opening)
            if self._last is None or differs(before, *self._given(self._last)):
                self._last, self._last_indices = first
                flow.put_back(prepared)
                break

    def _fetch_again(self, state: Mapping[str, Any]) -> None:
        self._open_flow(state, 1)
        item = next(self, _NONE)
        # However many there are, the run is after this batch.
        self.fetched, self._ended, self.share = self.consumed, item is _NONE, None
        self._again = None if self._ended else item

    def batch_before(self) -> Any:
        """Returns the batch before the position that was gone to, once; None where it has none."""
        item, self._again = self._again, None
        return item

    def go_to_pass(self, number: int, batch: int, data: Any, key: StreamKey) -> None:
        """Opens data at a batch of a pass, as if this run had not had it before."""
        self._key, self._flow = key, self._flow_of(data)
        self._pass, self.consumed = number, batch
        self._open(None, True)

    def open(self, data: Any, key: StreamKey) -> None:
        """Opens data where the run is in it: at its beginning, or where it has paused."""
        self._key = key
        before, state = self._flow, None
        if before is None or before.data is not own_data(data):
            if before is not None:
                before.close()
            # One that is there knows what the data was made with, and what has changed since.
            self._flow = self._prepared_for(data)
        self._prepared = None
        flow = self._known
        if self.opened and before is not None:
            # Other data of the same kind, given to the second half of a run, goes on as well.
            state = before.state() if before.fingerprint() == flow.fingerprint() else None
            if state is not None and before is not flow:
                # This dataset is as it was given.
                state = {name: value for name, value in state.items() if name != "dataset"}
        self._open(state, not self.opened)

    def open_next_pass(self, data: Any, key: StreamKey) -> None:
        """Opens data anew, from its beginning."""
        if self._flow is not None:
            self._flow.end(self.consumed, self._ended)
        self._pass += 1
        self.consumed = 0
        self.opened = False
        self.open(data, key)

    def exchange(self, position: Mapping[str, Any] | None = None) -> None:
        """Says that other data is opened next, as another pass of the run."""
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

    def _open(self, state: Mapping[str, Any] | None, seeds: bool) -> None:
        """Opens the data at the position.

        The pass's seeding of the global generators stays in force where it begins (`seeds`); where
        a run goes on within a pass, they are left as they were.
        """
        if not seeds:
            with random_states_kept(self._backend):
                self._open_flow(state)
            return
        seed = (self._key.seed + self._pass) % 2**63
        self._seed(seed)
        self._open_flow(state)
        rank = world_of(self._backend).rank
        if self._known.apart:
            # The data goes on drawing from that seed.
            self._seed(rank_seed(step_seed(seed), rank))
        elif rank and not self._known.owners and self._logical is None:
            # The order was drawn alike everywhere; what the training draws is to differ.
            self._seed(rank_seed(seed, rank))

    def seed_anew(self) -> None:
        """Seeds host and device for going on at this position without the states of before.

        They follow from the seed, the pass, the batch and the rank.
        """
        place = StreamKey(self._key.seed, self._pass, rank=world_of(self._backend).rank)
        self._seed(place.seed_at(self.consumed))

    def _seed(self, seed: int) -> None:
        # Every device's generators too.
        random_state.seed(seed)
        if self._backend is not None:
            self._backend.seed(seed)

    def _open_flow(self, state: Mapping[str, Any] | None, again: int = 0) -> None:
        flow = self._known
        rank = world_of(self._backend).rank if flow.owners else 0
        key = self._key._replace(epoch=self._pass, rank=rank)
        seed_host(key.host_seed)
        self._note_opened(flow, flow.open(key, self.consumed, state, again))
        if not self.consumed or again:
            self._last = self._last_indices = None

    def _note_opened(self, flow: Dataflow, iterator: Iterator[Any]) -> None:
        """Takes batches from a pass that was opened at the position."""
        self._iterator, self._held = iterator, flow.held
        self._shares, self._indices, self.share = flow.shares, flow.indices, None
        self.fetched, self.opened, self._ended = self.consumed, True, False

    def _flow_of(self, data: Any) -> Dataflow:
        world = world_of(self._backend)
        if self._logical is None or data is None:
            return dataflow_of(data, self._iterate, world)
        if is_own(data, world) or not is_map_style(data):
            raise ValueError(
                f"Data of type {type(data).__name__} cannot be dealt out to logical shards, which "
                "takes positions. Give run() a DataLoader over a map-style dataset, without a "
                "DistributedSampler."
            )
        return dataflow_of(data, self._iterate, self._logical)


def dataflow_of(data: Any, iterate: Iterate, world: World = ALONE) -> Dataflow:
    """Returns the dataflow for a kind of data; of several processes, each has a part of it."""
    if data is None:
        return NoData(data)
    if world.size == 1:
        return _flow(own_data(data), iterate, world)
    if is_own(data, world):
        flow = _flow(own_data(data), iterate, ALONE)
        flow.owners = world.size
        return flow
    if not is_map_style(data):
        raise ValueError(not_dealt_out(data, world))
    return _flow(data, iterate, world)


def _flow(data: Any, iterate: Iterate, world: World) -> Dataflow:
    if is_map_style(data):
        return MapFlow(data, iterate, world)
    if is_stateful(data):
        return StatefulFlow(data, data)
    if is_loader(data) and data.num_workers == 0 and is_stateful(data.dataset):
        return StatefulFlow(data, data.dataset)
    if isinstance(data, (Sequence, torch.Tensor, numpy.ndarray)):
        return SequenceFlow(data, iterate)
    return ReplayedFlow(data)


def _owners(data: Mapping[str, Any]) -> str:
    count = data.get("processes")
    return "dealt out, or one process's" if count is None else f"own to each of {count}"


def _is_data(position: Mapping[str, Any], flow: Dataflow) -> bool:
    """Tells whether a position is one in the data of a dataflow, as it is or as it was then."""
    # A dataset's length may follow from what handlers have changed of it.
    return _goes_with(position, flow.fingerprint()) or _goes_with(
        position, flow.fingerprint_in(position["flow"])
    )


def _goes_with(position: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    then: Mapping[str, Any] = position["data"]
    told = {name: value for name, value in then.items() if name != "batches" or name in now}
    # States of older versions have a length even where that is a hint.
    return told == {name: value for name, value in now.items() if name != "batches" or name in then}


def _check_data(position: Mapping[str, Any], flow: Dataflow) -> None:
    if _is_data(position, flow):
        return
    then: Mapping[str, Any] = position["data"]
    now = flow.fingerprint()
    count = position["exchanges"]
    exchanged = f" after set_data() had exchanged the data {count} times" if count else ""
    if then.get("processes") != now.get("processes"):
        raise ValueError(
            "A position in data that is each process's own, as with a DistributedSampler or "
            "PerRank, holds for as many processes only. The state's data was "
            f"{_owners(then)}; that given to run() is {_owners(now)}. Go on with the "
            "data, and in as many processes, as it was written with. Batches of a DataLoader "
            "without a DistributedSampler, which a DeterministicEngine deals out, go with any "
            "number."
        )
    names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    changes = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in names]
    raise ValueError(
        f"The state was written{exchanged} with other data than run() was given: a position in one "
        f"is none in the other ({'; '.join(changes)}). Give run() the data, batch size, sampler "
        "and dataset that the run had when the state was written."
    )
