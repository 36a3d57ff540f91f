"""What a dataset keeps of what it draws while it fetches, such as a cache: found by fetching again.

A cache lives in whatever process fetches. The main process's is part of a run's state; that of a
worker ends with the worker. So a dataset that keeps what it has *drawn* gives other samples where
the number of workers changes, or where workers begin anew in the middle of a pass. One that keeps
what follows from the index alone, as decoded images, gives the same everywhere. The two are told
apart on a resume, where the first sample is fetched: as if the dataset had kept nothing, twice
under the same random streams and once under others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch

from crosstrain.backends import random_state
from crosstrain.engine.digest import digest
from crosstrain.engine.splitmix import mix

from .attributes import Attributes
from .streams import KeyedDataset, plain_indices, sample_key

_OTHER: Final = 0x6B656570


class Probe:
    """Asks, in the process that fetches, what a dataset keeps; answers in the main process.

    Those of its attributes that had changed when the state was written (`places`) are taken away,
    so that what is kept in them is made anew.
    """

    def __init__(self, attributes: Attributes, places: Iterable[str]) -> None:
        self._attributes = attributes
        self._places = frozenset(places)
        # Each process asks for itself: the one that gives the batch before has then answered.
        self._asked = False
        # Memory that the workers share: whether it was asked, and the answers.
        answers: Any = torch.zeros(4, dtype=torch.uint8)
        self._answers: Any = answers.share_memory_()

    @property
    def answers(self) -> tuple[bool, bool, bool | None]:
        """Whether the dataset keeps what it has drawn from the random streams, and more.

        Whether it gives another sample under the same streams, and whether fetching draws from
        them; the last is None if nothing was fetched.
        """
        asked, keeps, unseen, draws = map(bool, self._answers)
        return keeps, unseen, draws if asked else None

    def on(self, dataset: Any) -> Any:
        """Returns a dataset that asks when its first sample is fetched."""
        batched = getattr(dataset, "__getitems__", None)
        return (_ProbedBatches if batched else _Probed)(dataset, self)

    def ask(self, fetch: Callable[[], Any]) -> None:
        """Fetches as if nothing had been kept, and looks at what comes and what is kept then."""
        if self._asked:
            return
        self._asked = True
        attributes = self._attributes
        kept = attributes.take()
        base = {place: value for place, value in kept.items() if place not in self._places}
        with random_state.preserved(), sample_key() as key:
            state = random_state.capture()

            def fetched(other: bool = False) -> _Fetched:
                attributes.give(base)
                random_state.restore(state)
                if other:
                    key.enter(mix(key.value, _OTHER))
                else:
                    key.enter(key.value, ())
                before = digest(random_state.capture())
                item = digest([fetch()])
                drew = key.asked or digest(random_state.capture()) != before
                return _Fetched(item, digest(attributes.take()), drew)

            # If it fails, it may draw.
            keeps, unseen, draws = False, False, True
            try:
                first, second = fetched(), fetched()
                draws, unseen = first.drew, first.item != second.item
                # The second time it came from where it was kept.
                keeps = first.drew and not second.drew
                if digest(base) != first.kept == second.kept:
                    keeps |= fetched(True).kept != first.kept
            except Exception:  # noqa: BLE001  without what it was given it may fail in any way
                pass
            finally:
                attributes.give(kept)
        for place, answer in enumerate((True, keeps, unseen, draws)):
            self._answers[place] |= answer


class _Fetched(NamedTuple):
    """Digests of a sample and of what the dataset keeps then, and whether it drew."""

    item: str
    kept: str
    drew: bool


class _Probed(KeyedDataset):
    """A dataset that asks a probe when its first sample is fetched."""

    def __init__(self, dataset: Any, probe: Probe) -> None:
        super().__init__(dataset)
        object.__setattr__(self, "probe", probe)

    def __getitem__(self, index: Any) -> Any:
        self.probe.ask(lambda: self.dataset[index])
        return self.dataset[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.dataset, self.probe)


class _ProbedBatches(_Probed):
    """The same for one that is fetched from by whole batches."""

    def __getitems__(self, indices: Any) -> Any:
        """Fetches a batch, and before that its first sample, to ask."""
        if first := list(plain_indices(indices))[:1]:
            self.probe.ask(lambda: self.dataset.__getitems__(first))
        return self.dataset.__getitems__(indices)
