"""MapFlow: a DataLoader over a map-style dataset, opened anywhere without fetching."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch.utils.data import default_collate

from crosstrain.backends import World, random_state
from crosstrain.engine.digest import same
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.guards import is_users_object
from crosstrain.engine.loader_workers import iterator_over
from crosstrain.engine.progress import data_length

from .apart import Secluded
from .flows import Dataflow, Iterate, changed_places
from .generators import generators_in
from .keeping import Probe
from .order import draws_at_once
from .own_states import OwnStates, Raw, differing
from .sampling import KeyedSampler, rebuilt
from .shares import ALONE, check_divisible
from .streams import KeyedBatchDataset, KeyedDataset, StreamKey, rank_seed, sample_key


class MapFlow(Dataflow):
    """A DataLoader over a map-style dataset: opened at any batch without fetching, streams keyed.

    The order of pass p is the one that torch gives under `manual_seed(seed + p)`, whatever the
    number of workers. The user's loader is left as it is.
    """

    kind = "a DataLoader over a map-style dataset"
    stays_open = True

    def __init__(self, data: Any, iterate: Iterate, world: World = ALONE) -> None:
        super().__init__(data)
        self._iterate, self._world, self.is_dealt = iterate, world, world.size > 1
        batched = data.batch_sampler is not None
        sampler = data.batch_sampler if batched else data.sampler
        if batched:
            check_divisible(getattr(sampler, "batch_size", None), world)
        # torch's own draws nothing.
        collates = data.collate_fn is not default_collate
        # Not those of the dataset, to which samplers refer: another process fetches from that.
        # Its attributes are this pass's: the user's loader is left as it is.
        self._loader = rebuilt(data)
        self._own = OwnStates(
            (data.dataset,),
            generator=data.generator,
            sampler=getattr(sampler, "sampler", None) if batched else sampler,
            batch_sampler=sampler,
            loader=self._loader,
        )
        self._batched = batched
        self._sampler = KeyedSampler(sampler, batched, collates, world, self._own)
        # The loader draws its workers' base seed from this one, and disturbs no other.
        self._base = torch.Generator()
        changes = {
            "batch_sampler" if batched else "sampler": self._sampler,
            "generator": self._base,
            # Workers that outlive a pass would not have what handlers change of the dataset.
            "persistent_workers": False,
            "in_order": True,
        }
        vars(self._loader).update(changes)
        self._at_opening = self._own.take()
        self._opening: Raw = {}
        # Since the pass was left: what a state has of the samplers, and what they are.
        self._left: tuple[dict[str, Any], Raw] | None = None
        # What the loader is to have when its pass has begun.
        self._awaited: Raw | None = None
        # Asked by the loader that is opened next; whether it fetches otherwise than then.
        self._probe: Probe | None = None
        self._anew = False
        # Whether fetching draws, if that is known.
        self._draws: bool | None = None
        self._generators = sorted(generators_in(data.dataset, "dataset"))
        _warn_of_generators(self._generators)

    def open(
        self, key: StreamKey, batch: int, state: Mapping[str, Any] | None, again: int = 0
    ) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on; fetches nothing before it."""
        workers = self._loader.num_workers > 0
        prepared = self._dataset_prepared
        # Workers have the dataset as it is when they start, and do not see what changes later.
        self._open_dataset(state, "opening" if workers else "now")
        changed = self._attributes.take()
        opening = changed if state is None else state.get("dataset", {}).get("opening", changed)
        self._dataset_at_opening = opening
        seen = self._own.raw()
        if state is not None:
            self._own.give(state)
        loaders = self._own.loaders()
        self._at_opening, self._opening, self._left = self._own.take(), self._own.raw(), None
        self._draw_base_seed()
        # How many samples there are may follow from what has changed of the dataset since.
        with nullcontext() if same(opening, changed) else self._attributes.as_in(opening):
            self._sampler.begin(key, batch - again)
        self.waiting = self._sampler.waiting
        if state is not None and not prepared and "now" in state:
            self._own.give(state["now"], False)
        elif state is not None or not self._own.moves:
            # What handlers have chosen, such as a sampler's epoch, holds for the next pass.
            self._own.put_some(seen)
        if self._sampler.is_over:
            # No workers need to be started to learn that.
            return iter(())
        self._base.manual_seed(rank_seed(key.host_seed, self._world.rank))
        dataset = self.data.dataset
        if self._probe is not None:
            dataset = self._probe.on(dataset)
        vars(self._loader)["dataset"] = _keyed(dataset, self._batched)
        # What the loader changes itself when it is iterated over, it changes again. What it has not
        # changed was of a pass that it had not begun.
        now = self._own.loaders()
        self._awaited = now if state is not None and differing(now, loaders) else None
        self._own.put_loaders(loaders)
        batches = _iterator_of(self._loader, self._sampler, self._enter)
        if not prepared:
            self.give_dataset(state, "now")
        # What is held is what lies on the host: before the backend has moved it.
        if self._loader.num_workers == 0:
            batches = Secluded(batches, key.streams)
        return self._iterate(self._noted(batches))

    def _enter(self) -> None:
        """Gives the loader what it had in the run that was saved, once its pass has begun."""
        if self._awaited is not None:
            self._own.put_loaders(self._awaited)
            self._awaited = None

    def _draw_base_seed(self) -> None:
        # torch draws it first, whatever the number of workers, then the sampler's.
        _ = torch.empty((), dtype=torch.int64).random_(generator=self.data.generator)

    def state(self) -> dict[str, Any]:
        """Returns the samplers' states: as they were when this pass was opened, and as they are."""
        now = None
        if self._left is not None and not differing(self._own.raw(), self._left[1]):
            now = self._left[0]
        if now is None:
            loaders = self._own.loaders()
            if self._awaited is not None:
                self._own.put_loaders(self._awaited)
            now = self._own.take()
            self._own.put_loaders(loaders)
        return {**self._at_opening, "now": now, "dataset": self.dataset_state()}

    def samples(self) -> Any:
        """Returns the dataset's first, middle and last samples, each under the same streams."""
        count = data_length(self.data.dataset)
        if self._loader.num_workers or not count:
            # What workers open is not to be opened in this process.
            return None
        found: list[Any] = []
        kept = self._attributes.take()
        with random_state.preserved(), sample_key() as key:
            try:
                for index in sorted({0, count // 2, count - 1}):
                    key.enter(index)
                    found.append(self.data.dataset[index])
            except Exception:  # noqa: BLE001  its indices may be no numbers
                return None
            finally:
                self._attributes.give(kept)
        return found

    def probe(self, state: Mapping[str, Any], anew: bool = False) -> None:
        """Has the pass that is opened next look at what the dataset keeps of what it draws."""
        places = changed_places(state)
        self._draws = None
        if places or anew or self._loader.num_workers or self.workers_then:
            self._probe, self._anew = Probe(self._attributes, places), anew

    def keeps_anew(self, state: Mapping[str, Any]) -> bool:
        """Tells whether fetching has changed the dataset, and had not in the run that was saved."""
        if self._loader.num_workers or changed_places(state):
            return False
        return bool(self._attributes.take()) or self._attributes.has_grown()

    def probed(self) -> str | None:
        """Returns what was found of what the dataset keeps, if a run cannot go on with it."""
        probe, self._probe = self._probe, None
        workers = self._loader.num_workers
        if probe is None:
            return None
        keeps, unseen, self._draws = probe.answers
        if unseen:
            return (
                "a sample was fetched twice under the same random streams, as if the dataset had "
                "kept nothing of what it fetched, and was another one the second time. Generators "
                f"that were found in it: {', '.join(self._generators) or 'none'}. "
                f"{self.suspects().content}Samples that it has not kept yet will differ. Draw from "
                "current_sample() or the global generators"
            )
        if not keeps or not (workers or self._anew):
            return None
        then = "the run that was saved had kept nothing in its process" if self._anew else ""
        return (
            "the dataset keeps what it has drawn, such as a cache of augmented samples. What a "
            f"worker keeps ends with it, and {then or f'num_workers={workers}'}: samples that were "
            "kept are drawn anew, or the other way round. Keep what follows from the index alone, "
            "and draw after it; or use num_workers=0, then and now"
        )

    def draws_by_workers(self) -> str | None:
        """Returns why fetching by others draws otherwise than in the run that was saved, if so."""
        then, now = self.workers_then, self._loader.num_workers
        if then is None or then == now:
            return None
        if self._own.moves or not draws_at_once(self._sampler.sampler):
            what = "its samplers, which are asked for more than was taken,"
        elif self.data.collate_fn is not default_collate or self._draws is not False:
            what = "its dataset and its collate_fn, here or in the workers,"
        else:
            return None
        return f"what {what} draw follows from num_workers, which was {then} and is {now}"

    def show(self, state: Mapping[str, Any]) -> None:
        """Sets the samplers, too, to what they were when a state was written."""
        if "now" in state:
            self._own.give(state["now"], False)
        super().show(state)

    def as_now(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state with what has changed of the samplers, too, since it was shown."""
        now = self._own.take()
        # Those of samplers that have a state_dict are given when the data is opened.
        states = state.get("now", now)["states"]
        return {**super().as_now(state), "now": {**now, "states": states}}

    def rehearsal(self, batch: int, state: Mapping[str, Any] | None) -> int | None:
        """Returns which batch is fetched twice: the one before, or the first."""
        return min(batch, 1)

    def end(self, batches: int, ended: bool) -> None:
        """Sets the loader's own samplers to where the batches taken leave them.

        Orders are drawn ahead. What somebody else has changed since the pass was opened stays.
        """
        self._enter()
        if not self._own.moves or self._left is not None:
            return
        now, taken = self._own.raw(), self._own.take()
        changed = differing(now, self._sampler.visible)
        if ended:
            self._own.put(self._sampler.ahead[0])
        else:
            with random_state.preserved():
                self._own.put(self._opening)
                self._own.load_states(self._at_opening)
                self._draw_base_seed()
                self._sampler.walk(batches)
        self._own.put_some({place: now[place] for place in changed if place in now})
        self._left = taken, self._own.raw()

    def close(self) -> None:
        """Stops workers."""
        vars(self._loader)["_iterator"] = None

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and samples, and what orders them."""
        sampler, inner = self._sampler.sampler, self._sampler.inner
        found = {**super().fingerprint(), "sampler": type(inner or sampler).__name__}
        if self._own.moves and not self._sampler.is_seekable:
            # Its length is what it says now: it may be another in each pass, or none at all.
            found.pop("batches", None)
        samples = data_length(self.data.dataset)
        return found if samples is None else {**found, "samples": samples}


def _keyed(dataset: Any, batched: bool) -> Any:
    if not batched:
        return KeyedDataset(dataset)
    return KeyedBatchDataset(dataset) if getattr(dataset, "__getitems__", None) else dataset


def _warn_of_generators(found: list[str]) -> None:
    if found:
        warn_user(
            f"The dataset holds random generators of its own: {', '.join(found)}. What is drawn "
            "from them in __getitem__ follows from the process that fetches, not from the sample, "
            "so it does not resume exactly. Draw from current_sample().torch(), .numpy() or "
            ".python(), or from the global generators.",
            ResumeWarning,
        )


def _iterator_of(loader: Any, sampler: KeyedSampler, entered: Callable[[], None]) -> Iterator[Any]:
    """Returns an iterator over a loader that is known to ask its sampler.

    torch's loaders ask when they are iterated over, those of others with their first
    batch; `entered` is called then.
    """
    iterator = iterator_over(loader)
    if sampler.asked:
        entered()
    else:
        iterator = _checked(iterator, sampler, loader, entered)
    return _in_one_thread(iterator, sampler, loader) if is_users_object(loader) else iterator


def _checked(
    iterator: Iterator[Any], sampler: KeyedSampler, loader: Any, entered: Callable[[], None]
) -> Iterator[Any]:
    name = type(loader).__name__
    try:
        first = list(islice(iterator, 1))
    except Exception as error:
        error.add_note(
            f"{name} iterates in a way of its own, and the engine has put a batch sampler of its "
            "own into it. If that is the cause, give run() a torch.utils.data.DataLoader."
        )
        raise
    if first and not sampler.asked:
        raise RuntimeError(
            f"{name} does not take its batches from its batch_sampler when it is iterated "
            "over, so its order can be neither known nor entered in the middle. Give "
            "DeterministicEngine.run() a torch.utils.data.DataLoader."
        )
    if first:
        entered()
    yield from first
    yield from iterator


def _in_one_thread(iterator: Iterator[Any], sampler: KeyedSampler, loader: Any) -> Iterator[Any]:
    """Iterates over a user's loader, and tells if it fetches in a thread of its own."""
    told = loader.num_workers > 0 and sampler.is_seekable
    for batch in iterator:
        if not told and sampler.threads - {threading.get_ident()}:
            told = True
            warn_user(
                f"{type(loader).__name__} fetches in a thread of its own, which draws random "
                "numbers while the step does, from the same generators: no run repeats another "
                "one, resumed or not. Use workers (num_workers=1) and torch's samplers, or give "
                "run() the DataLoader itself.",
                ResumeWarning,
            )
        yield batch
