"""Values that the step and handlers change, and read again, and that no checkpoint has.

A scheduler, an average of the weights, a counter in a closure, a best loss, an attribute of
`trainer.state`: whatever is changed in the course of a run, and looked at later, is what a resumed
run begins without, unless it is named. What is only appended to, added to or printed is taken for a
log, also where its length or its values decide no more than what it takes next. Of an object that a
function reaches, what it uses is looked at, and what the methods use that it calls. Changes are
found by comparing with what there was when the run's first epoch began: the handlers of STARTED,
which fire once more on a resume, have then done their part.
"""

from __future__ import annotations

import argparse
import array
import collections
import contextlib
import contextvars
import ctypes
import decimal
import fractions
import inspect
import marshal
import queue
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any, Final

import numpy
import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.data.generators import GLOBAL_GENERATORS
from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.digest import digest
from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import OTHER_PACKAGES, is_dense, is_others, is_users_object
from crosstrain.engine.nests import unwrap
from crosstrain.engine.state import State
from crosstrain.engine.structure import RECORDED

from .added_attributes import Holders
from .contents_of_states import SCALARS, Saved
from .drawn_from import (
    TORCHS_OWN,
    TRAINED,
    attributes_of,
    functions_in,
    is_source,
    is_users_file,
    layers_of,
    methods_in,
    variables_of,
)
from .users_functions import functions_of_trained
from .uses_in_source import ALL, WRITES, Use, attributes_used, names_in, uses_of, uses_of_self

_DEPTH: Final = 6
_SEEN: Final = 4000
_ENTRIES: Final = 4096
_PLENTY: Final = 1 << 18
_BYTES: Final = 1 << 20
_COLLECTIONS: Final = (
    dict,
    list,
    tuple,
    set,
    frozenset,
    collections.deque,
    collections.UserDict,
    collections.UserList,
    collections.ChainMap,
    contextvars.ContextVar,
    queue.Queue,
    threading.local,
    weakref.ReferenceType,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
)
# They are the data's and the loop's own matter.
_CLOSED: Final = (DataLoader, Dataset, Sampler, Dispatcher, types.ModuleType, type, ResumableSource)
#: What is compared as a whole.
PLAIN: Final = (
    *SCALARS,
    decimal.Decimal,
    fractions.Fraction,
    numpy.generic,
    torch.Tensor,
    numpy.ndarray,
    numpy.random.SeedSequence,
    array.array,
    bytearray,
    memoryview,
    # Shared with the workers, as a rule.
    ctypes._SimpleCData,
    ctypes.Array,
)
_WHOLE: Final = (
    dict,
    list,
    tuple,
    collections.deque,
    set,
    frozenset,
    array.array,
    bytearray,
    memoryview,
)
_MAKING: Final = ("__new__", "__init__", "__post_init__")
_CALLED: Final = Use(("__call__",), True)


class Forgotten:
    """Finds what has changed, and is read, of what functions refer to.

    Args:
        functions: the step and the handlers, by what to call them.
        known: what a checkpoint takes care of, by `id`.
        holders: the engine, its state and what is trained, whose further attributes are looked at.
        recorded: the modules and optimizers whose numbers and words are, by `id`.
        saved: what the states of named objects have of what these hold.
    """

    def __init__(
        self,
        functions: Mapping[str, Any],
        known: Iterable[int],
        holders: Holders,
        recorded: Iterable[int],
        saved: Saved,
    ) -> None:
        walk = UsesWalk(known, recorded, holders, saved)
        for name, function in functions.items():
            walk.function(function, name, _DEPTH)
        walk.held()
        walk.settle()
        self.found = walk.found
        self._goes_on = walk.goes_on
        self._owners = set(functions)
        #: Those of it that are plain, and the functions that were looked into: for one look only.
        self.values, self.functions = walk.values, walk.functions
        #: Gives the names of parameters and buffers.
        self.states: Callable[[], frozenset[str]] = frozenset
        #: Other engines that the run uses, such as an evaluator, by where they were found.
        self.engines = walk.engines
        #: Optimizers that leave something out of their states.
        self.left_out = saved.left_out
        if walk.reads_metrics():
            self.found |= walk.metrics

    def without_values(self) -> Forgotten:
        """Lets go of the values, and keeps what they are compared by."""
        self.values, self.functions, self.states = {}, [], frozenset
        return self

    def begin_new(self, now: Forgotten) -> None:
        """Counts what functions refer to that are new now as there from the beginning."""
        new = tuple(now._owners - self._owners)
        self._owners |= now._owners
        for place, signature in now.found.items():
            if place[0].startswith(new):
                self.found.setdefault(place, signature)

    def changed(self, before: Forgotten) -> list[tuple[str, str]]:
        """Returns what is other than it was before: its owner, and what that calls it."""
        # What is reached by another way than then, such as another handler, need not have changed.
        known = [(name, signature) for (_, name), signature in before.found.items()]

        def is_as_before(place: tuple[str, str], signature: Any) -> bool:
            if isinstance(signature, _OneOf):
                # Another is missed where there was one; what was nothing yet is set when it is due.
                was = before.found.get(place)
                return was == signature or not isinstance(was, _OneOf)
            if place in before.found:
                return bool(before.found[place] == signature)
            return (place[1], signature) in known

        return [
            place
            for place, signature in self.found.items()
            if signature is not None
            and place not in self._goes_on
            and not is_as_before(place, signature)
        ]


@dataclass(frozen=True)
class _OneOf:
    """Stands for one of several objects that are saved: which of them is what a variable tells.

    Args:
        identity: its `id`.
    """

    identity: int


class UsesWalk:
    """Looks into functions and what they use, by what they do with it.

    Args:
        known: what is not looked into, by `id`.
        recorded: modules and optimizers whose numbers and words are no matter, by `id`.
        holders: objects whose further attributes are looked at, as far as functions name them.
        saved: what the states of named objects have of what these hold.
    """

    def __init__(
        self,
        known: Iterable[int],
        recorded: Iterable[int] = (),
        holders: Holders | None = None,
        saved: Saved | None = None,
    ) -> None:
        self._contents = frozenset[int]() if saved is None else saved.contents
        self._inside: Mapping[int, Any] = {} if saved is None else saved.inside
        #: Of what was found, what a named object's state has now.
        self.goes_on: set[tuple[str, str]] = set()
        self._holders = [] if holders is None else [holders]
        self._known = frozenset(known)
        self._recorded = frozenset(recorded)
        self._seen: set[Any] = set()
        self._of_classes: dict[Any, tuple[set[Use], list[types.FunctionType]]] = {}
        # What is looked at only to be written into a collection: a state, if that is read.
        self._waiting: list[tuple[str, str, Any, int]] = []
        self._read: set[int] = set()
        # What the states of named objects are made of.
        self._saved: dict[int, set[str]] = {}
        self.found: dict[tuple[str, str], Any] = {}
        self.values: dict[tuple[str, str], Any] = {}
        # pytorch-ignite's: a state only where something reads what they come to.
        self.metrics: dict[tuple[str, str], Any] = {}
        # Other engines, such as an evaluator, whose handlers are the run's as well.
        self.engines: dict[str, Any] = {}
        self.functions: list[Any] = []

    def function(self, function: Any, name: str, depth: int) -> None:
        """Looks into what a function uses: its variables, its object's attributes."""
        if isinstance(function, partial):
            made: partial[Any] = function
            for index, value in enumerate((*made.args, *made.keywords.values())):
                self.value(value, name, f"argument {index}", depth - 1, ALL)
            function = made.func
        owner = getattr(function, "__self__", None)
        plain = getattr(function, "__func__", function)
        if not inspect.isfunction(plain):
            if owner is None and is_others(type(plain)) and _has_state(plain):
                self.value(plain, name, type(plain).__name__, depth, ALL)
            elif type(plain).__module__.startswith("crosstrain.") and owner is None:
                # A step of ours, with the user's functions in it.
                for own, value in functions_in(plain):
                    self.function(value, f"{name}, its {own}", depth - 1)
            elif owner is None and not inspect.isroutine(plain):
                self.value(plain, name, "object", depth + 1, frozenset({_CALLED}))
            elif isinstance(owner, _COLLECTIONS) and plain.__name__ not in WRITES:
                # Such as the `pop` of a list.
                self.value(owner, name, "object", depth, ALL)
        layers = layers_of(function)
        for layer in layers:
            self._variables(layer, name, depth)
        if not layers:
            return
        called = frozenset(Use((layer.__name__,), True) for layer in layers)
        if isinstance(owner, (*TRAINED, DataLoader)):
            # It may be known: what it holds beside its state is not.
            self._attributes(owner, name, "self", depth + 1, called)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.value(owner, name, "object", depth + 1, called)

    def _variables(self, plain: types.FunctionType, name: str, depth: int) -> None:
        code: Any = plain.__code__
        if is_others(plain) or id(plain) in self._seen or depth <= 0:
            return
        self._seen.add(id(plain))
        self.functions.append(plain)
        variables, uses = _variables_of(plain), uses_of(code)
        # What `globals()` gives may be used in any way.
        unknown = ALL if uses is None or "globals" in uses else frozenset[Use]()
        for variable, value in variables.items():
            some = unknown if uses is None else uses.get(variable, unknown)
            self._used(value, name, variable, depth - 1, some, variables)

    def _used(
        self,
        value: Any,
        owner: str,
        name: str,
        depth: int,
        uses: frozenset[Use],
        variables: Mapping[str, Any],
    ) -> None:
        """Notes a value that a function uses; later, if it only ends in one of its collections."""
        read = frozenset(use for use in uses if use.into is None)
        for use in uses - read:
            other = variables.get(use.into)  # type: ignore[arg-type]
            if isinstance(other, _COLLECTIONS):
                self._waiting.append((owner, name, value, id(other)))
            else:
                read |= {use._replace(read=True, into=None)}
        self.value(value, owner, name, depth, read)

    def held(self) -> None:
        """Looks at what the functions that were looked into use of engines, models and the like."""
        begun: dict[int, int] = {}
        count = len(self.functions)
        while left := [one for one in self._holders if begun.get(id(one), 0) < count]:
            for holders in left:
                for plain in self.functions[begun.get(id(holders), 0) : count]:
                    if not holders.are_named_in(plain):
                        continue
                    variables = _variables_of(plain)
                    for where, name, value, uses in holders.used_by(plain, variables):
                        self._used(value, where, name, _DEPTH, uses, variables)
                    for called, method in holders.methods_used_by(plain, variables):
                        self.function(method, called, _DEPTH)
                begun[id(holders)] = count
            count = len(self.functions)

    def reads_metrics(self) -> bool:
        """Tells whether a function that was looked into reads `state.metrics`."""
        return any(
            one.of == "state" and (one.use.read or one.use.into)
            for function in self.functions
            if self.metrics and "metrics" in names_in(function.__code__)
            for one in attributes_used(function.__code__).get("metrics", ())
        )

    def value(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes a value, if it is read, or looks into what it is made of."""
        value = _without_wrapper(value)
        if isinstance(value, type):
            called = [*_MAKING, *(use.path[0] for use in uses if use.path)]
            inner = uses_of_self(value, called)[0] | uses_of_self(type(value), called)[0]
            values = {**_values_of(type(value)), **_values_of(value)}
            if any(not use.path for use in (*uses, *inner)):
                # Such as `type(self).calls`, or passed on to another function.
                inner |= {Use((name,), True) for name in values}
            self._space(values, owner, name, depth, uses | inner)
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            for own, function in methods_in(value).items():
                for layer in layers_of(function):
                    self._variables(layer, f"{owner}, its {name}.{own}", depth)
            return
        if is_users_file(value):
            self._space(vars(value), owner, name, depth, uses)
            return
        if isinstance(value, Dispatcher):
            self._engine(value, f"{owner}, its {name!r}")
            return
        if len(self._seen) > _SEEN or isinstance(value, _CLOSED) or is_source(value):
            return
        if isinstance(value, (*PLAIN, *_COLLECTIONS)):
            if any(use.read for use in uses):
                self._note(value, owner, name)
            if isinstance(value, _COLLECTIONS) and depth > 0:
                self._items(value, owner, name, depth)
                if is_users_object(value):
                    self._attributes(value, owner, name, depth, uses)
            return
        if isinstance(value, State) or {id(value)} & (self._known | GLOBAL_GENERATORS):
            if any(use.read for use in uses) and _has_state(value):
                self.found[owner, name] = _OneOf(id(value))
            if is_users_object(value) and not isinstance(value, TRAINED) and depth > 0:
                self._attributes(value, owner, name, depth, uses)
            return
        if type(value).__module__.startswith("ignite.metrics") and hasattr(value, "state_dict"):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.metrics[owner, type(value).__name__] = _state_signature(value)
        elif _has_state(value):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.found[owner, name] = _state_signature(value)
                trained = functions_of_trained({f"{owner}, its {name}": value})
                for label, function in trained.items():
                    self.function(function, label, depth - 1)
        elif callable(value) and (inspect.isroutine(value) or isinstance(value, partial)):
            if any(use.read for use in uses):
                self._note(value, owner, name)
            if inspect.isfunction(value) and not is_others(value):
                self._space(vars(value), owner, name, depth, uses)
            self.function(value, f"{owner}, its {name}", depth)
        elif isinstance(value, torch.nn.Module) or depth <= 0:
            return
        elif not is_others(type(value)) or _is_namespace(value):
            self._attributes(value, owner, name, depth, uses)

    def _engine(self, engine: Any, where: str) -> None:
        """Looks into what another engine calls: it runs in a handler of the first."""
        if id(engine) in self._known or id(engine) in self._seen:
            return
        self._seen.add(id(engine))
        self.engines[where] = engine
        self._holders.append(Holders({where: engine, f"{where}.state": engine.state}))
        # Its metrics begin with each of its runs.
        metrics, self.metrics = self.metrics, {}
        process = getattr(engine, "_process_function", None)
        if process is not None:
            self.function(process, f"the step of {where}", _DEPTH)
        for called, function in engine._handlers.all_functions():
            self.function(function, called, _DEPTH)
        self.metrics = metrics

    def _space(
        self, own: Mapping[str, Any], owner: str, name: str, depth: int, uses: frozenset[Use]
    ) -> None:
        """Looks at those values of a class, or of a function, that are used by their names."""
        for use in uses:
            if use.path and use.path[0] in own:
                rest = Use(use.path[1:], use.read or use.into is not None)
                inner = f"{name}.{use.path[0]}"
                self.value(own[use.path[0]], owner, inner, depth, frozenset({rest}))

    def _note(self, value: Any, owner: str, name: str) -> None:
        # A counter that is named lies in an object that is: its values are its own.
        if id(value) not in self._known:
            self._read.add(id(value))
            self.found[owner, name] = _signature(value)
            self.values[owner, name] = value
            if id(value) in self._contents:
                self.goes_on.add((owner, name))

    def _items(self, value: Any, owner: str, name: str, depth: int) -> None:
        if id(value) in self._seen or id(value) in self._known:
            return
        self._seen.add(id(value))
        inside = _inside(value)
        items = inside.items() if isinstance(inside, dict) else enumerate(inside)
        for key, item in list(items)[:64]:
            if not isinstance(item, PLAIN):
                # The collection's own signature has those that it holds.
                uses = frozenset[Use]() if isinstance(item, _COLLECTIONS) else ALL
                self.value(item, owner, f"{name}[{key!r}]", depth - 1, uses)

    def _attributes(
        self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]
    ) -> None:
        """Looks into those attributes of an object that are used, and what its methods use."""
        kind: Any = type(value)
        own = {**_values_of(kind), **attributes_of(value)}
        if isinstance(value, TRAINED):
            # Numbers and words of what is trained are recorded, and put back.
            kept = RECORDED if id(value) in self._recorded else ()
            recorded = {name for name, one in own.items() if type(one) in kept}
            own = {name: own[name] for name in own.keys() - recorded - TORCHS_OWN}
        elif id(value) in self._known or id(value) in self._inside:
            # What its state has, or that of who holds it, under whichever name, goes on with it.
            if id(value) not in self._saved:
                self._saved[id(value)] = _parts_of(self._inside.get(id(value), value))
            saved = self._saved[id(value)]
            # Of collections, tensors and arrays the contents were compared.
            own = {name: one for name, one in own.items() if _mark(one) not in saved}
        more, functions = self._uses_of_self(
            kind, frozenset(use.path[0] for use in uses if use.path)
        )
        # What is passed on, or passes itself on, may be used in any way.
        whole = any(use.path[:1] in ((), ("__dict__",)) for use in (*uses, *more))
        if whole:
            more, functions = self._uses_of_self(kind, frozenset(dir(kind)) - set(_MAKING))
        for function in functions:
            self._variables(function, owner, depth - 1)
        by_name: dict[str, set[Use]] = {attribute: set() for attribute in own if whole}
        for use in (*uses, *more):
            if use.path[:1] == ("__class__",):
                use = use._replace(path=use.path[1:])
            for attribute in own.keys() & set(_spellings(use.path[:1], kind)):
                rest = Use(use.path[1:], use.read or use.into is not None)
                by_name.setdefault(attribute, set()).add(rest)
        for attribute, found in by_name.items():
            # What no method uses is there for those that the object is passed on to.
            item, some = own[attribute], frozenset(found) or ALL
            if (id(value), attribute, some) not in self._seen:
                self._seen.add((id(value), attribute, some))
                self.value(item, owner, f"{name}.{attribute}", depth - 1, some)

    def _uses_of_self(
        self, kind: type, names: frozenset[str]
    ) -> tuple[set[Use], list[types.FunctionType]]:
        # Many objects of a library's are of one class.
        if (kind, names) not in self._of_classes:
            self._of_classes[kind, names] = uses_of_self(kind, names)
        return self._of_classes[kind, names]

    def settle(self) -> None:
        """Notes what was written into collections that are read after all."""
        while left := [one for one in self._waiting if one[3] in self._read]:
            self._waiting = [one for one in self._waiting if one[3] not in self._read]
            for owner, name, value, _ in left:
                self.value(value, owner, name, _DEPTH, ALL)


def _defaults_of(function: types.FunctionType) -> dict[str, Any]:
    """Returns the defaults of a function's parameters, by name: one object for all calls."""
    code, values = function.__code__, function.__defaults__ or ()
    first = code.co_argcount - len(values)
    named = zip(code.co_varnames[first : code.co_argcount], values, strict=True)
    return {**dict(named), **(function.__kwdefaults__ or {})}


def _variables_of(function: types.FunctionType) -> dict[str, Any]:
    return {**_defaults_of(function), **dict(variables_of(function))}


def _spellings(path: tuple[str, ...], kind: type) -> list[str]:
    """Returns what an attribute may be called: Python puts its class before a private one."""
    if not path or not path[0].startswith("__") or path[0].endswith("__"):
        return list(path)
    return [f"_{each.__name__.lstrip('_')}{path[0]}" for each in kind.__mro__]


def _is_namespace(value: Any) -> bool:
    """Tells whether a value is an object of Python's own that is nothing but its attributes."""
    return isinstance(value, (types.SimpleNamespace, argparse.Namespace))


def _values_of(kind: Any) -> dict[str, Any]:
    """Returns what classes of the user's hold themselves, such as a counter of all instances."""
    return {
        name: value
        for each in reversed(kind.__mro__)
        if each is not object and not is_others(each)
        for name, value in vars(each).items()
        if not name.startswith("__")
        and (isinstance(value, (*PLAIN, *_COLLECTIONS)) or is_users_object(value))
    }


def _has_state(value: Any) -> bool:
    """Tells whether an object is one that is named in `to_save`, by its type."""
    kind: Any = type(value)
    module = kind.__module__
    root = module.partition(".")[0]
    if root == "ignite":
        held = ".handlers." in module and not module.endswith(("logger", "tqdm"))
    elif root == "crosstrain":
        held = module.endswith(("early_stopping", "model_part", ".handler", "model_checkpoint"))
    else:
        held = root == "torch" or root not in OTHER_PACKAGES
    methods = (getattr(kind, "state_dict", None), getattr(kind, "load_state_dict", None))
    if hasattr(value, "score_function") and value.score_function is None:
        # Which files are the newest, their names say; which are the best, only who has chosen.
        return False
    return held and all(map(callable, methods))


def _state_signature(value: Any) -> Any:
    """Returns what changes when an object's state does; None where it cannot be told."""
    if isinstance(value, torch.nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return [(id(tensor), _version(tensor)) for tensor in tensors]
    if isinstance(value, Optimizer):
        tensors = [p for group in value.param_groups for p in group["params"]]
        return len(value.state), [
            tensor._version for tensor in tensors if not tensor.is_inference()
        ]
    try:
        return _signature(value.state_dict(), 8)
    except Exception:  # noqa: BLE001  an object of the user's may raise anything
        return None


def _mark(value: Any) -> str:
    return repr(_signature(value))


def _parts_of(value: Any) -> set[str]:
    """Returns marks of what an object's `state_dict` is made of; all of it, if it has none."""
    left: list[Any] = [getattr(value, "__dict__", {})]
    with contextlib.suppress(Exception):  # An object of the user's may raise anything.
        left = [value.state_dict()]
    found: set[str] = set()
    while left and len(found) < _ENTRIES:
        part = left.pop()
        found.add(_mark(part))
        if isinstance(part, _COLLECTIONS):
            some: Any = part
            left.extend(some.values() if isinstance(some, dict) else some)
    return found


def _without_wrapper(value: Any) -> Any:
    """Returns the model inside what compiles or spreads it, and the memory inside its lock."""
    if isinstance(value, torch.nn.Module):
        return unwrap(value)
    return value.get_obj() if isinstance(value, SynchronizedBase) else value


def signature_of(value: Any) -> Any:
    """Returns what changes when a plain value does; None where it cannot be told."""
    return _signature(value)


def _signature(value: Any, depth: int = 16) -> Any:
    """Returns what changes when a plain value does; None where it cannot be told."""
    if isinstance(value, (ctypes._SimpleCData, ctypes.Array)):
        return type(value).__name__, bytes(value)
    if isinstance(value, torch.Tensor):
        if not is_dense(value) or value.nbytes <= _BYTES:
            return digest(value)
        some = value.detach().reshape(-1)[:: value.numel() >> 12]
        return id(value), tuple(value.shape), _version(value), digest(some)
    if isinstance(value, numpy.ndarray):
        many: Any = value if value.nbytes <= 16 * _BYTES else value.reshape(-1)[:: value.size >> 12]
        return value.shape, digest(many)
    if isinstance(value, numpy.random.SeedSequence):
        value = value.state
    if isinstance(value, _WHOLE) and len(value) <= _PLENTY:
        # Of plain values all at once; of what else there may be, one by one.
        many = tuple(value) if isinstance(value, (list, collections.deque)) else value
        with contextlib.suppress(ValueError):
            return len(value), hash(marshal.dumps(many, 2))
    if isinstance(value, (*SCALARS, decimal.Decimal, fractions.Fraction, numpy.generic)):
        return type(value).__name__, repr(value)
    if isinstance(value, (set, frozenset)):
        return len(value), sorted(map(repr, list(value)[:_ENTRIES]))
    if isinstance(value, _COLLECTIONS) and depth > 0:
        inside = _inside(value)
        items = list(inside.items() if isinstance(inside, dict) else inside)
        step = max(1, len(items) // 64)
        return len(items), [_signature(item, depth - 1) for item in items[::step]]
    if callable(value) and hasattr(value, "__qualname__"):
        code: Any = getattr(value, "__code__", None)
        name: str = getattr(value, "__qualname__", "")
        return name, code and code.co_code, code and code.co_consts
    return type(value).__name__


def _inside(value: Any) -> Any:
    """Returns what a collection holds: as a dictionary, or as something to iterate over."""
    if isinstance(value, (collections.UserDict, collections.UserList)):
        return value.data
    if isinstance(value, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
        return dict(value.items())
    if isinstance(value, contextvars.ContextVar):
        return [value.get(None)]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    if isinstance(value, collections.ChainMap):
        return value.maps
    if isinstance(value, queue.Queue):
        return list(value.queue)
    return vars(value) if isinstance(value, threading.local) else value


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
