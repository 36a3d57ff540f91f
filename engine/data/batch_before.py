"""The batch before: what a state keeps of the batch that was consumed last, and how it is compared.

A resume opens its data one batch early, fetches that batch once more and compares it with what the
state keeps: a digest of each tensor, array and plain value in it, and the indices that its sampler
gave. So other data, another order or other random numbers are found before a step is done, whatever
their cause.

A step may change its batch: it pops a label from a dictionary, moves an image to the device in its
place, adds noise to a tensor. The containers are therefore held as they were fetched, and a tensor
that was written into since (`tensor._version`) is left out of the comparison, by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy
import torch

from crosstrain.backends import World
from crosstrain.engine.digest import Attributes, Leaf, differences, digest, leaf_of, parts

# A batch as it was fetched: its containers copied, and each tensor with its version.
Held = tuple[Any, list[tuple[torch.Tensor, int]]]

# Parts that are told apart by name; further ones are one digest together.
_NAMED: Final = 256
_SHOWN: Final = 16
_LEVELS: Final = 5
_LEAVES: Final = frozenset({int, float, bool, str, bytes, type(None), numpy.ndarray})


class Suspects(NamedTuple):
    """What batches are fetched with, each as a phrase: what a difference may come from.

    Args:
        order: what decides which samples a batch has.
        content: what makes the samples and the batch.
        generators: random generators that were found there, by name.
        changed: what has changed there in the course of the run, by name.
    """

    order: str = ""
    content: str = ""
    generators: Sequence[str] = ()
    changed: Sequence[str] = ()


class Noted:
    """Gives what an iterator gives, and holds it for the record of the batch before."""

    def __init__(self, iterator: Iterator[Any], append: Any) -> None:
        self._iterator = iterator
        self._append = append

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self._append(hold(item))
        return item


def hold(item: Any) -> Held:
    """Returns a batch whose containers nobody else changes: what it has in it is not copied."""
    versions: list[tuple[torch.Tensor, int]] = []
    if (type(item) is list or type(item) is tuple) and _are_tensors(item, versions):
        return list(item), versions
    versions.clear()
    return _hold(item, versions, _LEVELS), versions


def _are_tensors(items: Sequence[Any], versions: list[tuple[torch.Tensor, int]]) -> bool:
    """Tells whether a batch is tensors only, as most are, held without a call each."""
    try:
        for item in items:
            if type(item) is not torch.Tensor:
                return False
            versions.append((item, item._version))
    except RuntimeError:  # of inference mode
        return False
    return True


def _hold(item: Any, versions: list[tuple[torch.Tensor, int]], levels: int) -> Any:
    kind: Any = type(item)
    if kind is torch.Tensor:
        versions.append((item, _version(item)))
        return item
    if kind in _LEAVES or levels == 0:
        return item
    levels -= 1
    if kind is list or kind is tuple:
        if item and type(item[0]) in _LEAVES:
            # Labels, names, boxes: one look at each would be felt.
            return tuple(item)
        return [_hold(part, versions, levels) for part in item]
    return _hold_other(item, versions, levels)


def _hold_other(item: Any, versions: list[tuple[torch.Tensor, int]], levels: int) -> Any:
    if isinstance(item, torch.Tensor):
        versions.append((item, _version(item)))
        return item
    if isinstance(item, dict):
        return {key: _hold(value, versions, levels) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_hold(part, versions, levels) for part in item]
    attributes: dict[str, Any] | None = getattr(item, "__dict__", None)
    if not attributes or isinstance(item, type) or callable(item):
        return item
    held = {name: _hold(value, versions, levels) for name, value in attributes.items()}
    return Attributes(type(item).__name__, held)


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:
        # A tensor of inference mode has none.
        return -1


def record(held: Held, indices: Any, world: World) -> dict[str, Any]:
    """Returns what a state keeps of a batch, as plain values."""
    leaves, changed = _leaves(held)
    return {
        "parts": [list(leaf) for leaf in leaves],
        "changed": changed,
        "indices": None if indices is None else _record_indices(indices),
        "rank": world.rank,
        "processes": world.size,
    }


def _leaves(held: Held) -> tuple[list[Leaf], list[str]]:
    """Returns the leaves of a batch, and the paths of those that were changed in place."""
    item, versions = held
    moved = {id(tensor) for tensor, version in versions if _version(tensor) != version}
    found: list[Leaf] = []
    changed: list[str] = []
    walk = parts(item)
    for path, part in islice(walk, _NAMED):
        if id(part) in moved:
            changed.append(path)
        else:
            found.append(leaf_of(path, part))
    rest = [
        part if id(part) not in moved else None  # Of what was changed, that it is there.
        for _, part in walk
    ]
    if rest:
        if any(part is None for part in rest):
            changed.append(f"the parts after the first {_NAMED}")
        else:
            found.append(Leaf(f" (after its first {_NAMED} parts)", f"{len(rest)}", digest(rest)))
    return found, changed


def _record_indices(indices: Any) -> dict[str, Any]:
    plain = indices.tolist() if isinstance(indices, (torch.Tensor, numpy.ndarray)) else indices
    if isinstance(plain, (list, tuple, set, frozenset)):
        many: list[Any] = list(plain)
        return {"count": len(many), "digest": digest(many), "first": repr(many[:_SHOWN])}
    return {"count": 1, "digest": digest([plain]), "first": repr(plain)}


def is_comparable(before: Any, world: World) -> str | None:
    """Tells why a batch that a state keeps cannot be compared; None where it can."""
    if before is None:
        return "the state is an older version's"
    if "reason" in before:
        return str(before["reason"])
    if (before["rank"], before["processes"]) != (world.rank, world.size):
        return f"the state was written by {before['processes']} processes"
    return None


def differs(before: Mapping[str, Any], held: Held, indices: Any) -> bool:
    """Tells whether a batch is another than the one that a state keeps."""
    return difference(before, held, indices, Suspects())[0] is not None


def difference(
    before: Mapping[str, Any], held: Held | None, indices: Any, suspects: Suspects
) -> tuple[str | None, str]:
    """Returns what of a batch is other than in its record, None if nothing, and its usual causes.

    It is None where the data has no such batch any more.
    """
    if held is None:
        return "the data has no such batch any more", suspects.order + _ORDER
    then, now = before["indices"], None if indices is None else _record_indices(indices)
    if then is not None and now is not None and then != now:
        told = f"its indices began with {then['first']} and begin with {now['first']}"
        return told, suspects.order + _ORDER
    changed = set(before["changed"])
    fresh = [leaf for leaf in _leaves(held)[0] if leaf.path not in changed]
    wanted = [Leaf(*leaf) for leaf in before["parts"]]
    found = next(differences(wanted, fresh), None)
    if found is None:
        return None, ""
    named = suspects.content
    if suspects.generators:
        named += f"Random generators that the data holds: {', '.join(suspects.generators)}. "
    if suspects.changed:
        named += (
            f"What has changed of it in the course of the run: {', '.join(suspects.changed)}. If a "
            "handler does that between a batch and the next, batches that were fetched before "
            "cannot be compared; what comes goes on as it was. "
        )
    return f"in it {found}", named + _CONTENT


_ORDER: Final = (
    "Usual causes of another order: a sampler or a split that draws from an unseeded generator "
    "(random_split(..., generator=torch.Generator().manual_seed(0)) is seeded), a sampler with a "
    "state that no attribute or state_dict tells, data of another order or length."
)
_CONTENT: Final = (
    "Usual causes: an unseeded split or shuffle before the loader, a generator of the dataset's, "
    "its transforms' or its collate_fn's own, also one made in worker_init_fn or on first use "
    "(draw from current_sample() or the global generators instead), a handler that changes the "
    "dataset, data that was changed on disk, an array that the step had changed in place."
)
