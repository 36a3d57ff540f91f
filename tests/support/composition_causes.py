"""What of a composition can make a resume differ, and the words by which a message names it.

A message counts for a composition if it names a building block that is in it and that can make
the difference. One that names something else leaves its reader to look in the wrong place, and is
as bad as none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import composition_kept as kept
import composition_parts as parts

if TYPE_CHECKING:
    from compositions import Composition

__all__ = ["Cause", "causes_of", "without"]

Words = tuple[tuple[str, ...], ...]

# Of a handler, what a message may name it by. The others' work is all in what is saved.
_HANDLERS: dict[str, Words] = {
    # Refused at EPOCH_STARTED, whichever run comes to it there.
    "ends the epoch": (("terminate_epoch()", "Events.EPOCH_STARTED"),),
    "changes the dataset": (("shift",), ("handlers of EPOCH_STARTED",)),
    "freezes": (("requires_grad",), ("first.weight",)),
    "adds a group": (("parameter group",), ("param_group",)),
    "evaluates on the training data": (("self.data", "num_workers"),),
    "reweighs": (("weights",),),
    "gives feedback": (("weights",),),
    "exchanges the data": (("set_data",),),
    "raises dropout": (("drop",),),
}
_MODELS: dict[str, Words] = {"counts": (("steps",),), "buffer": (("average",),)}


@dataclass(frozen=True)
class Cause:
    """A building block that can make a difference.

    Args:
        name: the block.
        words: a message names it that holds all words of one of these.
        changes: fields of a composition without it.
    """

    name: str
    words: Words
    changes: tuple[tuple[str, Any], ...]

    def is_named_in(self, messages: Iterable[str]) -> bool:
        """Tells whether one of some messages names it."""
        return any(all(word in m for word in some) for m in messages for some in self.words)


def without(composition: Composition, causes: Sequence[Cause]) -> Composition:
    """Returns a composition with harmless blocks in some causes' places."""
    for cause in causes:
        for name, value in cause.changes:
            if name == "kept":
                left = tuple(one for one in composition.kept if one != value)
                composition = dataclasses.replace(composition, kept=left)
            elif name == "handler":
                left = tuple(one for one in composition.handlers if one[0] != value)
                composition = dataclasses.replace(composition, handlers=left)
            elif name.startswith("draws "):
                draws = list(composition.draws)
                draws[int(name.split()[1])] = value
                composition = dataclasses.replace(composition, draws=tuple(draws))
            else:
                composition = dataclasses.replace(composition, **{name: value})
    return composition


def causes_of(composition: Composition, hidden: Iterable[tuple[Any, str]]) -> list[Cause]:
    """Returns the blocks of a composition that can make a resume differ.

    Args:
        composition: what is played.
        hidden: the object in which each hidden generator lies, and the place there.
    """
    found = [_hidden(type(owner), place) for owner, place in hidden]
    if composition.dataset in parts.MAPPED:
        kind = parts.OWN_SAMPLERS.get(composition.sampler)
        if kind is not None:
            # A sampler with a state of its own: the order differs, and it is named.
            words = ((f"class {kind.__name__}", "indices"),)
            found.append(Cause(f"the sampler {kind.__name__}", words, (("sampler", "shuffled"),)))
    if composition.dataset == "caching":
        words = (("the dataset keeps",), ("dataset.cache",))
        found.append(Cause("the cache", words, (("dataset", "map"),)))
    if composition.dataset in ("stateful", "start-keeping"):
        words = (("state_dict", parts.ITERABLE[composition.dataset].__name__),)
        found.append(Cause("the stream's state", words, (("dataset", "stream"),)))
        if composition.loader in ("scaling", "generating"):
            # The stream's own state tells where it goes on, and nothing of the loader's.
            called = f"class {parts.LOADERS[composition.loader].__name__}"
            words = ((called, "contents"), ("the loader's __iter__", "self.passes"))
            found.append(Cause("the loader", words, (("loader", "plain"),)))
    if composition.second != "none":
        found.append(Cause("the second loader", ((".others",),), (("second", "none"),)))
    if composition.workers[0] != composition.workers[1]:
        then, now = composition.workers
        words = (
            (f"was {then} and is {now}",),
            (f"workers: {then} then, {now} now",),
            (f"had num_workers={then}", f"has num_workers={now}"),
        )
        found.append(Cause("the workers", words, (("workers", (0, 0)),)))
    if composition.persistent and all(composition.workers):
        words = (("draws in its persistent workers", "self.held_out"),)
        found.append(Cause("persistent workers", words, (("persistent", False),)))
    if composition.model in _MODELS:
        words = _MODELS[composition.model]
        found.append(Cause(f"the model {composition.model}", words, (("model", "plain"),)))
    if composition.optimizer == "counting":
        words = (("Counting", "count"), ("optimizer", "count"))
        found.append(Cause("the optimizer", words, (("optimizer", "sgd"),)))
    for place, kind in composition.kept:
        if place in kept.places_of(composition):
            words = tuple(itertools.product(kept.PLACES[place][1], kept.KINDS[kind][1]))
            found.append(Cause(f"{kind} in {place}", words, (("kept", (place, kind)),)))
    for name, _, _ in composition.handlers:
        if name in _HANDLERS:
            found.append(Cause(f"what {name}", _HANDLERS[name], (("handler", name),)))
    return found


def _hidden(owner: Any, place: str) -> Cause:
    """Returns the cause that a hidden generator is: told by its place, or by who holds it."""
    number = 1
    roles = ["dataset", "data"]
    if owner is parts.Collate:
        number, roles = 2, ["collate_fn"]
    elif owner in parts.OWN_SAMPLERS.values():
        number, roles = 0, ["sampler"]
    words = [(role, word) for role in roles for word in parts.PLACES[place]]
    # A batch differs: what it was fetched with is named, and what to look for there.
    differs = "indices" if number == 0 else "contents"
    words.append((f"class {owner.__name__}", "fetched twice", "another one the second time"))
    words += [(f"class {owner.__name__}", differs), ("class Pair", differs)]
    name = f"the generator of {owner.__name__}, {place}"
    return Cause(name, tuple(words), ((f"draws {number}", "nothing"),))
