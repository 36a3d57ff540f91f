"""Dataflows: any data, opened at any batch of any pass, so that the batches are those of that pass.

A pass is one iteration over the data from its beginning. Pass p of a run is opened with the global
generators seeded with seed + p; after that, what is drawn for the data follows from (seed, p,
position), as far as the kind of data allows. Loaders over map-style datasets are in `mapflow.py`,
data that has a state in `stateful.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any, ClassVar

from torch.utils.data import BatchSampler, DataLoader

from crosstrain.engine.digest import same
from crosstrain.engine.errors import ResumeError, ResumeWarning, warn_user
from crosstrain.engine.loader_workers import iterator_over
from crosstrain.engine.progress import data_length

from .apart import Apart
from .attributes import Attributes
from .batch_before import Held, Noted, Suspects
from .own_states import OwnStates, Raw, differing
from .sampling import is_loader, rebuilt
from .shares import Waiting
from .streams import StreamKey

Iterate = Callable[[Any], Iterator[Any]]


class Dataflow:
    """Data that can be opened at a batch of a pass."""

    kind: ClassVar[str] = ""
    #: Among how many processes this is the data of one only; 0 where all have the same.
    owners = 0
    #: Whether each batch is dealt out, to processes or to logical shards.
    is_dealt = False
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
        # What it carries from pass to pass beside these.
        self._own = OwnStates()
        self._dataset_at_opening: dict[str, Any] = {}
        # The names of those that had changed when a state was written that was gone on from.
        self._changed: set[str] = set()
        # Whether handlers have seen the dataset as it was, and may have changed it since.
        self._dataset_prepared = False
        #: The batches that were fetched and not given yet, held; a backend may fetch ahead.
        self.held: deque[Held] = deque()
        #: Of each of these, its indices, and what is this process's; None: they are not known.
        self.waiting: deque[Waiting] | None = None
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

    def _noted(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Returns an iterator over the batches of the pass, which are held until they are given."""
        self.held = deque()
        return Noted(batches, self.held.append)

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
        self.show(state)
        self._dataset_prepared = True

    def show(self, state: Mapping[str, Any]) -> None:
        """Sets what is seen of the data to what it was when a state was written."""
        self.give_dataset(state, "now")

    def as_now(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state that was shown, or an empty one, with what has changed of it since."""
        opening = state.get("dataset", {}).get("opening", {})
        return {**state, "dataset": {"opening": opening, "now": self._attributes.take()}}

    def visible(self) -> tuple[Raw, dict[str, Any]]:
        """Returns what handlers may change: of what orders the data, and of the dataset."""
        return self._own.raw(), self._attributes.take()

    def is_as(self, then: tuple[Raw, dict[str, Any]]) -> bool:
        """Tells whether nothing has changed since `visible` was called."""
        own, attributes = self.visible()
        return not differing(then[0], own) and same(then[1], attributes)

    def give_changed(
        self, then: tuple[Raw, dict[str, Any]], now: tuple[Raw, dict[str, Any]]
    ) -> None:
        """Sets what has changed from one time that `visible` was called to the other."""
        changed = differing(then[0], now[0])
        self._own.put_some({place: now[0][place] for place in changed if place in now[0]})
        if not same(then[1], now[1]):
            self._attributes.give(now[1])

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
        then, now = self._dataset_at_opening, self._attributes.take()
        shared = self._attributes.shared()
        return [name for name in shared if not same(then.get(name), now.get(name))]

    def begun_afresh(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Returns a state that enters a pass from where the data's first one begins, if any."""
        return None

    def anchored(self, state: Mapping[str, Any], batches: int | None = None) -> list[Any]:
        """Returns states that may enter the data where its pass was opened."""
        return []

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
        """Returns what opening a pass moves, to be put back after it was looked at."""
        return self._own.take(), self._attributes.take(), self._dataset_prepared

    def put_back(self, kept: Any) -> None:
        """Puts back what `kept` returned."""
        states, attributes, self._dataset_prepared = kept
        self._own.give(states)
        self._attributes.give(attributes)

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

    def goes_with(self, position: Mapping[str, Any]) -> bool:
        """Tells whether a position is one in this data, as it is or as it was then."""
        # A dataset's length may follow from what handlers have changed of it.
        return _go_together(position["data"], self.fingerprint()) or _go_together(
            position["data"], self.fingerprint_in(position["flow"])
        )

    def check(self, position: Mapping[str, Any]) -> None:
        """Refuses a position in other data.

        Raises:
            ResumeError: with what is other than it was.
        """
        if self.goes_with(position):
            return
        then, now = position["data"], self.fingerprint()
        if then.get("processes") != now.get("processes"):
            raise ResumeError(
                "A position in data that is each process's own, as with a DistributedSampler or "
                "PerRank, holds for as many processes only. The state's data was "
                f"{_owners(then)}; that given to run() is {_owners(now)}. Go on with the "
                "data, and in as many processes, as it was written with. Batches of a DataLoader "
                "without a DistributedSampler, which a DeterministicEngine deals out, go with any "
                "number."
            )
        names = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        changes = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now" for name in names]
        raise ResumeError(
            "The state was written with other data than run() was given: a position in one is none "
            f"in the other ({'; '.join(changes)}). Give run() the data, batch size, sampler and "
            f"dataset that the run had when the state was written.{how_exchanged(position)}"
        )


def how_exchanged(position: Mapping[str, Any]) -> str:
    """Returns how a resumed run comes to the data that was set last; nothing, if none was set."""
    if not (count := position["exchanges"]):
        return ""
    return (
        f" The run that was saved had exchanged its data, {count} time(s): a resumed run begins "
        "without what handlers have set by set_data(). Have the one that sets it do so at STARTED, "
        "too, by trainer.state.epoch or trainer.state.iteration: "
        "@trainer.on(Events.STARTED | Events.EPOCH_COMPLETED); or give run() what was set last."
    )


def _owners(fingerprint: Mapping[str, Any]) -> str:
    count = fingerprint.get("processes")
    return "dealt out, or one process's" if count is None else f"own to each of {count}"


def _go_together(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    told = {name: value for name, value in then.items() if name != "batches" or name in now}
    # States of older versions have a length even where that is a hint.
    return told == {name: value for name, value in now.items() if name != "batches" or name in then}


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
        batches = (data[index] for index in range(batch - again, len(data)))
        return self._iterate(self._noted(batches))

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Returns which batch is fetched twice: the one before, or the first."""
        return min(batch, 1)


class ReplayedFlow(Dataflow):
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
        iterator = iterator_over(source)
        if self.apart:
            iterator = Apart(iterator)
        continues = iterator is self.data and self._opened
        self._opened = True
        if batch and not continues:
            why = "offers no state_dict/load_state_dict that take no further arguments"
            iterator = skipped_to(iterator, batch, again, self.data, why)
        return self._noted(iterator)

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


class PassTooShort(RuntimeError):
    """A pass over data has ended before the batch that a run is to go on with."""


def skipped_to(
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
        raise PassTooShort(
            f"The data ({name}) gave {skipped} batches, but the run to go on with had taken "
            f"{batch} of this pass. Give run() the data that it had; an iterator must be a new "
            "one, at its beginning."
        )
    return chain(first, iterator)
