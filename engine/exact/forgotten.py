"""What the step and handlers change, and read again, that no checkpoint has.

A scheduler, an average of the weights, a counter in a closure, a best loss, an attribute of
`trainer.state`: whatever is changed in the course of a run, and looked at later, is what a resumed
run begins without, unless it is named. What a function only appends to, adds to or prints is taken
for a log. Changes are found by comparing with what there was when the run's first epoch began: the
handlers of STARTED, which fire once more on a resume, have then done their part.
"""

from __future__ import annotations

import collections
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import numpy
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.digest import digest
from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import OTHER_PACKAGES
from crosstrain.engine.state import State

from .reads import attributes_read, names_read, names_read_of_state
from .unnamed import GLOBAL_GENERATORS, SOURCES, attributes_of, functions_in, is_others

__all__ = ["Forgotten"]

_DEPTH: Final = 4
_SEEN: Final = 1000
_ENTRIES: Final = 4096
_BYTES: Final = 1 << 20
_SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_COLLECTIONS: Final = (dict, list, tuple, set, collections.deque, collections.OrderedDict)
# They are the data's and the loop's own matter.
_CLOSED: Final = (DataLoader, Dataset, Sampler, Dispatcher, types.ModuleType, type, ResumableSource)
_STATE: Final = frozenset(vars(State()))


class Forgotten:
    """Finds what has changed, and is read, of what functions refer to.

    Args:
        functions: the step and the handlers, by what to call them.
        known: what a checkpoint takes care of, by `id`.
        state: the run's state, whose own attributes are looked at, too.
        keys: the names of those attributes of it that are saved.
    """

    def __init__(
        self,
        functions: Mapping[str, Any],
        known: Iterable[int],
        state: Any,
        keys: Iterable[str] = (),
    ) -> None:
        walk = _Walk(set(known))
        for name, function in functions.items():
            walk.function(function, name, _DEPTH)
        self.found = walk.found
        kept = {*_STATE, *keys}
        for name in sorted(names_read_of_state(walk.functions) - kept):
            if name in vars(state):
                self.found["trainer.state", name] = _signature(vars(state)[name])

    def changed(self, before: Forgotten) -> list[str]:
        """Returns the names of what is other than it was before."""
        nothing = object()
        return [
            f"{owner}.{name}" if owner == "trainer.state" else f"{owner}, its {name!r}"
            for (owner, name), signature in self.found.items()
            if signature is not None and before.found.get((owner, name), nothing) != signature
        ]


class _Walk:
    """Looks into functions and what they refer to, each once."""

    def __init__(self, known: set[int]) -> None:
        self._seen = known
        # A counter that is named lies in an object that is: its values are its own.
        self._named = frozenset(known)
        # Of which objects which attributes were looked at already.
        self._noted: set[tuple[int, str]] = set()
        self.found: dict[tuple[str, str], Any] = {}
        self.functions: list[Any] = []

    def function(self, function: Any, name: str, depth: int) -> None:
        """Looks into what a function reads: its variables, its object's attributes."""
        if isinstance(function, partial):
            made: partial[Any] = function
            for index, value in enumerate((*made.args, *made.keywords.values())):
                self.value(value, name, f"argument {index}", depth - 1, True)
            function = made.func
        owner = getattr(function, "__self__", None)
        plain = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(plain):
            if type(plain).__module__.startswith("crosstrain.") and owner is None:
                # A step of ours, with the user's functions in it.
                for own, value in functions_in(plain):
                    self.function(value, f"{name}, its {own}", depth - 1)
            elif owner is None:
                self._object(plain, "__call__", name, depth)
            return
        if owner is not None and not isinstance(owner, types.ModuleType):
            self._object(owner, plain.__name__, name, depth)
        if is_others(plain) or id(plain.__code__) in self._seen or depth <= 0:
            return
        self._seen.add(id(plain.__code__))
        self.functions.append(plain)
        for variable, value in _variables(plain):
            self.value(value, name, variable, depth - 1, variable in names_read(plain))

    def _object(self, value: Any, method: str, name: str, depth: int) -> None:
        """Looks into an object by what one of its methods reads, and what that calls."""
        if not self._is_plain(value):
            self.value(value, name, "object", depth, True)
            return
        if depth <= 0 or id(value) in self._named:
            return
        read = attributes_read(type(value), method)
        for own, item in attributes_of(value).items():
            if (id(value), own) not in self._noted:
                if own in read:
                    self._noted.add((id(value), own))
                self.value(item, name, f"object.{own}", depth - 1, own in read)

    def _is_plain(self, value: Any) -> bool:
        """Tells whether an object is one that is looked into: its attributes are its state."""
        kind: Any = type(value)
        closed = (*_CLOSED, *SOURCES, *_SCALARS, *_COLLECTIONS, torch.Tensor, numpy.ndarray, State)
        other = isinstance(value, (*closed, torch.nn.Module)) or is_others(kind)
        return not other and not _has_state(value)

    def value(self, value: Any, owner: str, name: str, depth: int, read: bool) -> None:
        """Notes a value, if it is read, or looks into what it is made of."""
        if len(self._seen) > _SEEN or isinstance(value, (*_CLOSED, *SOURCES)):
            return
        if isinstance(value, (*_SCALARS, torch.Tensor, numpy.ndarray, *_COLLECTIONS)):
            if read and id(value) not in self._named and not isinstance(value, torch.nn.Parameter):
                self.found[owner, name] = _signature(value)
            if type(value) in (dict, list, tuple) and depth > 0 and id(value) not in self._seen:
                self._seen.add(id(value))
                some: Any = value
                items = some.items() if type(value) is dict else enumerate(some)
                for key, item in list(items)[:64]:
                    if not isinstance(item, (*_SCALARS, torch.Tensor, numpy.ndarray)):
                        self.value(item, owner, f"{name}[{key!r}]", depth - 1, False)
            return
        if isinstance(value, State) or id(value) in self._seen or id(value) in GLOBAL_GENERATORS:
            return
        self._seen.add(id(value))
        if _has_state(value):
            self.found[owner, name] = _state_signature(value)
        elif callable(value) and (inspect.isroutine(value) or isinstance(value, partial)):
            self.function(value, f"{owner}, its {name}", depth - 1)
        elif isinstance(value, torch.nn.Module) or is_others(type(value)) or depth <= 0:
            return
        else:
            kind: Any = type(value)
            read_here = attributes_read(kind)
            for own, item in attributes_of(value).items():
                self.value(item, owner, f"{name}.{own}", depth - 1, own in read_here)


def _has_state(value: Any) -> bool:
    """Tells whether an object is one that is named in `to_save`, by its type."""
    kind: Any = type(value)
    module = kind.__module__
    root = module.partition(".")[0]
    if root == "ignite":
        held = ".handlers." in module and not module.endswith(("checkpoint", "logger", "tqdm"))
    elif root == "crosstrain":
        held = module.endswith(("early_stopping", "model_part"))
    else:
        held = root == "torch" or root not in OTHER_PACKAGES
    methods = (getattr(kind, "state_dict", None), getattr(kind, "load_state_dict", None))
    return held and all(map(callable, methods))


def _state_signature(value: Any) -> Any:
    """Returns what changes when an object's state does; None where it cannot be told."""
    if isinstance(value, torch.nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return [
            (id(tensor), -1 if tensor.is_inference() else tensor._version) for tensor in tensors
        ]
    if isinstance(value, Optimizer):
        tensors = [p for group in value.param_groups for p in group["params"]]
        return len(value.state), [
            tensor._version for tensor in tensors if not tensor.is_inference()
        ]
    try:
        return _signature(value.state_dict())
    except Exception:  # noqa: BLE001  an object of the user's may raise anything
        return None


def _signature(value: Any, depth: int = 4) -> Any:
    """Returns what changes when a plain value does; None where it cannot be told."""
    if isinstance(value, _SCALARS):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor):
        if value.nbytes <= _BYTES:
            return digest(value)
        return id(value), tuple(value.shape), _version(value)
    if isinstance(value, numpy.ndarray):
        many: Any = value.reshape(-1)[:: max(1, value.size // _ENTRIES)]
        return value.shape, digest(many)
    if isinstance(value, (set, frozenset)):
        return len(value), sorted(map(repr, list(value)[:_ENTRIES]))
    if isinstance(value, _COLLECTIONS) and depth > 0:
        some: Any = value
        items = list(some.items() if isinstance(some, dict) else some)
        step = max(1, len(items) // 64)
        return len(items), [_signature(item, depth - 1) for item in items[::step]]
    return type(value).__name__


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # It is not set yet.
    for name in sorted(_code_names(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _code_names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _code_names(constant)
    return found
