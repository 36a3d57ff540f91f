"""StatefulFlow: iterable data that offers a state, and a measure of whether that tells enough.

Some states tell where their pass began and not how far it is, and some leave out what comes next,
such as a shuffle buffer, be it only once they have given what it was first filled with; others tell
all of that until they are loaded, and then a place that is none. So the data's state is looked at
while batches are taken, and one is kept of which is known what followed: of shortly before a state
is written, if it is small, else of a pass's beginning. Where another batch follows, the pass is
entered where it was opened, by the state that it had there or that was loaded, and the batches
taken since are thrown away.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from crosstrain.backends import random_state
from crosstrain.engine.digest import digest, same
from crosstrain.engine.errors import ResumeError
from crosstrain.engine.loader_workers import iterator_over

from .apart import Apart
from .batch_before import Held, hold, record
from .flows import Dataflow, skipped_to
from .own_states import OwnStates
from .sampling import is_loader, rebuilt
from .shares import ALONE
from .streams import StreamKey

# With how many batches of a pass the data's state is looked at.
_FIRST: Final = 3
# How many values and bytes a state may have to be looked at further on: with each of so many
# batches, and then with each so many-th, as what that takes may be felt with each.
_SMALL: Final = 1 << 12
_CLOSE: Final = 32
_EVERY: Final = 16
_LOSES: Final = "has a state_dict that does not tell what comes next"
_NOTHING: Final = object()
_BEHIND: Final = "data with a state of its own goes on behind it"


@dataclass
class _Pass:
    """A pass that was opened, and how far it is.

    Args:
        number: which pass of the run it is.
        witness: an earlier state of the data, the batch that came after it, and how many
            batches were taken then since it was opened, and of the pass with that one.
    """

    number: int
    witness: Mapping[str, Any] | None
    iterator: Any = field(default_factory=lambda: iter(()))
    #: The random streams that it draws from, where they are its own.
    apart: Apart | None = None
    #: The data's state and those of what it draws from, as it was opened; None: it told none.
    opening: dict[str, Any] | None = None
    #: Whether that state is one that was loaded: it has been shown to lead here.
    loaded: bool = False
    #: These random states, where the data has refused to tell a state as it was opened.
    refused: dict[str, Any] | None = None
    #: Whether it was entered in the middle, by a state of there.
    entered: bool = False
    #: Whether it was opened by no state.
    anew: bool = False
    #: Before which batch it was opened.
    first: int = 0
    #: How many batches were taken of it, and whether there are no more.
    taken: int = 0
    ended: bool = False
    #: The digest of the data's state as it was looked at last; empty where it tells none.
    last_told: str = ""
    #: Whether the data's state is small enough to be asked for further on.
    small: bool = False
    #: The state whose next batch is awaited, to be a witness, and after how many batches it was.
    awaited: dict[str, Any] | None = None
    #: A later witness, and its batch, of which a digest is made where a state is written.
    last: tuple[dict[str, Any], Held] | None = None


class StatefulFlow(Dataflow):
    """Iterable data with `state_dict` and `load_state_dict`: asked for its state, and given it.

    It is not fetched ahead: its state would be that of a batch that has not been used yet. Where a
    state is the same as when the pass was opened, although batches were taken, it does not tell a
    position (some keep where their pass began): the data is then entered there, and the batches
    taken since are fetched and thrown away. The state's owner is the data, or the dataset of a
    loader without workers.
    """

    kind = "iterable data with a state"

    def __init__(self, data: Any, owner: Any) -> None:
        super().__init__(data)
        self.unrepeatable = _BEHIND
        self._source, self._owner = data, owner
        if data is owner and is_loader(data):
            # A twin, whose workers can be stopped without touching the user's loader.
            self._source = self._owner = rebuilt(data)
        # With workers of its own it draws in them.
        self.apart = not getattr(data, "num_workers", 0)
        # Generators that the data holds, whether its state has them or not.
        self._generating = OwnStates(data=owner)
        # torchdata's pipelines: loaded at a pass's end, they begin the next one at once.
        self._restarts = hasattr(self._source, "restart_on_stop_iteration")
        # Whether opening such a pipeline, or fetching, draws from the global generators.
        self._draws = False
        # Whether the state was found to stay the same although a batch was taken.
        self._stays = False
        # Whether its state_dict is found to raise: one that wraps another may have none to give.
        self._raises = False
        self._pass = _Pass(0, witness=None)
        self._closed_state: dict[str, Any] | None = None
        # What it tells before anything was loaded, where it can be asked: a pass's beginning.
        self._fresh = self._told_unloaded()
        # What it told after the first batch of a pass that was entered in the middle, and which.
        self._entered: tuple[str, Any] | None = None
        self._was_loaded = False

    def _told_unloaded(self) -> Any:
        # A loader would begin to iterate.
        if is_loader(self._owner) or self._restarts:
            return None
        try:
            return copy.deepcopy(self._owner.state_dict())
        except Exception:  # noqa: BLE001  before its first batch, data may refuse in any way
            return None

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on, by the data's own state."""
        replays = state is not None and "replay" in state
        quietly = state is not None and "quietly" in state
        told = None if state is None else state.get("why")
        witness = None if state is None else state.get("witness")
        opened = self._pass = _Pass(key.epoch, witness)
        opened.entered = batch > 0 and state is not None and not replays
        opened.anew = state is None
        opened.first = batch - state["replay"] if state is not None and replays else batch
        self._closed_state = loaded = None
        if state is not None:
            self._entered, self._was_loaded = None, True
            self._stays |= replays and not quietly
            self._open_dataset(state, "opening" if replays else "now")
            loaded = state["data"]
            self._load(state)
        self._dataset_at_opening = self._attributes.take()
        if state is not None and state["ended"]:
            # What is left of the pass is nothing, and the data's state is that before the next one.
            if is_loader(self._owner):
                # torchdata's loader takes its state when it is first iterated over, which draws
                # random numbers: here, and not when the next pass is opened.
                iterator_over(self._source)
            opened.ended = True
            return iter(())
        self._begin(opened, None if state is None else state.get("random"), loaded)
        batches = self._watched(opened)
        if state is not None and replays:
            raises = "has a state_dict that raises an error"
            why = raises if self._raises else "has a state_dict that tells no position"
            told = told if quietly else why
            batches = skipped_to(batches, state["replay"], again, self.data, told)
        return self._noted(batches)

    def _load(self, state: Mapping[str, Any]) -> None:
        if "own" in state:
            self._generating.give(state["own"])
        self._raises |= state["data"] is None
        if not self._raises:
            # Data may go on with the very dictionary that it is given, and this is given again.
            self._owner.load_state_dict(copy.deepcopy(state["data"]))

    def _begin(self, opened: _Pass, random: Mapping[str, Any] | None, loaded: Any) -> None:
        """Iterates over the data, under random streams of its own if it draws here."""
        drawn = digest(random_state.capture()) if self._restarts else ""
        opened.iterator = iterator_over(self._source)
        self._draws |= self._restarts and digest(random_state.capture()) != drawn
        if self.apart:
            opened.apart = Apart(opened.iterator, random)
        with random_state.preserved():
            try:
                data = copy.deepcopy(self._told())
                opened.last_told = digest(data)
            except Exception:  # noqa: BLE001  before its first batch, data may refuse in any way
                opened.refused = self._beside()
                return
        opened.loaded = loaded is not None
        opened.opening = {"data": loaded if opened.loaded else data, **self._beside()}

    def _beside(self) -> dict[str, Any]:
        """Returns the random states that the data draws from, beside its own state."""
        apart = self._pass.apart
        found: dict[str, Any] = {"random": None if apart is None else apart.states()}
        if self._generating.generators:
            found["own"] = self._generating.take()
        return found

    def _watched(self, opened: _Pass) -> Iterator[Any]:
        batches = opened.iterator if opened.apart is None else opened.apart
        while True:
            awaited, opened.awaited = opened.awaited, None
            # A handler may have changed the dataset since.
            told = awaited is not None and same(awaited["dataset"]["now"], self._attributes.take())
            item = next(batches, _NOTHING)
            if not opened.taken and self._begins_where_loaded(opened, item):
                batches = self._begun_anew(opened)
                item = next(batches, _NOTHING)
            if item is _NOTHING:
                break
            opened.taken += 1
            if self._restarts and opened.taken == 1 and opened.opening is not None:
                before = {k: v for k, v in opened.opening.items() if k != "data"}
                self._draws |= digest(self._beside()) != digest(before)
            if told:
                held, witness = hold(item), {"state": awaited, "pass": opened.number}
                witness |= {"taken": opened.taken - 1, "before": opened.first + opened.taken}
                if opened.taken == 2:
                    opened.witness = {**witness, "next": record(held, None, ALONE)}
                else:
                    opened.last = witness, held
            self._look(opened)
            yield item
        opened.ended = True

    def _begins_where_loaded(self, opened: _Pass, item: Any) -> bool:
        """Tells whether a pass after one that was entered by a state begins where that one did.

        Hugging Face's `datasets` do: what they were given counts until their epoch is set.
        """
        if item is _NOTHING:
            # It is loaded at the end of one.
            return opened.anew and self._was_loaded and self._fresh is not None
        if self._stays or not (opened.entered or self._entered):
            return False
        with random_state.preserved():
            # A loader counts its batches beside it.
            found = digest(_of_datasets(self._told())), record(hold(item), None, ALONE)
        if opened.entered:
            self._entered = found
            return False
        if self._entered is None or found[0] != self._entered[0]:
            return False
        # To begin anew does no harm to others; where that cannot be, the batch has to be that one.
        return self._fresh is not None or same(found, self._entered)

    def _begun_anew(self, opened: _Pass) -> Iterator[Any]:
        """Begins a pass where a new one does, and returns it."""
        if self._fresh is None or opened.opening is None:
            raise ResumeError(
                f"{type(self.data).__name__} begins each pass where it was entered once by "
                "load_state_dict, in the middle of one, and not at its beginning. Have its "
                "load_state_dict hold for one pass, as by set_epoch in a handler of EPOCH_STARTED"
            )
        with random_state.preserved():
            self._owner.load_state_dict(copy.deepcopy(self._fresh))
            self._begin(opened, opened.opening["random"], None)
        self._entered, self._was_loaded = None, False
        return opened.iterator if opened.apart is None else opened.apart

    def _told(self) -> Any:
        """Returns the data's own state; None if it was found to raise an error instead."""
        return None if self._raises else self._owner.state_dict()

    def _look(self, opened: _Pass) -> None:
        """Looks whether the state moves with the first batches of a pass."""
        if opened.taken == 1 and opened.refused is not None:
            try:
                self._owner.state_dict()
            except Exception:  # noqa: BLE001  an object of the user's may raise anything
                self._raises = self._stays = True
                opened.opening = {"data": None, **opened.refused}
        first = opened.taken <= _FIRST
        due = opened.taken <= _CLOSE or opened.taken % _EVERY == 0
        if not opened.last_told or not (first or (due and opened.small and not self._stays)):
            return
        now = self._now()
        if opened.taken == 1:
            # One that holds a buffer is large, and tells by it what comes next.
            opened.small = not self._restarts and _is_small(now["data"])
        if first:
            told = digest(now["data"])
            self._stays |= told == opened.last_told
            opened.last_told = told
        if opened.taken == 1 or opened.small:
            opened.awaited = now

    def _now(self) -> dict[str, Any]:
        """Returns the data's state, as long as its pass has not ended."""
        return self._with_dataset(copy.deepcopy(self._told()), False)

    def _with_dataset(self, data: Any, ended: bool) -> dict[str, Any]:
        return {"data": data, "ended": ended, "dataset": self.dataset_state(), **self._beside()}

    def witness(self, state: Mapping[str, Any], number: int) -> Mapping[str, Any] | None:
        """Returns an earlier state of the pass, and what is known of its next batch."""
        found: Mapping[str, Any] | None = state.get("witness")
        # Handlers of another epoch's beginning may have made it other data.
        here = found is not None and found["pass"] == number and not state["ended"]
        return found if here else None

    def state(self) -> dict[str, Any]:
        """Returns the data's own state, and whether it is that of a pass that has ended."""
        if self._closed_state is not None:
            return self._closed_state
        # Asked first: some fetch ahead to learn it, and their state is that after it.
        ended = self._has_ended()
        state = self._with_dataset(self._told(), ended)
        if self._restarts:
            state["draws"] = self._draws
        if (witness := self._witness()) is not None:
            state["witness"] = witness
        replay = None if state["ended"] or not self._pass.taken else self._replay(state)
        self.unrepeatable = _BEHIND if replay is None else None
        opened = self._pass
        if replay is None and opened.opening and opened.taken and not ended:
            state["anchor"] = {**opened.opening, "replay": opened.taken}
        return state if replay is None else {**state, **replay}

    def _witness(self) -> Mapping[str, Any] | None:
        """Returns the last state of the pass of which is known what came next, and that."""
        opened = self._pass
        if opened.last is not None:
            witness, held = opened.last
            batch = record(held, None, ALONE)
            # What the step has written into is not known any more.
            if not batch["changed"]:
                return {**witness, "next": batch}
        return opened.witness

    def _has_ended(self) -> bool:
        """Tells whether the pass has no further batch, as far as the data knows itself."""
        opened = self._pass
        if opened.ended:
            return True
        if self._restarts:
            has_next: Any = getattr(opened.iterator, "has_next", lambda: True)
            return not (has_next() if opened.apart is None else opened.apart.call(has_next))
        # torch's loader has found the end of its dataset already when a last batch is not full.
        fetcher = getattr(opened.iterator, "_dataset_fetcher", None)
        return self._owner is not self._source and getattr(fetcher, "ended", False)

    def _replay(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns what enters the data where its pass began, if its state tells no position."""
        opened = self._pass
        if opened.opening is None:
            return None
        self._stays |= digest(state["data"]) == digest(opened.opening["data"])
        self._stays |= _only_counts(state["data"])
        if self._stays:
            return {**opened.opening, "replay": opened.taken}
        # There is no witness yet that it tells what comes next, or still does since it was loaded.
        unseen = opened.witness is None and not (is_loader(self._owner) or self._restarts)
        if opened.taken == 1 and (unseen or opened.loaded):
            return {**opened.opening, "replay": 1, "quietly": True}
        return None

    def anchored(self, state: Mapping[str, Any], batches: int | None = None) -> list[Any]:
        """Returns states that may enter the data where the run that was saved had opened its pass.

        Args:
            state: as of `state`.
            batches: how many are fetched and thrown away from there; None: as many as were taken.
        """
        if (anchor := state.get("anchor")) is None:
            return []
        own = {key: value for key, value in state.items() if key != "anchor"} | anchor
        own |= {"quietly": True, "why": _LOSES} if batches is None else {"quietly": True}
        own["replay"] = anchor["replay"] if batches is None else batches
        # As a pass is opened, some tell the end of the one before.
        return [own] if self._fresh is None else [own, {**own, "data": self._fresh}]

    def begun_afresh(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns a state that enters a pass from where the first begins, if it has one to enter.

        Some data tells the end of the pass before until the first batch is taken.
        """
        if "replay" not in state or self._fresh is None or same(state["data"], self._fresh):
            return None
        return {**state, "data": self._fresh}

    def doubt(self, state: Mapping[str, Any], number: int) -> str | None:
        """Returns that a pipeline that draws goes on from where nothing has shown its state."""
        if not state.get("draws") or self.witness(state, number) is not None:
            return None
        return (
            "the data's pipeline draws from the global generators when it is begun or fetched "
            "from, as an unseeded RandomSampler does, and no batch could be compared where the "
            "state was written. Give what it draws from a generator with a fixed seed"
        )

    def lost(self) -> list[str]:
        """Returns nothing: what it has changed is in its own state."""
        return []

    def show(self, state: Mapping[str, Any]) -> None:
        """Gives data its state before handlers run: one may set this data anew, or look at it."""
        super().show(state)
        # Theirs is taken when they are iterated over, and once only.
        if is_loader(self._owner) or hasattr(self._owner, "restart_on_stop_iteration"):
            return
        if "data" in state:
            self._load(state)

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Returns that the next batch is fetched twice, if there is a state to go back to."""
        return None if state is None else 0

    def begun(self) -> dict[str, Any] | None:
        """Returns the data's own state, where it can be given back before the data is opened."""
        if is_loader(self._owner) or self._restarts:
            return None
        try:
            return self._now()
        except Exception:  # noqa: BLE001  before its first batch, data may refuse in any way
            return None

    def close(self) -> None:
        """Keeps the data's state: asked without an iterator, some loaders would make a new one."""
        self._closed_state = self.state()
        self._pass.iterator = iter(())
        if self._source is not self.data:
            vars(self._source)["_iterator"] = None

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and workers: each worker has its own part of the data."""
        workers = getattr(self._source, "num_workers", None)
        found = super().fingerprint()
        return found if workers is None else {**found, "workers": workers}


def _is_small(state: Any) -> bool:
    """Tells whether a state takes no time to speak of to be copied with each batch."""
    things, left = [state], _SMALL
    while things:
        one = things.pop()
        size = getattr(one, "nbytes", None)
        left -= size if isinstance(size, int) else 1
        if isinstance(one, (str, bytes)):
            left -= len(one)
        elif isinstance(one, (dict, list, tuple)):
            left -= len(one)
            if left > 0:
                things += one.values() if isinstance(one, dict) else one
        if left <= 0:
            return False
    return True


def _only_counts(state: Any) -> bool:
    """Tells whether a state of torchdata's loader holds nothing of its iterable dataset.

    It goes on by throwing batches away then, as many as its workers have given. After a second
    resume it counts some of these twice, and the run would go on with other batches.
    """
    workers = _workers_in(state)
    fetchers = [one.get("fetcher_state") for one in workers if one.get("dataset_state") is None]
    return (
        bool(workers)
        and len(fetchers) == len(workers)
        and all(
            isinstance(one, Mapping) and one.get("dataset_iter_state", 0) is None
            for one in fetchers
        )
    )


def _workers_in(state: Any) -> list[Mapping[str, Any]]:
    """Returns what a state of torchdata's loader has of each worker; nothing of another state."""
    if not isinstance(state, Mapping) or not {"_snapshot", "fetcher_state"} & state.keys():
        return []
    snapshot = state.get("_snapshot")
    if isinstance(snapshot, Mapping):
        return list(snapshot.get("_worker_snapshots", {}).values())
    return [state]


def _of_datasets(state: Any) -> Any:
    """Returns what a state of torchdata's loader has of its dataset; of other data all of it."""
    parts = ("dataset_state", "fetcher_state")
    return [[one.get(part) for part in parts] for one in _workers_in(state)] or state
