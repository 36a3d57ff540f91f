"""Dataflows: any data, opened at any batch of any pass, so that the batches are those of that pass.

A pass is one iteration over the data from its beginning. Pass p of a run is opened with the global
generators seeded with seed + p; after that, what is drawn for the data follows from (seed, p,
position), as far as the kind of data allows. The kinds are one file, since each is told from the
others by what it keeps of the same promise.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any, ClassVar, Final

from torch.utils.data import BatchSampler, DataLoader

from crosstrain.backends import random_state
from crosstrain.engine.digest import digest, same
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.guards import is_mapping
from crosstrain.engine.loader_workers import workers_left_alone
from crosstrain.engine.progress import data_length

from .apart import Apart
from .attributes import Attributes
from .batch_before import Held, Noted, Suspects, hold, record
from .generators import OwnStates
from .sampling import is_loader, rebuilt
from .shares import ALONE, BatchShare
from .streams import StreamKey

Iterate = Callable[[Any], Iterator[Any]]

# With how many batches of a run its data's state is looked at.
_FIRST: Final = 3
_BEHIND: Final = "data with a state of its own goes on behind it"


class Dataflow:
    """Data that can be opened at a batch of a pass."""

    kind: ClassVar[str] = ""
    #: Among how many processes this is the data of one only; 0 where all have the same.
    owners = 0
    #: Whether it draws from random streams of its own, and the step's are to be others.
    apart = False
    #: Whether a pass that was opened can stay so while handlers prepare the data for the next one.
    stays_open: ClassVar[bool] = False
    #: How many workers the run that was saved had, where handlers fetch as well; else None.
    workers_then: int | None = None
    #: Why a batch of it cannot be fetched once more; None where it can.
    unrepeatable: str | None = None

    def __init__(self, data: Any) -> None:
        self.data = data
        # What handlers change of the dataset, which no state_dict has.
        self._attributes = (
            Attributes(data.dataset, collate_fn=getattr(data, "collate_fn", None))
            if is_loader(data)
            else Attributes(data)
        )
        self._dataset_at_opening: dict[str, Any] = {}
        # The names of those that had changed when a state was written that was gone on from.
        self._changed: set[str] = set()
        # Whether handlers have seen the dataset as it was, and may have changed it since.
        self._dataset_prepared = False
        #: The batches that were fetched and not given yet, held; a backend may fetch ahead.
        self.held: deque[Held] = deque()
        #: Of each of these, what is this process's, and its indices; None: all of it, and none.
        self.shares: deque[BatchShare] | None = None
        self.indices: deque[Any] | None = None
        # The names of generators that the data holds and that no key reaches.
        self._generators: list[str] = []

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on.

        Args:
            key: which pass of which run.
            batch: how many of its batches to leave out.
            state: what `state` returned at that batch; None where a new pass is opened.
            again: how many of those left out, 0 or 1, are to be fetched once more.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns what is needed to open this pass again, besides the key and the batch."""
        return {}

    def suspects(self) -> Suspects:
        """Returns what batches are fetched with: what a difference may come from."""
        data = self.data
        fetched: list[str] = []
        ordered: list[str] = []
        if is_loader(data):
            fetched += _called(data, "dataset") + _called(data, "collate_fn")
            if type(data) is not DataLoader:
                fetched.append(f"the loader, of class {type(data).__name__}")
            # torch's own batch sampler has no part in it; its sampler need not be the loader's.
            grouped = isinstance(data.batch_sampler, BatchSampler)
            own = data if data.batch_sampler is None else data.batch_sampler
            ordered += _called(own, "sampler") if grouped or own is data else []
            ordered += [] if grouped or own is data else _called(data, "batch_sampler")
        kinds = f"the data, of class {type(data).__name__}"
        return Suspects(
            f"It is ordered by {', '.join(ordered) or kinds}. ",
            f"It is fetched with {', '.join(fetched) or kinds}. ",
            self._generators,
            sorted({*self._changed, *self._attributes.take()}),
        )

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Sets what handlers see of the data to what it was when a state was written.

        They have the last word: the pass that is opened next leaves it as they do.
        """
        self.give_dataset(state, "now")
        self._dataset_prepared = True

    def give_dataset(self, state: Mapping[str, Any] | None, when: str) -> None:
        """Sets the dataset's attributes that had changed, if there is a state that has them.

        They become what they were when the pass was opened (`opening`), or the state written
        (`now`).
        """
        if state is not None and "dataset" in state:
            self._changed |= changed_places(state)
            self._attributes.give(state["dataset"][when])

    def _open_dataset(self, state: Mapping[str, Any] | None, when: str) -> None:
        """Sets the dataset to what it was, as a pass is opened, if handlers were not to do more."""
        if not self._dataset_prepared:
            self.give_dataset(state, when)
        self._dataset_prepared = False

    def dataset_state(self) -> dict[str, Any]:
        """Returns the dataset's attributes that have changed, for the dataflow's state."""
        return {"opening": self._dataset_at_opening, "now": self._attributes.take()}

    def doubt(self, state: Mapping[str, Any], number: int) -> str | None:
        """Returns why data may not give what comes next, where nothing could be compared."""
        return None

    def lost(self) -> list[str]:
        """Returns the names of what has changed of the dataset and is too large to save."""
        return self._attributes.lost()

    def raced(self) -> list[str]:
        """Returns the names of memory that is shared with workers, and has changed in this pass."""
        if not is_loader(self.data) or self.data.num_workers == 0:
            return []
        then = self._dataset_at_opening
        now = self._attributes.take()
        return [
            name for name in self._attributes.shared() if not same(then.get(name), now.get(name))
        ]

    def witness(self, state: Mapping[str, Any], number: int) -> Mapping[str, Any] | None:
        """Returns an earlier state of the data, `state`, and of its `next` batch what is known."""
        return None

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Tells which batch can be fetched twice to see whether the states tell what follows.

        0 is the next one, 1 the one before; None: neither can.
        """
        return None

    def samples(self) -> Any:
        """Returns a few samples that tell this data from other data; None where it cannot."""
        return None

    def probe(self, state: Mapping[str, Any], anew: bool = False) -> None:
        """Has the pass that is opened next look at what the dataset keeps of what it draws."""

    def keeps_anew(self, state: Mapping[str, Any]) -> bool:
        """Tells whether fetching has changed the dataset, and had not in the run that was saved."""
        return False

    def probed(self) -> str | None:
        """Returns what was found of what the dataset keeps, if a run cannot go on with it."""
        return None

    def draws_by_workers(self) -> str | None:
        """Returns why fetching by others draws otherwise than in the run that was saved, if so."""
        return None

    def begun(self) -> dict[str, Any] | None:
        """Returns the state of data of which no pass was opened; None where it has none."""
        return None

    def kept(self) -> Any:
        """Returns what opening a pass moves, to be put back after a rehearsal."""
        return None

    def put_back(self, kept: Any) -> None:
        """Puts back what `kept` returned."""

    def end(self, batches: int, ended: bool) -> None:
        """Leaves the pass, after which another is opened."""

    def close(self) -> None:
        """Lets go of what iterating over the data holds; `state` is still known."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this data from other data: a position in one is none in the other."""
        length = data_length(self.data)
        found: dict[str, Any] = {"kind": self.kind}
        if length is not None:
            found["batches"] = length
        if is_loader(self.data):
            found["batch size"] = self.data.batch_size
        if self.owners:
            found["processes"] = self.owners
        return found

    def fingerprint_in(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what `fingerprint` does once the dataset's attributes are those of a state."""
        changed: Mapping[str, Any] = state.get("dataset", {}).get("now", {})
        if not changed:
            return self.fingerprint()
        with self._attributes.as_in(changed):
            return self.fingerprint()


def changed_places(state: Mapping[str, Any]) -> set[str]:
    """Returns which of the dataset's attributes had changed when a state was written."""
    dataset = state.get("dataset", {})
    return {*dataset.get("opening", ()), *dataset.get("now", ())}


def _called(loader: Any, name: str) -> list[str]:
    """Returns what to call a part of a loader; nothing for torch's own functions."""
    part: Any = getattr(loader, name, None)
    if not hasattr(part, "__qualname__"):
        return [f"the {name}, of class {type(part).__name__}"]
    own = part.__module__.partition(".")[0] != "torch"
    return [f"the {name} {part.__qualname__}"] if own else []


class NoData(Dataflow):
    """The data of a run without data: an endless pass of None."""

    kind = "no data"
    unrepeatable = "a run without data has none"

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over None."""
        return repeat(None)


class SequenceFlow(Dataflow):
    """A list, or another sequence of batches: entered anywhere."""

    kind = "a sequence"

    def __init__(self, data: Any, iterate: Iterate) -> None:
        super().__init__(data)
        self._iterate = iterate

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on."""
        data = self.data
        self.held = deque()
        batches = (data[index] for index in range(batch - again, len(data)))
        return self._iterate(Noted(batches, self.held.append))

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Returns which batch is fetched twice: the one before, or the first."""
        return min(batch, 1)


class KeptFlow(Dataflow):
    """Data of which a pass can be opened to look at it, and left as it was."""

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        # What it carries from pass to pass, beside the attributes of its dataset.
        self._own = OwnStates()

    def kept(self) -> Any:
        """Returns what opening a pass moves, to be put back after it was looked at."""
        return self._own.take(), self._attributes.take(), self._dataset_prepared

    def put_back(self, kept: Any) -> None:
        """Puts back what `kept` returned."""
        states, attributes, self._dataset_prepared = kept
        self._own.give(states)
        self._attributes.give(attributes)


class ReplayedFlow(KeptFlow):
    """Iterable data without a state: batches before the wanted one are fetched and thrown away.

    It is not fetched ahead. What it draws from the global generators are random streams of its own,
    unless it is its own iterator: a generator draws where the step does, too.
    """

    kind = "iterable data"
    stays_open = True

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        # Workers that outlive a pass would carry random states from it into the next.
        self._loader: Any = rebuilt(data, persistent_workers=False) if is_loader(data) else None
        own = {} if self._loader is None else {"loader": self._loader}
        self._own = OwnStates(data=data, **own)
        self._at_opening: dict[str, Any] = {}
        self._opened = False
        if isinstance(data, Iterator):
            self.unrepeatable = (
                "an iterator is not iterated over anew, and draws from the generators that the "
                "step draws from"
            )
        elif not getattr(self._loader, "num_workers", 0):
            self.apart = True

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on; warns if that takes fetching."""
        self._open_dataset(state, "opening")
        self._dataset_at_opening = self._attributes.take()
        if state is not None:
            self._own.give(state)
        self._at_opening = self._own.take()
        source = self.data if self._loader is None else self._loader
        with workers_left_alone(source):
            iterator: Iterator[Any] = iter(source)
        if self.apart:
            iterator = Apart(iterator)
        continues = iterator is self.data and self._opened
        self._opened = True
        self.held = deque()
        if batch == 0 or continues:
            return Noted(iterator, self.held.append)
        why = "offers no state_dict/load_state_dict that take no further arguments"
        return Noted(_after(iterator, batch, again, self.data, why), self.held.append)

    def state(self) -> dict[str, Any]:
        """Returns the states that the data's own generators had when this pass was opened."""
        return {**self._at_opening, "dataset": self.dataset_state()}

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Returns that the first batch is fetched twice: others would take fetching all before."""
        return 0 if batch == 0 and self.unrepeatable is None else None

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and workers: each worker has its own part of the data."""
        found = super().fingerprint()
        return found if self._loader is None else {**found, "workers": self._loader.num_workers}


def _after(
    iterator: Iterator[Any], batch: int, again: int, data: Any, why: str | None
) -> Iterator[Any]:
    """Returns the rest of an iterator over a pass: what comes before is fetched and thrown away.

    `batch` and `again` are as of `Dataflow.open`; `why` it is not entered there is told, if given.
    """
    name = type(data).__name__
    if why is not None:
        warn_user(
            f"{name} {why}, so its first {batch} batches are fetched and thrown away to go on "
            "after them. Give it both, with a state that tells its position (torchdata's "
            "protocol), or use a DataLoader over a map-style dataset.",
            ResumeWarning,
        )
    skipped = sum(1 for _ in islice(iterator, batch - again))
    first = list(islice(iterator, again))
    skipped += len(first)
    if skipped < batch:
        raise RuntimeError(
            f"The data ({name}) gave {skipped} batches, but the run to go on with had taken "
            f"{batch} of this pass. Give run() the data that it had; an iterator must be a new "
            "one, at its beginning."
        )
    return chain(first, iterator)


class StatefulFlow(KeptFlow):
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
        self._iterator: Any = iter(())
        self._ended = False
        self._closed_state: dict[str, Any] | None = None
        # With workers of its own it draws in them.
        self.apart = not getattr(data, "num_workers", 0)
        self._apart: Apart | None = None
        # Generators that the data holds, whether its state has them or not.
        self._generating = OwnStates(data=owner)
        # As the pass was opened, and how many batches were taken since.
        self._at_opening: dict[str, Any] | None = None
        self._since = self._epoch = 0
        # An earlier state and the batch that came after it; the state whose next batch is awaited.
        self._witness: dict[str, Any] | None = None
        self._awaited: dict[str, Any] | None = None
        # Whether the state was found to stay the same although a batch was taken.
        self._stays = False
        self._looks = True
        self._last_told = ""
        # torchdata's pipelines: loaded at a pass's end, they begin the next one at once.
        self._restarts = hasattr(self._source, "restart_on_stop_iteration")
        # Whether opening it, or fetching, draws from the global generators.
        self._draws = False

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on, by the data's own state."""
        self._closed_state, self._ended, self._apart = None, False, None
        self._at_opening, self._since, self._epoch = None, 0, key.epoch
        self._awaited = None
        if state is not None:
            self._stays |= bool(state.get("replay")) and not state.get("quietly")
        self._witness = None if state is None else state.get("witness")
        self.held = deque()
        if state is not None:
            self._open_dataset(state, "opening" if "replay" in state else "now")
            if "own" in state:
                self._generating.give(state["own"])
            self._owner.load_state_dict(state["data"])
        self._dataset_at_opening = self._attributes.take()
        if state is not None and state["ended"]:
            # What is left of the pass is nothing, and the data's state is that before the next one.
            if is_loader(self._owner):
                # torchdata's loader takes its state when it is first iterated over, which draws
                # random numbers: here, and not when the next pass is opened.
                with workers_left_alone(self._source):
                    iter(self._source)
            self._iterator, self._ended = iter(()), True
            return iter(())
        drawn = digest(random_state.capture()) if self._restarts else ""
        with workers_left_alone(self._source):
            self._iterator = iter(self._source)
        iterator = self._iterator
        self._draws |= self._restarts and digest(random_state.capture()) != drawn
        if self.apart:
            iterator = Apart(iterator, None if state is None else state.get("random"))
            self._apart = iterator
        self._note_opening()
        watched = self._watched(iterator)
        if state is not None and (replayed := state.get("replay", 0)):
            told = None if state.get("quietly") else "has a state_dict that tells no position"
            watched = _after(watched, replayed, again, self.data, told)
        # The batches of before were looked at by the run that was saved.
        self._looks = state is None or "replay" in state
        return Noted(watched, self.held.append)

    def _note_opening(self) -> None:
        with random_state.preserved():
            try:
                data = copy.deepcopy(self._owner.state_dict())
                self._last_told = digest(data)
            except Exception:  # noqa: BLE001  before its first batch, data may refuse in any way
                self._last_told = ""
                return
        self._at_opening = {"data": data, **self._beside()}

    def _beside(self) -> dict[str, Any]:
        """Returns the random states that the data draws from, beside its own state."""
        found: dict[str, Any] = {"random": None if self._apart is None else self._apart.states()}
        if self._generating.generators:
            found["own"] = self._generating.take()
        return found

    def _watched(self, iterator: Iterator[Any]) -> Iterator[Any]:
        while True:
            awaited, self._awaited = self._awaited, None
            # A handler may have changed the dataset since.
            told = awaited is not None and same(awaited["dataset"]["now"], self._attributes.take())
            try:
                item = next(iterator)
            except StopIteration:
                break
            self._since += 1
            if self._restarts and self._since == 1 and self._at_opening is not None:
                opening = {k: v for k, v in self._at_opening.items() if k != "data"}
                self._draws |= digest(self._beside()) != digest(opening)
            if told:
                batch = record(hold(item), None, ALONE)
                self._witness = {"state": awaited, "next": batch, "pass": self._epoch}
            self._look()
            yield item
        self._ended = True

    def _look(self) -> None:
        """Looks whether the state moves with the first batches of a pass."""
        if self._since > _FIRST or not self._last_told or not self._looks:
            return
        now = self._now()
        told = digest(now["data"])
        self._stays |= told == self._last_told
        self._last_told = told
        if self._since == 1:
            self._awaited = now

    def _now(self) -> dict[str, Any]:
        """Returns the data's state, as long as its pass has not ended."""
        return self._with_dataset(copy.deepcopy(self._owner.state_dict()), False)

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
        # torch's loader has found the end of its dataset already when a last batch is not full.
        fetcher = getattr(self._iterator, "_dataset_fetcher", None)
        found = self._owner is not self._source and getattr(fetcher, "ended", False)
        if not self._ended and self._restarts:
            has_next: Any = getattr(self._iterator, "has_next", lambda: True)
            found = not (has_next() if self._apart is None else self._apart.call(has_next))
        state = self._with_dataset(self._owner.state_dict(), self._ended or found)
        if self._restarts:
            state["draws"] = self._draws
        if self._witness is not None:
            state["witness"] = self._witness
        opening = self._at_opening
        self.unrepeatable = _BEHIND
        if state["ended"] or not self._since:
            return state
        if opening is not None:
            self._stays |= digest(state["data"]) == digest(opening["data"])
            self._stays |= _only_counts(state["data"])
            if self._stays:
                self.unrepeatable = None
                return {**state, **opening, "replay": self._since}
            unseen = self._since == 1 and self._witness is None
            if unseen and not (is_loader(self._owner) or self._restarts):
                # There is no witness yet that it tells what comes next.
                self.unrepeatable = None
                return {**state, **opening, "replay": 1, "quietly": True}
        return state

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

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Gives data its state before handlers run: one may set this data anew, or look at it."""
        super().prepare(state)
        if is_loader(self._owner) or hasattr(self._owner, "restart_on_stop_iteration"):
            # Theirs is taken when they are iterated over, and once only.
            return
        if "own" in state:
            self._generating.give(state["own"])
        self._owner.load_state_dict(state["data"])

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
        self._iterator = iter(())
        if self._source is not self.data:
            vars(self._source)["_iterator"] = None

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and workers: each worker has its own part of the data."""
        workers = getattr(self._source, "num_workers", None)
        found = super().fingerprint()
        return found if workers is None else {**found, "workers": workers}


def _only_counts(state: Any) -> bool:
    """Tells whether a state of torchdata's loader holds nothing of its iterable dataset.

    It goes on by throwing batches away then, as many as its workers have given. After a second
    resume it counts some of these twice, and the run would go on with other batches.
    """
    if not is_mapping(state):
        return False
    snapshot = state.get("_snapshot")
    workers: Any = snapshot.get("_worker_snapshots") if is_mapping(snapshot) else {0: state}
    fetchers = [
        one.get("fetcher_state") for one in workers.values() if one.get("dataset_state") is None
    ]
    return len(fetchers) == len(workers) and all(
        is_mapping(one) and one.get("dataset_iter_state", 0) is None for one in fetchers
    )
