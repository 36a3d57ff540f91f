"""Which attributes of a named object its state holds: told by comparing contents.

A state may have an attribute under another name and as another type: a deque as a list, a tensor as
a number. So contents are compared, and neither names nor objects.
"""

from __future__ import annotations

import array
import contextlib
import io
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Final

import numpy
import torch
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.data.generators import GENERATORS, generator_state
from crosstrain.engine.data.own_states import is_stateful
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import is_dense, is_others, is_users_object, own_attributes
from crosstrain.engine.nests import NESTS, SCALARS, is_module, unwrap
from crosstrain.engine.source.tree import names_in
from crosstrain.engine.source.uses import uses_of_self

from .functions import TORCHS_OWN, TRAINED
from .signatures import signature_of

# By which of its methods a module says what its state is.
_STATES: Final = ("state_dict", "get_extra_state", "_save_to_state_dict")

_ARRAYS: Final = (torch.Tensor, numpy.ndarray, array.array, bytearray)
# What a value holds: its numbers and words in order, or how many they are.
_Content = tuple[str, ...] | int
_LARGEST: Final = 4096
_DEPTH: Final = 8
_EXACT: Final = 1 << 53
# How far into what a named object holds, and into how many of a collection.
_INSIDE: Final = 3
_MANY: Final = 64
# By which of its methods an object takes a state.
_LOADS: Final = ("load_state_dict", "set_extra_state", "_load_from_state_dict", "__setstate__")


class Saved:
    """Divides what named objects hold into what goes on with them and what may not.

    An object that a named one holds goes on with it if the named one's `load_state_dict` mentions
    it, or if its contents are found in the state. What is in neither, such as the replay buffer of
    an agent whose state is its networks', is looked into as if nobody had been named.
    """

    def __init__(self, objects: Iterable[Any] = ()) -> None:
        #: By `id`, what they hold that is not looked into: objects.
        self.held: set[int] = set()
        #: By `id`, collections, tensors and arrays that they hold and whose contents a state has.
        self.contents: set[int] = set()
        #: By `id`, objects of the user's that they hold, and whose state theirs would be a part of.
        self.inside: dict[int, Any] = {}
        #: By `id`, generators and iterators that they hold and no state has, and what to call each.
        self.sources: dict[int, str] = {}
        #: Optimizers whose own `state_dict` has not got all tensors that they keep of parameters.
        self.left_out: list[str] = []
        # States, by the `id` of their object; None of one that has none, or does not give it.
        self._states: dict[int, _Contents | None] = {}
        # Where in memory their tensors are, when that is first asked for.
        self._memory: set[Any] | None = None
        named = list(objects)
        self._users = [one for one in named if not is_others(type(one)) and not is_module(one)]
        self._named = {id(one) for one in named}
        for value in named:
            for owner in _holders_of_state(value):
                self._divide(owner)

    def _divide(self, owner: Any) -> None:
        # As they are now. Numbers and words are one object wherever they stand.
        own = {
            name: one for name, one in attributes_of(owner).items() if not isinstance(one, SCALARS)
        }
        looked_at = own if not is_others(type(owner)) else {}
        if isinstance(owner, TRAINED):
            looked_at = {name: one for name, one in looked_at.items() if name not in TORCHS_OWN}
        # By identity: one object may have several names.
        plain = {id(one): one for one in looked_at.values() if is_plain(one)}
        given = _given_by_loading(type(owner)) if len(plain) < len(looked_at) else frozenset[str]()
        objects = {
            id(one): one
            for name, one in looked_at.items()
            if id(one) not in plain and name not in given
        }
        if plain or objects:
            if (saved := self._state_of(owner)) is None:
                # It cannot be compared.
                plain, objects = {}, {}
            else:
                self._compare(plain.values(), saved)
                for one in objects.values():
                    self._object(one, owner, saved, _INSIDE)
        if isinstance(owner, Optimizer) and not is_others(type(owner)):
            self._tensors_of(owner)
        self.held |= {id(one) for one in own.values()} - plain.keys() - objects.keys()

    def _tensors_of(self, optimizer: Optimizer) -> None:
        """Looks for what an optimizer keeps of each parameter in a state of its own making."""
        if (saved := self._state_of(optimizer)) is None:
            return
        kept = (part for part in _parts([*optimizer.state.values()]) if isinstance(part, _ARRAYS))
        if not all(map(saved.have, kept)):
            self.left_out.append(f"{type(optimizer).__name__}, its 'state'")

    def _compare(self, plain: Iterable[Any], saved: _Contents) -> None:
        self.contents |= {id(one) for one in plain if saved.have(one)}

    def _object(self, value: Any, owner: Any, saved: _Contents, depth: int) -> None:
        """Looks for an object's contents in the state of the named one that holds it."""
        if depth == 0 or id(value) in self._named or id(value) in self.inside:
            self.held |= {id(value)} - self.inside.keys()
        elif isinstance(value, NESTS):
            # What it holds is looked at; itself, where nothing in it has a state of its own.
            some = list(value.values() if isinstance(value, dict) else value)[:_MANY]
            for one in some:
                if not isinstance(one, SCALARS) and not is_plain(one):
                    self._object(one, owner, saved, depth - 1)
        elif isinstance(value, GENERATORS):
            self.held.add(id(value))
            if not saved.have(generator_state(value)):
                self._source(value, owner)
        elif is_stateful(value):
            state = self._state_of(value)
            if state is None or saved.have(state.whole):
                self.held.add(id(value))
        elif is_users_object(value):
            self.inside[id(value)] = owner
            own = [one for one in attributes_of(value).values() if not isinstance(one, SCALARS)]
            plain = {id(one): one for one in own if is_plain(one)}
            self._compare(plain.values(), saved)
            for one in own:
                if id(one) not in plain:
                    self._object(one, owner, saved, depth - 1)
        elif not isinstance(value, (DataLoader, Dataset, Sampler)):
            # Of another package, or a function, of which `functions_held` tells.
            self.held.add(id(value))
            # What is iterated over itself keeps iterators, and makes others as its state says.
            iterates = isinstance(value, Iterator) and not isinstance(value, io.IOBase)
            if iterates and not hasattr(type(owner), "__iter__"):
                self._source(value, owner)

    def _source(self, value: Any, owner: Any) -> None:
        where = f"what the state of {type(owner).__name__} leaves out"
        self.sources[id(value)] = f"{where} (a {type(value).__name__})"

    def _state_of(self, owner: Any) -> _Contents | None:
        """Returns what an object's state holds, asked for once; None where it has none."""
        if id(owner) not in self._states:
            self._states[id(owner)] = None
            with contextlib.suppress(Exception):  # An object of the user's may raise anything.
                if (state := owner.state_dict()) is not None:
                    self._states[id(owner)] = _Contents(state)
        return self._states[id(owner)]

    def hold(self, tensors: list[Any]) -> bool:
        """Tells whether states of the user's objects have some tensors and arrays themselves."""
        if self._memory is None:
            states = [saved.whole for one in self._users if (saved := self._state_of(one))]
            self._memory = {_place_of(part) for part in _parts(states)}
        return bool(tensors) and all(_place_of(one) in self._memory for one in tensors)

    def left_out_of(self, module: Module, beside: Iterable[Any]) -> list[torch.Tensor]:
        """Returns the tensors of a module's state that no state has of those saved in its place.

        One that is saved in its place holds it and is none itself, such as a `ModelPart`. Where
        nobody is, nothing is left out; nor where the states have copies, which are not known.
        """
        beside = list(beside)
        held = [its for one in beside if not is_module(one) for its in _attributes_of(one)]
        if not any(its is module for its in held):
            return []
        states = [saved.whole for one in beside if (saved := self._state_of(one))]
        kept = {_place_of(part) for state in states for part in _parts(state)}
        tensors = [one for one in _parts(module.state_dict()) if isinstance(one, torch.Tensor)]
        left = [one for one in tensors if _place_of(one) not in kept]
        return left if len(left) < len(tensors) else []

    def has(self, owner: Any, value: Any) -> bool:
        """Tells whether an object's state, or that of who holds it, has a value by any name.

        Of one that has no state, it has all.
        """
        owner = self.inside.get(id(owner), owner)
        if (saved := self._state_of(owner)) is None:
            return any(value is one for one in (own_attributes(owner) or {}).values())
        return saved.have(value)


class _Contents:
    """Knows what a state holds, under whichever names."""

    def __init__(self, state: Any) -> None:
        self.whole = state
        # Arrays by how much they hold: most are never compared.
        self._read: dict[int, set[_Content]] = {}

    @cached_property
    def _parts(self) -> list[Any]:
        return list(_parts(self.whole))

    @cached_property
    def _scalars(self) -> set[Any]:
        return {_key(part) for part in self._parts if isinstance(part, SCALARS)}

    @cached_property
    def _others(self) -> set[_Content]:
        return {
            (_leaf(part),) if isinstance(part, SCALARS) else _content(part)
            for part in self._parts
            if not isinstance(part, _ARRAYS)
        }

    @cached_property
    def _by_size(self) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        for part in self._parts:
            if isinstance(part, _ARRAYS):
                found.setdefault(_length(part), []).append(part)
        return found

    def have(self, value: Any) -> bool:
        """Tells whether a state has a part with the contents of a value.

        A number by itself is there as what it is; in a collection, it may be of another type.
        """
        if isinstance(value, SCALARS):
            return _key(value) in self._scalars
        content = _content(value)
        if content in self._others:
            return True
        size = content if isinstance(content, int) else len(content)
        if size not in self._read:
            self._read[size] = {_content(part) for part in self._by_size.get(size, ())}
        return content in self._read[size]


def _attributes_of(value: Any) -> list[Any]:
    return [unwrap(one) for one in (own_attributes(value) or {}).values()]


def tensors_in(value: Any) -> list[Any]:
    """Returns the tensors and arrays that a nest is made of; none if it holds anything else."""
    parts = [one for one in _parts(value) if not isinstance(one, NESTS)]
    return parts if all(isinstance(one, (torch.Tensor, numpy.ndarray)) for one in parts) else []


def _place_of(value: Any) -> Any:
    """Returns where in memory a tensor or an array lies, and its shape."""
    if isinstance(value, torch.Tensor) and is_dense(value):
        return value.data_ptr(), tuple(value.shape)
    return (value.ctypes.data, value.shape) if isinstance(value, numpy.ndarray) else id(value)


def _given_by_loading(kind: type) -> frozenset[str]:
    """Returns the attributes that a class's `load_state_dict` mentions: it gives them their state.

    Also what the methods mention that it calls of its own object.
    """
    functions = uses_of_self(kind, _LOADS)[1]
    return frozenset[str]().union(*(names_in(one.__code__) for one in functions))


def _holders_of_state(value: Any) -> list[Any]:
    """Returns the objects whose attributes may be a part of a named object's state.

    A module's state has its parameters, its buffers and its modules', and an optimizer's what torch
    has in it, unless a class says more.
    """
    if isinstance(value, Optimizer):
        return [] if type(value).state_dict is Optimizer.state_dict else [value]
    if not isinstance(value, Module):
        return [value]
    return [
        one
        for one in value.modules()
        if any(getattr(type(one), name) is not getattr(Module, name) for name in _STATES)
    ]


def is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Tells whether a value is a collection, tensor or array that holds nothing but numbers."""
    if isinstance(value, _ARRAYS):
        return True
    if not isinstance(value, NESTS) or depth == 0:
        return False
    inside = value.values() if isinstance(value, dict) else value
    return all(isinstance(one, SCALARS) or is_plain(one, depth - 1) for one in inside)


def _parts(state: Any, depth: int = _DEPTH) -> Iterator[Any]:
    yield state
    if isinstance(state, NESTS) and depth > 0:
        for one in state.values() if isinstance(state, dict) else state:
            yield from _parts(one, depth - 1)


def _content(value: Any) -> _Content:
    """Returns what a value holds, in no order; of what is large, only how much."""
    found: list[str] = []
    for leaf in _leaves(value, _DEPTH):
        found.append(leaf)
        if len(found) > _LARGEST:
            return _length(value)
    return tuple(sorted(found))


def _length(value: Any) -> int:
    return int(value.numel()) if isinstance(value, torch.Tensor) else int(numpy.size(value))


def _leaves(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, _ARRAYS):
        some = value.detach().flatten() if isinstance(value, torch.Tensor) else numpy.ravel(value)
        value = some[: _LARGEST + 1].tolist()
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, NESTS) and depth > 0:
        for one in value:
            yield from _leaves(one, depth - 1)
    else:
        yield _leaf(value.item() if isinstance(value, numpy.generic) else value)


def _leaf(value: Any) -> str:
    if isinstance(value, (bool, int, float)) and abs(value) < _EXACT:
        # A number may have become one of another type.
        return repr(float(value))
    return repr(value if isinstance(value, (str, bytes)) else signature_of(value))


def _key(scalar: Any) -> tuple[type, Any]:
    # NaN is not equal to itself.
    return type(scalar), scalar if scalar == scalar else "nan"
