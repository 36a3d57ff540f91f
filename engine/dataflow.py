"""Dataflows: any data, opened at any batch of any pass, so that the batches are those of that pass.

A pass is one iteration over the data from its beginning. Pass p of a run is opened with the global
generators seeded with seed + p; after that, what is drawn for the data follows from (seed, p,
position), as far as the kind of data allows.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, IterableDataset

from crosstrain.backends import random_state

from .progress import data_length
from .sampling import KeyedSampler, generators_of, rebuilt
from .streams import KeyedDataset, StreamKey

__all__ = ["Dataflow", "MapFlow", "ReplayedFlow", "StatefulFlow", "dataflow_of"]

Iterate = Callable[[Any], Iterator[Any]]


class Dataflow:
    """Data that can be opened at a batch of a pass; this one by fetching what comes before it.

    Args:
        data: what `Engine.run` was given.
        iterate: makes an iterator of it, such as a backend's `batches`.
    """

    def __init__(self, data: Any, iterate: Iterate) -> None:
        self.data = data
        self.iterate = iterate

    def open(self, key: StreamKey, batch: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on.

        Args:
            key: which pass of which run.
            batch: how many of its batches to leave out.
            state: what `state` returned at that batch; None where the pass is opened by the run
                itself.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Returns what is needed to open this pass again, besides the key and the batch."""
        return {}

    def close(self) -> None:
        """Lets go of what iterating over the data holds; `state` is still known."""

    def fingerprint(self) -> dict[str, Any]:
        """Returns what tells this data from other data: a position in one is none in the other."""
        length = data_length(self.data)
        return {} if length is None else {"batches": length}


class ReplayedFlow(Dataflow):
    """Iterable data without a state: batches before the wanted one are fetched and thrown away."""

    def open(self, key: StreamKey, batch: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on; warns if that takes fetching."""
        if isinstance(self.data, Sequence):
            data: Sequence[Any] = self.data
            return self.iterate(data[index] for index in range(batch, len(data)))
        if batch:
            warnings.warn(
                f"{type(self.data).__name__} offers no state_dict/load_state_dict, so its first "
                f"{batch} batches are fetched and thrown away to resume after them. Give it both "
                "(torchdata's protocol), or use a DataLoader over a map-style dataset.",
                stacklevel=2,
            )
        iterator = iter(self.data)
        skipped = sum(1 for _ in islice(iterator, batch))
        if skipped < batch:
            raise RuntimeError(
                f"The data ({type(self.data).__name__}) gave {skipped} batches, but the run to go "
                f"on with had taken {batch} of this pass. Resume with the data that it had; an "
                "iterator must be a new one."
            )
        return self.iterate(iterator)


class StatefulFlow(Dataflow):
    """Iterable data with `state_dict` and `load_state_dict`: asked for its state, and given it."""

    _closed_state: dict[str, Any] | None = None

    def open(self, key: StreamKey, batch: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on, by the data's own state."""
        self._closed_state = None
        if state is not None and "data" in state:
            self.data.load_state_dict(state["data"])
        return self.iterate(self.data)

    def state(self) -> dict[str, Any]:
        """Returns the data's own state."""
        return self._closed_state or {"data": self.data.state_dict()}

    def close(self) -> None:
        """Keeps the data's state: asked without an iterator, some loaders would make a new one."""
        self._closed_state = self.state()


class MapFlow(Dataflow):
    """A DataLoader over a map-style dataset: opened at any batch without fetching, streams keyed.

    The order of pass p is the one that torch gives under `manual_seed(seed + p)`, whatever the
    number of workers. The user's loader is left as it is.

    Args:
        data: the loader.
        iterate: makes an iterator of a loader.
    """

    def __init__(self, data: DataLoader[Any], iterate: Iterate) -> None:
        super().__init__(data, iterate)
        batched = data.batch_sampler is not None
        self.sampler = KeyedSampler(data.batch_sampler if batched else data.sampler, batched)
        dataset: Any = data.dataset
        if not batched or getattr(dataset, "__getitems__", None):
            dataset = KeyedDataset(dataset)
        # The loader draws its workers' base seed from this one, and disturbs no other.
        self._base = torch.Generator()
        name = "batch_sampler" if batched else "sampler"
        self.loader = rebuilt(data, dataset=dataset, generator=self._base, **{name: self.sampler})
        self._generators = generators_of(data)
        self._at_opening: dict[str, Any] = {}

    def open(self, key: StreamKey, batch: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        """Returns an iterator over a pass from a batch on; fetches nothing before it.

        Raises:
            ValueError: if the state has a generator that the loader lacks, or the other way round.
        """
        if state is not None:
            self._set_generators(state.get("generators", {}))
        self._at_opening = {name: _state_of(g) for name, g in self._generators.items()}
        # torch draws the base seed first, whatever the number of workers, then the sampler's.
        _ = torch.empty((), dtype=torch.int64).random_(generator=self.data.generator)
        self.sampler.begin(key, batch)
        self._base.manual_seed(key.seed + key.epoch)
        iterator = self.iterate(self.loader)
        return _Secluded(iterator, key.streams) if self.data.num_workers == 0 else iterator

    def close(self) -> None:
        """Stops persistent workers."""
        self.loader.__dict__["_iterator"] = None

    def state(self) -> dict[str, Any]:
        """Returns the states that the loader's own generators had when this pass was opened."""
        return {"generators": dict(self._at_opening)}

    def fingerprint(self) -> dict[str, Any]:
        """Returns the numbers of batches and samples, as far as they are known."""
        samples = data_length(self.data.dataset)
        return {**super().fingerprint(), **({} if samples is None else {"samples": samples})}

    def _set_generators(self, states: Mapping[str, Any]) -> None:
        if set(states) != set(self._generators):
            raise ValueError(
                f"The state holds generators of the loader named {sorted(states)}, and the loader "
                f"given to run() has {sorted(self._generators)}. Make the loader with the same "
                "generators as in the run that wrote the state."
            )
        for name, state in states.items():
            _set_state(self._generators[name], state)


class _Secluded:
    """Fetches in the main process, and leaves that process's own random streams as they were."""

    def __init__(self, iterator: Iterator[Any], streams: tuple[str, ...]) -> None:
        self._iterator = iterator
        self._streams = streams
        # NumPy's state is large; exchanging the generator behind numpy.random copies nothing.
        self._numpy = numpy.random.MT19937(0)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        streams = self._streams
        python = random.getstate() if "python" in streams else None
        torch_state = torch.get_rng_state() if "torch" in streams else None
        numpy_before = numpy.random.get_bit_generator() if "numpy" in streams else None
        if numpy_before is not None:
            numpy.random.set_bit_generator(self._numpy)
        try:
            return next(self._iterator)
        finally:
            if python is not None:
                random.setstate(python)
            if torch_state is not None:
                torch.set_rng_state(torch_state)
            if numpy_before is not None:
                numpy.random.set_bit_generator(numpy_before)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return list(generator.getstate())
    return random_state.without_arrays(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    else:
        bits = generator.bit_generator
        bits.state = random_state.with_arrays(state, bits.state)


def dataflow_of(data: Iterable[Any], iterate: Iterate) -> Dataflow:
    """Returns the dataflow for a kind of data."""
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return MapFlow(data, iterate)
    if all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict")):
        return StatefulFlow(data, iterate)
    return ReplayedFlow(data, iterate)
