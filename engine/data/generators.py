"""Random generators that objects hold: found by name, and their states taken and set."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import numpy
import torch
from torch.utils.data import Dataset, Sampler

from crosstrain.backends.random_state import with_arrays, without_arrays
from crosstrain.engine.guards import is_users_object, own_attributes

GENERATORS: Final = (
    torch.Generator,
    random.Random,
    numpy.random.Generator,
    numpy.random.RandomState,
)
_LOOKED_INTO: Final = (Dataset, Sampler, list, tuple, dict, *GENERATORS)
# How far is looked: further than this, generators belong to something else.
_DEPTH: Final = 4
_MANY: Final = 64
_GLOBAL: Final = (
    torch.default_generator,
    getattr(random.seed, "__self__", None),
    getattr(numpy.random.mtrand, "_rand", None),
)
#: The identities of those that all share: they are nobody's own, and part of every state.
GLOBAL_GENERATORS: Final = frozenset(map(id, _GLOBAL))
TRANSFORMS: Final = ("transform", "transforms", "target_transform", "collate_fn")


def generators_in(thing: Any, name: str, apart: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Returns the random generators that an object holds, by name, each once.

    Looked into are its attributes, and theirs where they are lists, transforms, samplers, data or
    objects of the user's; not the data in `apart`, and then no other dataset, either.
    """
    found: dict[str, Any] = {}
    _collect(thing, name, apart, _DEPTH, found)
    return found


def _collect(
    thing: Any, name: str, apart: tuple[Any, ...], depth: int, found: dict[str, Any]
) -> None:
    if apart and (isinstance(thing, Dataset) or any(thing is one for one in apart)):
        return
    if isinstance(thing, GENERATORS):
        if id(thing) not in {*GLOBAL_GENERATORS, *map(id, found.values())}:
            found[name] = thing
    elif depth > 0:
        # An object of the user's may raise anything; what it draws then shows in its batches.
        with contextlib.suppress(Exception):
            for part, value in _parts(thing):
                _collect(value, f"{name}{part}", apart, depth - 1, found)


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thing, (list, tuple, dict)):
        pairs = thing.items() if type(thing) is dict else enumerate(thing)
        items = list(islice(pairs, _MANY + 1))
        if len(items) <= _MANY:
            yield from ((f"[{key!r}]", item) for key, item in items)
        return
    for name, value in (own_attributes(thing) or {}).items():
        if isinstance(value, _LOOKED_INTO) or name in TRANSFORMS or is_users_object(value):
            yield f".{name}", value


def raw_state(generator: Any) -> Any:
    """Returns the state of a random generator as this process has it: to be put back, not saved."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def set_raw_state(generator: Any, state: Any) -> None:
    """Sets what `raw_state` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, numpy.random.RandomState)):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def generator_state(generator: Any) -> Any:
    """Returns the state of a random generator, as tensors and plain types."""
    state = raw_state(generator)
    if isinstance(generator, torch.Generator):
        return state
    return list(state) if isinstance(generator, random.Random) else without_arrays(state)


def set_generator_state(owner: Any, state: Any) -> None:
    """Sets the state of a random generator to what `generator_state` returned."""
    if isinstance(owner, torch.Generator):
        state = state.cpu()
    elif isinstance(owner, random.Random):
        version, words, gauss = state
        state = version, tuple(words), gauss
    else:
        state = with_arrays(state, raw_state(owner))
    set_raw_state(owner, state)
