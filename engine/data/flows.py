"""Dataflows: any data, opened at any batch of any pass, so that the batches are those of that pass.

A pass is one iteration over the data from its beginning. Pass p of a run is opened with the global
generators seeded with seed + p; after that, what is drawn for the data follows from (seed, p,
position), as far as the kind of data allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any, ClassVar

from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.loader_workers import workers_left_alone
from crosstrain.engine.progress import data_length

from .apart import Apart
from .batch_before import Held, Noted
from .generators import OwnStates
from .sampling import is_loader, rebuilt
from .shares import BatchShare
from .streams import StreamKey

__all__ = ["Dataflow", "Iterate", "NoData", "ReplayedFlow", "SequenceFlow", "StatefulFlow"]

Iterate = Callable[[Any], Iterator[Any]]


class Dataflow:
    """Data that can be opened at a batch of a pass.

    Args:
        data: what `Engine.run` was given.
    """

    kind: ClassVar[str] = ""
    #: Among how many processes this is the data of one only; 0 where all have the same.
    owners = 0
    #: Whether it draws from random streams of its own, and the step's are to be others.
    apart = False
    #: Why a batch of it cannot be fetched once more; None where it can.
    unrepeatable: str | None = None

    def __init__(self, data: Any) -> None:
        self.data = data
        #: The batches that were fetched and not given yet, held; a backend may fetch ahead.
        self.held: deque[Held] = deque()

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

    @property
    def shares(self) -> deque[BatchShare] | None:
        """What is this process's of each batch that is to be given; None: all of it."""
        return None

    @property
    def indices(self) -> deque[Any] | None:
        """The indices of each batch that is to be given; None where there are none."""
        return None

    def suspects(self) -> list[str]:
        """Returns the names of generators that the data holds and that no key reaches."""
        return []

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Sets what handlers see of the data to what it was when a state was written.

        Args:
            state: what `state` returned; `open` is given it next.
        """

    def end(self, batches: int, ended: bool) -> None:
        """Leaves the pass, after which another is opened.

        Args:
            batches: how many batches of it were taken.
            ended: whether it was found to have no more.
        """

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
    """A list, or another sequence of batches: entered anywhere.

    Args:
        data: the sequence.
        iterate: makes an iterator, such as a backend's `batches`.
    """

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


class ReplayedFlow(Dataflow):
    """Iterable data without a state: batches before the wanted one are fetched and thrown away.

    It is not fetched ahead. What it draws from the global generators are random streams of its own,
    unless it is its own iterator: a generator draws where the step does, too.
    """

    kind = "iterable data"

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        # Workers that outlive a pass would carry random states from it into the next.
        self._loader: Any = rebuilt(data, persistent_workers=False) if is_loader(data) else None
        self._own = OwnStates(data=data)
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
        """Returns an iterator over a pass from a batch on; warns if that takes fetching.

        Raises:
            RuntimeError: if there are not that many batches.
        """
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
        name = type(self.data).__name__
        warn_user(
            f"{name} offers no state_dict/load_state_dict, so its first {batch} batches are "
            "fetched and thrown away to go on after them. Give it both (torchdata's protocol), or "
            "use a DataLoader over a map-style dataset.",
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
        return Noted(chain(first, iterator), self.held.append)

    def state(self) -> dict[str, Any]:
        """Returns the states that the data's own generators had when this pass was opened."""
        return self._at_opening

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and workers: each worker has its own part of the data."""
        found = super().fingerprint()
        return found if self._loader is None else {**found, "workers": self._loader.num_workers}


class StatefulFlow(Dataflow):
    """Iterable data with `state_dict` and `load_state_dict`: asked for its state, and given it.

    It is not fetched ahead: its state would be that of a batch that has not been used yet.

    Args:
        data: what is iterated over.
        owner: what has the state: the data, or the dataset of a loader without workers.
    """

    kind = "iterable data with a state"
    unrepeatable = "data with a state of its own goes on behind it"

    def __init__(self, data: Any, owner: Any) -> None:
        super().__init__(data)
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

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on, by the data's own state."""
        self._closed_state, self._ended, self._apart = None, False, None
        if state is not None:
            self._owner.load_state_dict(state["data"])
        if state is not None and state["ended"]:
            # What is left of the pass is nothing, and the data's state is that before the next one.
            if is_loader(self._owner):
                # torchdata's loader takes its state when it is first iterated over, which draws
                # random numbers: here, and not when the next pass is opened.
                with workers_left_alone(self._source):
                    iter(self._source)
            self._iterator, self._ended = iter(()), True
            return iter(())
        with workers_left_alone(self._source):
            self._iterator = iter(self._source)
        if not self.apart:
            return self._watched(self._iterator)
        self._apart = Apart(self._iterator, None if state is None else state.get("random"))
        return self._watched(self._apart)

    def _watched(self, iterator: Iterator[Any]) -> Iterator[Any]:
        yield from iterator
        self._ended = True

    def state(self) -> dict[str, Any]:
        """Returns the data's own state, and whether it is that of a pass that has ended."""
        if self._closed_state is not None:
            return self._closed_state
        # torch's loader has found the end of its dataset already when a last batch is not full.
        fetcher = getattr(self._iterator, "_dataset_fetcher", None)
        found = self._owner is not self._source and getattr(fetcher, "ended", False)
        if not self._ended and hasattr(self._source, "restart_on_stop_iteration"):
            # torchdata's pipelines: loaded at a pass's end, they begin the next one at once.
            has_next: Any = getattr(self._iterator, "has_next", lambda: True)
            found = not (has_next() if self._apart is None else self._apart.call(has_next))
        random = None if self._apart is None else self._apart.states()
        return {"data": self._owner.state_dict(), "ended": self._ended or found, "random": random}

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
