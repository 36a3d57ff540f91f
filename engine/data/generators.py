"""The generators and states that data holds of its own: found, taken and given back by name."""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Final

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.backends.random_state import with_arrays, without_arrays
from crosstrain.engine.digest import same
from crosstrain.engine.guards import is_collection, is_dense, is_users_object, own_attributes

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
#: Their identities. They are nobody's own, and part of every state.
GLOBAL_GENERATORS: Final = frozenset(
    map(
        id,
        (
            torch.default_generator,
            getattr(random.seed, "__self__", None),
            getattr(numpy.random.mtrand, "_rand", None),
        ),
    )
)
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
    if is_collection(thing, (list, tuple, dict)):
        pairs = thing.items() if type(thing) is dict else enumerate(thing)
        items = list(islice(pairs, _MANY + 1))
        if len(items) <= _MANY:
            yield from ((f"[{key!r}]", item) for key, item in items)
        return
    for name, value in (own_attributes(thing) or {}).items():
        if isinstance(value, _LOOKED_INTO) or name in TRANSFORMS or is_users_object(value):
            yield f".{name}", value


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
            ("epochs", self._epochs, lambda owner, state: owner.set_epoch(state)),
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
            **{("generator", name): _raw_state(one) for name, one in self.generators.items()},
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
                _set_raw_state(self.generators[name], value)
            elif kind == "epoch":
                if self._epochs[name].epoch != value:
                    self._epochs[name].set_epoch(value)
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
                if _is_plain(value):
                    place = ("attribute", f"{name}.{attribute}")
                    found[place] = copied(value) if copies else value
        return found


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


SCALARS: Final = frozenset({bool, int, float, str, type(None)})
# What is longer is taken for data, and not for a state.
_LONGEST: Final = 1 << 20
_LARGEST: Final = 1 << 23


def _is_plain(value: Any, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor):
        return is_dense(value) and value.nbytes <= _LARGEST
    if isinstance(value, numpy.ndarray):
        return value.dtype.kind in "biuf" and value.nbytes <= _LARGEST
    kind: Any = type(value)
    if kind in SCALARS:
        return True
    if depth == 0 or kind not in (list, tuple, dict) or len(value) > _LONGEST:
        return False
    if kind is dict:
        return all(type(k) in SCALARS and _is_plain(v, depth - 1) for k, v in value.items())
    # A list of a million numbers is looked at by their types, which are few.
    if {*map(type, value)} <= SCALARS:
        return True
    return len(value) <= _MANY and all(_is_plain(one, depth - 1) for one in value)


def copied(value: Any) -> Any:
    """Returns a copy of a plain value."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        many: Any = value
        return type(many)(copied(one) for one in many)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return value.copy() if isinstance(value, numpy.ndarray) else value


def packed(value: Any) -> dict[str, Any]:
    """Returns a plain attribute as what loads without pickle, and in few words."""
    if isinstance(value, numpy.ndarray):
        found: Any = without_arrays({"values": value.view(f"u{value.itemsize}")})
        return {"kind": "array", "dtype": str(value.dtype), **found}
    if type(value) is list and len(value) > _MANY and {*map(type, value)} == {int}:
        try:
            return {"kind": "list", "values": torch.tensor(value, dtype=torch.int64)}
        except (OverflowError, RuntimeError):
            pass  # Numbers of more than 64 bits.
    return {"kind": "plain", "values": copied(value)}


def unpacked(packed: Mapping[str, Any]) -> Any:
    """Returns the plain attribute that `packed` was given."""
    values = packed["values"]
    if packed["kind"] == "array":
        dtype = numpy.dtype(packed["dtype"])
        return values.cpu().numpy().astype(f"u{dtype.itemsize}").view(dtype)
    return values.tolist() if packed["kind"] == "list" else values


def _raw_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, numpy.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _set_raw_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, (torch.Generator, numpy.random.RandomState)):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


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


def generator_state(generator: Any) -> Any:
    """Returns the state of a random generator, as tensors and plain types."""
    state = _raw_state(generator)
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
        state = with_arrays(state, _raw_state(owner))
    _set_raw_state(owner, state)
