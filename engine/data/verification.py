"""Verification: data is opened where a state says, and what it gives there is compared.

The batch before is fetched once more, and compared with what the state keeps of it. Where that
cannot be, something else is: a later batch that an earlier state of the data has led to, a few
samples, or what comes next, fetched twice from the same states. What was opened to look at it is
left as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from crosstrain.engine.digest import same
from crosstrain.engine.errors import ResumeError
from crosstrain.engine.proof import Proof, Strictness

from .batch_before import Held, difference, differs, hold, is_comparable, record
from .flows import PassTooShort
from .open_pass import OpenPass, Spot
from .shares import ALONE

_NONE: Final = object()
_NO_PLACE: Final = (
    " So its state_dict does not tell what comes next: a shuffle buffer or what was read ahead is "
    "lost, an order is drawn anew, or load_state_dict does not take all of it. Have the state hold "
    "it, or take state_dict away, so that what comes before is fetched and thrown away."
)
_REGARDLESS: Final = (
    "regardless, with other data than that run would have had: checks=Checks(batch_before='warn')."
)


class Verification:
    """Opens data at a place, and compares what it gives there.

    Args:
        spot: the place.
        state: of the data there; None: a new pass begins.
        proof: takes down what was found.
        strictness: how strict the comparison is.
        note: what else is to be said of a batch before that differs.
    """

    def __init__(
        self, spot: Spot, state: Any, proof: Proof, strictness: Strictness, note: str = ""
    ) -> None:
        self._spot, self._flow, self._state = spot, spot.flow, state
        self._proof, self._note = proof, note
        self._strictness: Strictness = strictness
        #: The batch before, where it was fetched once more.
        self.batch_before: Any = None

    def open(self, before: Any, other: str | None) -> OpenPass:
        """Opens the data, after all that can be compared was.

        Args:
            before: what the state keeps of the batch before.
            other: why that may be another one now, if it may.
        """
        flow, state, proof = self._flow, self._state, self._proof
        if self._strictness == "off":
            return self._spot.open(state)
        reason = other or is_comparable(before, self._spot.world)
        if reason is None:
            return self._open_after(before)
        proof.unchecked.append(f"the batch before: {reason}")
        self._compare_samples(before)
        if other is None:
            self._hear_witness()
        if (doubt := flow.doubt(state, self._spot.key.epoch)) is not None:
            proof.differs(f"The data may not go on as it was: {doubt}.", "warn")
        self.rehearse()
        return self._spot.open(self._with_its_end())

    def open_ahead(self) -> OpenPass:
        """Opens data with a state of its own, whose pass goes on, before handlers change it.

        Where the run that was saved has gone on, its iterator was there before they were called.
        """
        if self._strictness != "off":
            self._hear_witness()
            self.rehearse()
        state, kept = self._with_its_end(), self._flow.kept()
        opened = self._spot.open(state)
        # Only by its end is it known to have begun: an iterator may do nothing until it is asked.
        if next(opened, _NONE) is not _NONE:
            self._flow.put_back(kept)
            opened = self._spot.open(state)
        return opened

    def compare_ahead(self, before: Mapping[str, Any]) -> OpenPass | None:
        """Compares the batch before; returns the pass that was opened, if it stays so."""
        if self._flow.stays_open:
            # What handlers change of the dataset next, a pass that goes on need not come to see.
            return self._open_after(before)
        kept = self._flow.kept()
        self._open_at(before).close()
        self._flow.put_back(kept)
        return None

    def rehearse(self, again: int | None = None) -> None:
        """Fetches a batch twice from the same states: what draws from elsewhere is found."""
        flow, state, batch = self._flow, self._state, self._spot.batch
        repeatable = flow.rehearsal(batch, state)
        again = repeatable if again is None or repeatable is None else again
        if again is None or self._strictness == "off":
            return
        first, second = (self._look_at(state, again, batch > 0) for _ in range(2))
        if first is not None and second is not None:
            place = f"batch {batch + 1 - again} of pass {self._spot.key.epoch + 1}"
            self._compare_twice(first, second, place)

    # ------------------------------------------------------------ the batch before

    def _open_after(self, before: Mapping[str, Any]) -> OpenPass:
        """Opens data after the batch before, which is fetched once more and compared."""
        flow, state = self._flow, self._state
        opened = self._open_at(before)
        if flow.keeps_anew(state):
            flow.probe(state, True)
            opened = self._fetch_again(state)
            self._tell_kept()
            opened = self._reopened(opened)
        # Fetching may have changed it.
        flow.give_dataset(state, "now")
        if _now(state):
            # It may have come from what the dataset keeps: the next one need not.
            opened.close()
            self.rehearse(0)
            opened = self._reopened(opened)
            flow.give_dataset(state, "now")
        return opened

    def _reopened(self, before: OpenPass) -> OpenPass:
        opened = self._spot.open(self._state)
        opened.take_last(before)
        return opened

    def _open_at(self, before: Mapping[str, Any]) -> OpenPass:
        """Opens data at the batch before, and compares it."""
        flow, spot = self._flow, self._spot
        flow.probe(self._state)
        opened = self._fetch_before(before)
        self._tell_kept()
        place = f"batch {spot.batch} of pass {spot.key.epoch + 1}"
        last, indices = (None, None) if opened.ended else opened.given
        try:
            self._compare(before, last, indices, place, self._note)
        except ResumeError:
            # The right data may be given to the next run.
            flow.close()
            raise
        return opened

    def _fetch_before(self, before: Mapping[str, Any]) -> OpenPass:
        """Opens data at the batch before, and fetches that."""
        flow, state = self._flow, self._state
        try:
            opened = self._fetch_again(state)
        except PassTooShort:
            if (fresh := flow.begun_afresh(state)) is None:
                raise
            self._state = state = fresh
            opened = self._fetch_again(state)
        dataset: Mapping[str, Any] = state.get("dataset", {})
        if opened.ended or same(dataset.get("now"), dataset.get("opening")):
            return opened
        last, indices = opened.given
        if last is None or not differs(before, last, indices):
            return opened
        # A handler may have changed the dataset since that batch was fetched.
        first, prepared = opened, flow.kept()
        first.close()
        opening = {**state, "dataset": {**dataset, "now": dataset["opening"]}}
        # Twice: a generator that no state has may have come to that batch by the attempt before.
        for _ in range(2):
            opened = self._fetch_again(opening)
            last, indices = opened.given
            if last is None or differs(before, last, indices):
                opened.take_last(first)
                flow.put_back(prepared)
                break
        return opened

    def _fetch_again(self, state: Mapping[str, Any]) -> OpenPass:
        opened = self._spot.open(state, 1)
        self.batch_before = next(opened, None)
        # However many processes there are, the run is after this batch.
        opened.share = None
        return opened

    def _tell_kept(self) -> None:
        """Tells what the dataset keeps that a run cannot go on with."""
        if (found := self._flow.probed()) is not None:
            self._proof.differs(f"The data may not go on as it was: {found}.", "warn")

    # ------------------------------------------------------------ where that cannot be fetched

    def _look_at(
        self, state: Mapping[str, Any] | None, again: int, beyond: bool
    ) -> tuple[Held, Any] | None:
        """Returns the batch that a state leads to, with its indices, and leaves the data as it was.

        Where its pass has ended there, that is the first of the next pass, if it is to be looked
        `beyond`.
        """
        kept, spot = self._flow.kept(), self._spot
        try:
            opened = spot.open(state, again)
        except PassTooShort:
            self._flow.put_back(kept)
            raise
        item = next(opened, _NONE)
        if item is _NONE and beyond:
            next_pass = spot.key._replace(epoch=spot.key.epoch + 1)
            opened = spot._replace(key=next_pass, batch=0).open(None)
            item = next(opened, _NONE)
        last, indices = opened.given
        if last is None and item is not _NONE:
            last = hold(item)
        opened.close()
        self._flow.put_back(kept)
        return None if item is _NONE or last is None else (last, indices)

    def _with_its_end(self) -> Any:
        """Returns a state that says that its pass has ended, where the data itself takes it so.

        Whether a further batch comes was not known when it was written. Data that has given all of
        its length and gives another batch at once begins another pass by that.
        """
        state = self._state
        if state is None or state.get("ended") is not False or "replay" in state:
            return state
        if self._flow.fingerprint().get("batches") != self._spot.batch:
            return state
        return state if self._look_at(state, 0, False) is None else {**state, "ended": True}

    def _hear_witness(self) -> None:
        """Opens data at an earlier state whose next batch is known, and compares."""
        witness = self._flow.witness(self._state, self._spot.key.epoch)
        if witness is None:
            return
        last, _ = self._look_at(witness["state"], 0, False) or (None, None)
        what = "the batch after an earlier state of the data"
        wanted = witness["next"]
        if last is not None and not differs(wanted, last, None):
            wanted, last = self._one_later(witness) or (wanted, last)
        if last is None or differs(wanted, last, None):
            firsts = self._flow.anchored(self._state, witness.get("taken", 1))
            flow = self._flow
            for first, anchored in zip(firsts, flow.anchored(self._state), strict=True):
                try:
                    found, _ = self._look_at(first, 0, False) or (None, None)
                except PassTooShort:
                    continue
                if found is not None and not differs(witness["next"], found, None):
                    # Its state tells not what comes next; that by which its pass was opened does.
                    self._state, wanted, last = anchored, witness["next"], found
                    break
        self._compare(wanted, last, None, what, _NO_PLACE)

    def _one_later(self, witness: Mapping[str, Any]) -> tuple[dict[str, Any], Held | None] | None:
        """Returns the next batch as a state that was a batch earlier leads to it, and as this does.

        That one is shown to tell what comes next; the one after it may be the first that does not.
        """
        if witness.get("before") != self._spot.batch:
            return None
        earlier = {**witness["state"], "replay": 1, "quietly": True}
        one, other = (self._look_at(state, 0, False) for state in (earlier, self._state))
        return None if one is None else (record(one[0], None, ALONE), other and other[0])

    def _compare_samples(self, before: Any) -> None:
        """Compares a few samples of data that was exchanged before its first batch."""
        if not isinstance(before, Mapping) or "samples" not in before:
            return
        then = before["samples"]
        samples = None if then is None else self._flow.samples()
        if then is None or samples is None:
            self._proof.differs(
                "The state was written after set_data() had exchanged the data and before its "
                "first batch, so that no batch of it could be compared. Make sure that run() is "
                "given that data, and not the data of before.",
                "warn",
            )
            return
        self._compare(then, hold(samples), None, "what set_data() had given the run")

    # ------------------------------------------------------------ what is found

    def _compare(
        self, then: Mapping[str, Any], held: Held | None, indices: Any, place: str, note: str = ""
    ) -> None:
        """Compares a batch, `place`, with what a state keeps of it, `then`.

        Raises:
            ResumeError: if it differs, and the check is strict.
        """
        found, cause = difference(then, held, indices, self._flow.suspects())
        proof = self._proof
        if found is not None:
            proof.differs(
                f"The data does not go on as it was: {place} was fetched once more, and "
                f"{found}.{note} {cause} Go on with the data of the run that was saved. To go on "
                f"{_REGARDLESS}",
                self._strictness,
            )
            return
        if changed := then["changed"]:
            shown = ", ".join(name or "all of it" for name in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            proof.unchecked.append(f"{shown}{more} of {place}, which the step had changed in place")
        what = [f"{len(then['parts'])} parts"] if then["parts"] else []
        if then["indices"] is not None:
            what.append(f"{then['indices']['count']} indices")
        if what:
            proof.checked.append(f"{place} fetched once more: its {' and '.join(what)}")

    def _compare_twice(self, first: tuple[Held, Any], second: tuple[Held, Any], place: str) -> None:
        """Compares a batch that was fetched twice from the same states, where it has no record.

        What draws from something that no state tells gives another batch the second time.
        """
        then = record(*first, self._spot.world)
        found, cause = difference(then, *second, self._flow.suspects())
        if found is None:
            told = f"{place} fetched twice from the same states: they tell what it is"
            self._proof.checked.append(told)
            return
        self._proof.differs(
            f"The data will not go on as it was: {place} was fetched twice from the same states, "
            f"and {found}. {cause} Its state_dict, its samplers' attributes or the global "
            f"generators have to tell what it gives. To go on {_REGARDLESS}",
            self._strictness,
        )


def _now(state: Mapping[str, Any]) -> Any:
    """Returns what had changed of the dataset when a state was written."""
    return state.get("dataset", {}).get("now")
