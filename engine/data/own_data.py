"""Data of which each process has a part of its own: what says so, and what does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from crosstrain.backends import World

from .sampling import is_iterable, is_loader


class PerRank:
    """Data of which every process has its own part already: it is taken as it is, by each.

    In a world of several processes, data other than a DataLoader over a map-style dataset cannot be
    dealt out by position. Where it shards itself by rank, wrap it in this to say so:
    `trainer.run(PerRank(data))`.

    Args:
        data: any iterable. Each process has to get as many batches of it, of as many samples.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data: Any = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getattr__(self, name: str) -> Any:
        # Handlers ask a run's data for its sampler, or its batch size.
        if name == "data" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.data, name)

    def __repr__(self) -> str:
        return f"PerRank({self.data!r})"


def own_data(data: Any) -> Any:
    """Returns the data that a `PerRank` holds; other data as it is."""
    return data.data if isinstance(data, PerRank) else data


def is_map_style(data: Any) -> bool:
    """Tells whether data is a DataLoader over a map-style dataset."""
    return is_loader(data) and not is_iterable(data.dataset)


def is_own(data: Any, world: World) -> bool:
    """Tells whether data is each process's own: it says so, or its sampler is distributed."""
    if isinstance(data, PerRank):
        return True
    if not is_map_style(data):
        return False
    batches: Any = data.batch_sampler
    for sampler in (data.sampler, batches, getattr(batches, "sampler", None)):
        replicas, rank = (getattr(sampler, name, None) for name in ("num_replicas", "rank"))
        # Not only torch's: other libraries' name these attributes alike.
        if isinstance(replicas, int) and isinstance(rank, int):
            if (replicas, rank) != (world.size, world.rank):
                raise ValueError(
                    f"The loader's {type(sampler).__name__} has rank={rank} of "
                    f"num_replicas={replicas}, and this process is rank {world.rank} of "
                    f"{world.size}. Leave both out: torch then takes them from the process group, "
                    "which the backend joins when the trainer is made."
                )
            return True
    return False


def not_dealt_out(data: Any, world: World) -> str:
    """Returns what is wrong with data that all processes would iterate over from end to end."""
    if is_map_style(data):
        return (
            f"Each of {world.size} processes would train on all of this DataLoader's data. Make "
            "the trainer with deterministic=True, which deals out each batch to the processes; or "
            "give the loader a torch.utils.data.distributed.DistributedSampler; or wrap data that "
            "shards itself: run(PerRank(loader))."
        )
    return (
        f"{type(data).__name__} cannot be dealt out to {world.size} processes: batches of a "
        "DataLoader over a map-style dataset can. If each process iterates over a part of its own, "
        "say so: run(PerRank(data)), from crosstrain.engine."
    )


def check_own(data: Any, world: World) -> None:
    """Refuses data on all of which each process would train, where an engine deals nothing out."""
    if data is not None and not is_own(data, world):
        raise ValueError(not_dealt_out(data, world))
