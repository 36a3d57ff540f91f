"""OwnStates: what samplers, or iterable data, carry from pass to pass: taken, and given back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.digest import same
from crosstrain.engine.guards import is_users_object

from .generators import (
    generator_state,
    generators_in,
    raw_state,
    set_generator_state,
    set_raw_state,
)
from .plain_values import copied, is_plain, packed, unpacked

# How far samplers are looked for: further than this, they belong to something else.
_DEPTH: Final = 4

Raw = dict[tuple[str, str], Any]
"""States as this process has them, by kind and name: to be compared and put back, not saved."""


class OwnStates:
    """Takes and gives back what samplers, or iterable data, carry from pass to pass.

    These are their generators; a sampler's epoch, as of torch's `DistributedSampler`; the plain
    attributes of samplers, such as a counter of passes, weights, a list that is shuffled in place;
    and what they give by `state_dict`, if they take it back by `load_state_dict`. The objects are
    given by what they are called in messages.
    """

    def __init__(self, apart: tuple[Any, ...] = (), **owners: Any) -> None:
        self.generators: dict[str, Any] = {}
        for name, owner in owners.items():
            for where, generator in generators_in(owner, name, apart).items():
                if not any(generator is known for known in self.generators.values()):
                    self.generators[where] = generator
        self._epochs = {
            name: owner
            for name, owner in owners.items()
            if callable(getattr(owner, "set_epoch", None))
            and isinstance(getattr(owner, "epoch", None), int)
        }
        # Iterable data that has one is asked for it at its position.
        samplers: dict[str, Any] = {}
        for name, owner in owners.items():
            _look_for_samplers(name, owner, _DEPTH, samplers)
        loader = owners.get("loader")
        if isinstance(loader, DataLoader) and set(vars(loader)) - _of_loaders():
            # What a subclass counts for itself, such as its passes.
            samplers["loader"] = loader
        self._stateful = {
            name: owner
            for name, owner in samplers.items()
            if is_stateful(owner) and owner is not loader
        }
        self._samplers = {name: one for name, one in samplers.items() if name not in self._stateful}
        # What they were made with is not their state, until it changes.
        self._made = self._attributes(True)
        self._changed: set[tuple[str, str]] = set()

    @property
    def moves(self) -> bool:
        """Whether giving out an order changes one of the states."""
        if self.generators or self._stateful:
            return True
        return not all(map(_stays, self._samplers.values()))

    def take(self) -> dict[str, Any]:
        """Returns the states, as tensors and plain types where they are ours to choose."""
        attributes = self._attributes(False)
        self._changed |= {
            place
            for place, value in attributes.items()
            if place not in self._made or not same(value, self._made[place])
        }
        return {
            "generators": {name: generator_state(value) for name, value in self.generators.items()},
            "epochs": {name: owner.epoch for name, owner in self._epochs.items()},
            "states": {name: owner.state_dict() for name, owner in self._stateful.items()},
            "attributes": {
                name: packed(value)
                for (kind, name), value in attributes.items()
                if (kind, name) in self._changed
            },
        }

    def give(self, states: Mapping[str, Any], stateful: bool = True) -> None:
        """Sets what `take` returned, of the same objects; `stateful`: by load_state_dict, too."""
        for kind, owners, set_state in (
            ("epochs", self._epochs, _set_epoch),
            ("generators", self.generators, set_generator_state),
            ("states", self._stateful, lambda owner, state: owner.load_state_dict(state)),
        ):
            then: Mapping[str, Any] = states.get(kind, {})
            if set(then) != set(owners):
                raise ValueError(
                    f"The state holds {kind} of the data named {sorted(then)}, and the data given "
                    f"to run() has {sorted(owners)}. Make the data with the same generators and "
                    "samplers as in the run that wrote the state."
                )
            for name, state in then.items():
                if stateful or kind != "states":
                    set_state(owners[name], state)
        given = {
            ("attribute", name): unpacked(value)
            for name, value in states.get("attributes", {}).items()
        }
        self._changed |= set(given)
        self.put({**self._made, **given})

    def load_states(self, states: Mapping[str, Any]) -> None:
        """Gives samplers that have `load_state_dict` what `take` returned for them."""
        for name, owner in self._stateful.items():
            owner.load_state_dict(states["states"][name])

    def raw(self, copies: bool = True) -> Raw:
        """Returns the states but those of samplers with a `state_dict`, to put them back here."""
        return {
            **{("generator", name): raw_state(one) for name, one in self.generators.items()},
            **{("epoch", name): owner.epoch for name, owner in self._epochs.items()},
            **self._attributes(copies),
        }

    def loaders(self) -> Raw:
        """Returns those of `raw` that are the loader's own, such as the passes that it counts."""
        found = self._attributes(True)
        return {place: value for place, value in found.items() if place[1].startswith("loader.")}

    def put_loaders(self, raw: Raw) -> None:
        """Sets what `loaders` returned, and takes away what there was none of."""
        for _, name in self.loaders().keys() - raw.keys():
            self._set_attribute(name)
        self.put_some(raw)

    def put(self, raw: Raw, copies: bool = True) -> None:
        """Sets what `raw` returned, and takes away plain attributes that there were none of."""
        for kind, name in self._attributes(False):
            if (kind, name) not in raw:
                self._set_attribute(name)
        self.put_some({place: copied(value) for place, value in raw.items()} if copies else raw)

    def put_some(self, raw: Raw) -> None:
        """Sets some of what `raw` returned."""
        for (kind, name), value in raw.items():
            if kind == "generator":
                set_raw_state(self.generators[name], value)
            elif kind == "epoch":
                if self._epochs[name].epoch != value:
                    _set_epoch(self._epochs[name], value)
            else:
                self._set_attribute(name, value)

    def _set_attribute(self, name: str, *value: Any) -> None:
        where, _, attribute = name.rpartition(".")
        owner = self._samplers.get(where)
        if owner is None:
            # Of a sampler that this process does not have.
            return
        attributes: dict[str, Any] = vars(owner)
        if value:
            attributes[attribute] = value[0]
        else:
            attributes.pop(attribute, None)

    def _attributes(self, copies: bool) -> Raw:
        found: Raw = {}
        for name, owner in self._samplers.items():
            others = _of_loaders() if name == "loader" else frozenset[str]()
            for attribute, value in vars(owner).items():
                if attribute in others or (attribute == "epoch" and name in self._epochs):
                    continue
                if is_plain(value):
                    place = ("attribute", f"{name}.{attribute}")
                    found[place] = copied(value) if copies else value
        return found


def _set_epoch(sampler: Any, epoch: int) -> None:
    """Has a sampler be in the epoch that it said it was in."""
    sampler.set_epoch(epoch)
    if sampler.epoch != epoch:
        # What a subclass makes of the number that it is given would be made of it twice.
        sampler.epoch = epoch


def differing(one: Raw, other: Raw) -> set[tuple[str, str]]:
    """Returns the places at which two raw states differ."""
    places = {*one, *other}
    missing = {place for place in places if place not in one or place not in other}
    return missing | {p for p in places - missing if not same(one[p], other[p])}


def _look_for_samplers(name: str, thing: Any, depth: int, found: dict[str, Any]) -> None:
    """Adds an object that is a sampler, and those that it holds, to what was found, each once."""
    known = any(thing is one for one in found.values())
    # A loader takes any iterable for a sampler.
    samples = isinstance(thing, Sampler) or name in ("sampler", "batch_sampler") or _helps(thing)
    if known or depth == 0 or not samples or not hasattr(thing, "__dict__"):
        return
    found[name] = thing
    for attribute, value in vars(thing).items():
        _look_for_samplers(f"{name}.{attribute}", value, depth - 1, found)


@lru_cache(maxsize=1)
def _of_loaders() -> frozenset[str]:
    """Returns the attributes that torch's own loaders have."""
    data: Any = [0]
    loader: Any = DataLoader(data)
    return frozenset(vars(loader))


def _helps(thing: Any) -> bool:
    """Tells whether what a sampler holds may be a state of it: an object, and no data."""
    data = isinstance(thing, Dataset) or (
        hasattr(thing, "__getitem__") and hasattr(thing, "__len__")
    )
    return is_users_object(thing) and not data and not callable(getattr(thing, "parameters", None))


def _stays(sampler: Any) -> bool:
    """Tells whether giving out an order leaves a sampler without generators as it was."""
    torchs = type(sampler).__module__.startswith("torch.utils.data.")
    return torchs or callable(getattr(sampler, "indices", None))


def is_stateful(thing: Any) -> bool:
    """Tells whether an object has `state_dict` and `load_state_dict`, which take what ours give.

    Some streaming datasets want to be told how many samples were taken: theirs is no state that
    they know themselves.
    """
    methods = [getattr(thing, name, None) for name in ("state_dict", "load_state_dict")]
    if not all(map(callable, methods)):
        return False
    return _takes(methods[0], 0) and _takes(methods[1], 1)


def _takes(method: Any, count: int) -> bool:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return True  # Written in C: it does not tell.
    try:
        signature.bind(*(None,) * count)
    except TypeError:
        return False
    return True
