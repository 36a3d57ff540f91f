"""The generators and states that data holds of its own: found, taken and given back by name."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

import numpy
import torch
from torch.utils.data import Dataset, Sampler

from crosstrain.backends import random_state
from crosstrain.engine.guards import is_collection

__all__ = ["OwnStates", "generators_in", "is_stateful"]

_KINDS: Final = (
    torch.Generator,
    random.Random,
    numpy.random.Generator,
    numpy.random.RandomState,
)
# What is looked into: further than this, generators belong to something else.
_DEPTH: Final = 4
_MANY: Final = 64
# They are nobody's own.
_GLOBAL: Final = (
    torch.default_generator,
    getattr(random.seed, "__self__", None),
    getattr(numpy.random.mtrand, "_rand", None),
)
_TRANSFORMS: Final = ("transform", "transforms", "target_transform", "collate_fn")


def generators_in(
    thing: Any, name: str, through: tuple[type, ...] = (Dataset, Sampler)
) -> dict[str, Any]:
    """Returns the random generators that an object holds, by name, each once.

    Looked into are its attributes, and theirs where they are lists, transforms, or of some types.

    Args:
        thing: a sampler, a dataset, any object.
        name: what it is called in the names.
        through: those types.

    Returns:
        `torch.Generator`, `random.Random`, `numpy.random.Generator` and `RandomState` objects.
    """
    found: dict[str, Any] = {}
    _collect(thing, name, (*through, list, tuple, *_KINDS), _DEPTH, found)
    return found


def _collect(
    thing: Any, name: str, through: tuple[type, ...], depth: int, found: dict[str, Any]
) -> None:
    if isinstance(thing, _KINDS):
        if not any(thing is known for known in (*_GLOBAL, *found.values())):
            found[name] = thing
    elif depth > 0:
        for part, value in _parts(thing, through):
            _collect(value, f"{name}{part}", through, depth - 1, found)


def _parts(thing: Any, through: tuple[type, ...]) -> Iterator[tuple[str, Any]]:
    if is_collection(thing, (list, tuple)):
        items = list(islice(thing, _MANY + 1))
        if len(items) <= _MANY:
            yield from ((f"[{index}]", item) for index, item in enumerate(items))
        return
    attributes: dict[str, Any] = getattr(thing, "__dict__", {})
    for name, value in attributes.items():
        if isinstance(value, through) or name in _TRANSFORMS:
            yield f".{name}", value


class OwnStates:
    """Takes and gives back what samplers, or iterable data, carry from pass to pass.

    These are their generators; a sampler's epoch, as of torch's `DistributedSampler`; and what
    they give by `state_dict`, if they take it back by `load_state_dict`.

    Args:
        through: as of `generators_in`.
        **owners: the objects, by what they are called in messages.
    """

    def __init__(self, through: tuple[type, ...] = (Dataset, Sampler), **owners: Any) -> None:
        self.generators: dict[str, Any] = {}
        for name, owner in owners.items():
            for where, generator in generators_in(owner, name, through).items():
                if not any(generator is known for known in self.generators.values()):
                    self.generators[where] = generator
        self._epochs = {
            name: owner
            for name, owner in owners.items()
            if callable(getattr(owner, "set_epoch", None))
            and isinstance(getattr(owner, "epoch", None), int)
        }
        # Iterable data that has one is asked for it at its position.
        samplers = {name: owner for name, owner in owners.items() if _is_sampler(owner)}
        self._stateful = {name: owner for name, owner in samplers.items() if is_stateful(owner)}

    @property
    def moves(self) -> bool:
        """Whether giving out an order changes one of the states."""
        return bool(self.generators or self._stateful)

    def take(self) -> dict[str, Any]:
        """Returns the states, as tensors and plain types where they are ours to choose."""
        return {
            "generators": {name: _state_of(value) for name, value in self.generators.items()},
            "epochs": self.epochs(),
            "states": {name: owner.state_dict() for name, owner in self._stateful.items()},
        }

    def give(self, states: Mapping[str, Any]) -> None:
        """Sets what `take` returned.

        Raises:
            ValueError: if the objects that have such states are not those that had.
        """
        for kind, owners in (
            ("epochs", self._epochs),
            ("generators", self.generators),
            ("states", self._stateful),
        ):
            then: Mapping[str, Any] = states.get(kind, {})
            if set(then) != set(owners):
                raise ValueError(
                    f"The state holds {kind} of the data named {sorted(then)}, and the data given "
                    f"to run() has {sorted(owners)}. Make the data with the same generators and "
                    "samplers as in the run that wrote the state."
                )
            for name, state in then.items():
                _set_state(kind, owners[name], state)

    def epochs(self) -> dict[str, int]:
        """Returns the samplers' epochs."""
        return {name: owner.epoch for name, owner in self._epochs.items()}

    def set_epochs(self, epochs: Mapping[str, int]) -> None:
        """Sets what `epochs` returned."""
        for name, epoch in epochs.items():
            self._epochs[name].set_epoch(epoch)


def _is_sampler(thing: Any) -> bool:
    return isinstance(thing, Sampler)


def is_stateful(thing: Any) -> bool:
    """Tells whether an object has `state_dict` and `load_state_dict`."""
    return all(callable(getattr(thing, name, None)) for name in ("state_dict", "load_state_dict"))


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return list(generator.getstate())
    if isinstance(generator, numpy.random.RandomState):
        state: Any = generator.get_state(legacy=False)
        return random_state.without_arrays(state)
    return random_state.without_arrays(generator.bit_generator.state)


def _set_state(kind: str, owner: Any, state: Any) -> None:
    if kind == "epochs":
        owner.set_epoch(state)
    elif kind == "states":
        owner.load_state_dict(state)
    elif isinstance(owner, torch.Generator):
        owner.set_state(state.cpu())
    elif isinstance(owner, random.Random):
        version, words, gauss = state
        owner.setstate((version, tuple(words), gauss))
    elif isinstance(owner, numpy.random.RandomState):
        present: Any = owner.get_state(legacy=False)
        owner.set_state(random_state.with_arrays(state, present))
    else:
        bits = owner.bit_generator
        bits.state = random_state.with_arrays(state, bits.state)
