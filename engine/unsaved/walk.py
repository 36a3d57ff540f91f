"""The walk that all looks are: from the user's functions into what they use, by how they use it.

A function leads to its variables, and each of these to those of its attributes that are used, and
to the methods that are called of it; what is passed on may be used in any way. What is looked for
on the way is for those to say that derive from the walk: values that change (`changed_values.py`),
generators (`drawn_from.py`), loaders (`loaders_in_handlers.py`).
"""

from __future__ import annotations

import argparse
import enum
import inspect
import io
import types
from collections.abc import Iterator, Mapping, Set
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any, Final

import numpy
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.data.generators import GENERATORS, GLOBAL_GENERATORS
from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import (
    OTHER_PACKAGES,
    is_a,
    is_others,
    is_users_object,
    module_of,
    own_attributes,
)
from crosstrain.engine.nests import SCALARS, is_module, is_plain_row, unwrap
from crosstrain.engine.source.functions import (
    MAKING,
    is_users_file,
    layers_of,
    methods_in,
    variables_of,
)
from crosstrain.engine.source.tree import names_in
from crosstrain.engine.source.uses import ALL, WRITES, Use, uses_of, uses_of_self
from crosstrain.engine.state import State
from crosstrain.engine.structure import RECORDED

from .added_attributes import Holders, names_of_ours
from .data_of_others import holds_data
from .functions import FETCHES, TORCHS_OWN, TRAINED, functions_of_step, functions_of_trained
from .signatures import COLLECTIONS, PLAIN, inside_of
from .used import Used

#: How far a walk goes from a function that the run calls.
DEPTH: Final = 6
_SEEN: Final = 4000
# What samples and batches come from. Of what a position is kept, it has what changes of these.
_DATA: Final = (DataLoader, Dataset, Sampler)
# What a loader asks when it is iterated over.
_ASKED: Final = frozenset({"batch_sampler", "collate_fn", "dataset", "sampler", "worker_init_fn"})
_FETCHING: Final = frozenset(Use((one,), True) for one in (*FETCHES, "__len__"))
# Iterators are sources, too: see `is_source`.
_SOURCES: Final = (
    *GENERATORS,
    numpy.random.BitGenerator,
    torch.quasirandom.SobolEngine,
    ResumableSource,
)
_VALUES: Final = (*PLAIN, enum.Enum, *COLLECTIONS)
# Objects of Python's own that are nothing but their attributes.
_NAMESPACES: Final = (types.SimpleNamespace, argparse.Namespace)
# How many things of a collection are looked at.
_ITEMS: Final = 64
_CALLED: Final = Use(("__call__",), True)


class Walk:
    """Looks into functions and what they use, by what they do with it; notes nothing itself.

    Args:
        used: what the run uses, and what a checkpoint has of it.
        known: what is not looked into, by `id`; None: what a checkpoint takes care of.
        waits: whether what only ends in a collection, such as a log, waits until that is read.
    """

    def __init__(self, used: Used, known: Set[int] | None = None, waits: bool = True) -> None:
        self.used, self._saved = used, used.saved
        self._known = used.known if known is None else known
        self._holders = [used.holders]
        # Nobody is told of what only a log meets.
        self._waits, self._closed = waits, used.closed if waits else {}
        self._seen: set[Any] = set()
        self._of_classes: dict[Any, tuple[set[Use], list[types.FunctionType]]] = {}
        # What is looked at only to be written into a collection: a state, if that is read.
        self._waiting: list[tuple[str, str, Any, int]] = []
        #: The user's functions that were looked into.
        self.functions: list[types.FunctionType] = []

    def from_functions(self, functions: Mapping[str, Any], depth: int = DEPTH) -> None:
        """Looks into functions, by what to call them, and into what they use of holders."""
        for name, function in functions.items():
            self.function(function, name, depth)
        self._held()

    @property
    def kinds(self) -> set[type]:
        """The classes of the objects whose attributes were looked at."""
        return {kind for kind, _ in self._of_classes}

    # ------------------------------------------------------------ what is noted on the way

    def note(self, value: Any, owner: str, name: str) -> None:
        """Is given a plain value, a collection or a function that is read."""

    def note_one_of(self, value: Any, owner: str, name: str) -> None:
        """Is given an object that is known and has a state, and that a variable may exchange."""

    def note_state(self, value: Any, owner: str, name: str, depth: int) -> None:
        """Is given an object with a state that nobody has named; once."""

    def note_metric(self, value: Any, owner: str, name: str) -> None:
        """Is given a metric of pytorch-ignite's; once."""

    def note_holder(self, holder: Any, attribute: str, owner: str, name: str) -> None:
        """Is told whose attribute it is that is looked at next."""

    # ------------------------------------------------------------ functions

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
            if owner is None and is_others(type(plain)) and has_state(plain):
                self.value(plain, name, type(plain).__name__, depth, ALL)
            elif module_of(type(plain)).startswith("crosstrain.") and owner is None:
                # A step of ours, with the user's functions in it.
                for own, value in functions_of_step(plain):
                    self.function(value, f"{name}, its {own}", depth - 1)
            elif owner is None and not inspect.isroutine(plain):
                self.value(plain, name, "object", depth + 1, frozenset({_CALLED}))
            elif is_source(owner) or (
                isinstance(owner, COLLECTIONS) and plain.__name__ not in WRITES
            ):
                # Such as the `random` of a generator, the `pop` of a list.
                self.value(owner, name, "object", depth, ALL)
        layers = layers_of(function)
        for layer in layers:
            self._variables(layer, name, depth)
        if not layers:
            return
        called = frozenset(Use((layer.__name__,), True) for layer in layers)
        if isinstance(owner, (*TRAINED, DataLoader)) and id(owner) not in self.used.positioned:
            # It may be known: what it holds beside its state is not.
            self.attributes(owner, name, "self", depth + 1, called)
        if owner is not None and not isinstance(owner, types.ModuleType):
            self.value(owner, name, "object", depth + 1, called)

    def _variables(self, plain: types.FunctionType, name: str, depth: int) -> None:
        code: Any = plain.__code__
        if is_others(plain) or id(plain) in self._seen or depth <= 0:
            return
        self._seen.add(id(plain))
        self.functions.append(plain)
        variables, uses = variables_of(plain), uses_of(code)
        # What `globals()` gives may be used in any way, and so may what is used without a source.
        unknown = ALL if uses is None or "globals" in uses else frozenset[Use]()
        if uses is None:
            unknown |= {Use((one,), True) for one in names_in(code)}
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
            if self._waits and isinstance(other, COLLECTIONS):
                self._waiting.append((owner, name, value, id(other)))
            else:
                read |= {use._replace(read=True, into=None)}
        self.value(value, owner, name, depth, read)

    def _held(self) -> None:
        """Looks at what the functions that were looked into use of engines, models and the like."""
        begun: dict[int, int] = {}
        count = len(self.functions)
        while left := [one for one in self._holders if begun.get(id(one), 0) < count]:
            for holders in left:
                for plain in self.functions[begun.get(id(holders), 0) : count]:
                    if not holders.are_named_in(plain):
                        continue
                    variables = variables_of(plain)
                    for where, name, holder, method, uses in holders.used_by(plain, variables):
                        if method is not None:
                            self.function(method, f"{where}.{name}", DEPTH)
                            continue
                        self.note_holder(holder, name, where, name)
                        self._used(vars(holder)[name], where, name, DEPTH, uses, variables)
                begun[id(holders)] = count
            count = len(self.functions)

    def engine(self, engine: Any, where: str) -> None:
        """Looks into what another engine calls: it runs in a handler of the first."""
        self._holders.append(Holders({where: engine, f"{where}.state": engine.state}))
        process = getattr(engine, "_process_function", None)
        if process is not None:
            self.function(process, f"the step of {where}", DEPTH)
        for called, function in engine._handlers.all_functions():
            self.function(function, called, DEPTH)

    # ------------------------------------------------------------ values

    def value(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes a value, if it is read, or looks into what it is made of.

        An object of the user's may raise anything when it is asked something. Then it is closed to
        the walk, and what lies beside it is not.
        """
        try:
            self.look(value, owner, name, depth, uses)
        except Exception as error:  # noqa: BLE001  see above
            self._closed.setdefault((owner, name), error)

    def look(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Does what `value` does, and raises what the value raises."""
        if isinstance(value, DistributedDataParallel):
            self._communication(value, owner, name, depth)
        value, read = _without_wrapper(value), any(use.read for use in uses)
        if isinstance(value, type):
            self._class(value, owner, name, depth, uses)
        elif is_users_file(value):
            self._space(vars(value), owner, name, depth, uses)
        elif isinstance(value, Dispatcher):
            if id(value) not in self._known and self._is_new(value):
                self.engine(value, f"{owner}, its {name!r}")
        elif len(self._seen) > _SEEN or is_source(value):
            return
        elif isinstance(value, _VALUES):
            if read:
                self.note(value, owner, name)
            if isinstance(value, COLLECTIONS) and depth > 0:
                self._items(value, owner, name, depth)
            with_more = isinstance(value, (enum.Enum, *COLLECTIONS)) and is_users_object(value)
            if with_more and depth > 0:
                self.attributes(value, owner, name, depth, uses)
        elif isinstance(value, State) or {id(value)} & (self._known | GLOBAL_GENERATORS):
            if read and has_state(value):
                self.note_one_of(value, owner, name)
            if is_users_object(value) and not isinstance(value, TRAINED) and depth > 0:
                self.attributes(value, owner, name, depth, uses)
        elif isinstance(value, _DATA):
            if depth > 0 and id(value) not in self.used.positioned:
                self.attributes(value, owner, name, DEPTH, _fetching(value, uses))
        elif module_of(type(value)).startswith("ignite.metrics") and hasattr(value, "state_dict"):
            if self._is_new(value):
                self.note_metric(value, owner, type(value).__name__)
        elif has_state(value):
            if self._is_new(value):
                self.note_state(value, owner, name, depth)
                trained = functions_of_trained({f"{owner}, its {name}": value})
                for label, function in trained.items():
                    self.function(function, label, depth - 1)
        elif callable(value) and (inspect.isroutine(value) or isinstance(value, partial)):
            if read:
                self.note(value, owner, name)
            if inspect.isfunction(value) and not is_others(value):
                self._space(vars(value), owner, name, depth, uses)
            self.function(value, f"{owner}, its {name}", depth)
        elif is_module(value) or depth <= 0:
            return
        elif holds_data(value):
            if read:
                self.note(value, owner, name)
        elif not is_others(type(value)) or isinstance(value, _NAMESPACES):
            self.attributes(value, owner, name, depth, uses)
        elif module_of(type(value)).startswith("torch.distributed.algorithms."):
            # Such as what counts when models are averaged; it has no state of its own.
            self.attributes(value, owner, name, depth, ALL)

    def _communication(self, shared: Any, owner: str, name: str, depth: int) -> None:
        """Looks into how a model shares its gradients, and what that keeps from step to step."""
        for hook, state in shared._comm_hooks:
            where = f"{owner}, its {name}"
            self.function(hook, f"the communication hook of {where}", depth)
            self.value(state, where, "state of the communication hook", depth, ALL)

    def _is_new(self, value: Any) -> bool:
        """Tells whether a value is come to for the first time."""
        new = id(value) not in self._seen
        self._seen.add(id(value))
        return new

    def _class(self, kind: type, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Looks at what a class holds itself, and into its methods."""
        called = [*MAKING, *(use.path[0] for use in uses if use.path)]
        inner = uses_of_self(kind, called)[0] | uses_of_self(type(kind), called)[0]
        values = {**_values_of(type(kind)), **_values_of(kind)}
        if any(not use.path for use in (*uses, *inner)):
            # Such as `type(self).calls`, or passed on to another function.
            inner |= {Use((name,), True) for name in values}
        self._space(values, owner, name, depth, uses | inner)
        if self._is_new(kind):
            for own, function in methods_in(kind).items():
                for layer in layers_of(function):
                    self._variables(layer, f"{owner}, its {name}.{own}", depth)

    def _space(
        self, own: Mapping[str, Any], owner: str, name: str, depth: int, uses: frozenset[Use]
    ) -> None:
        """Looks at those values of a class, or of a function, that are used by their names."""
        for use in uses:
            if use.path and use.path[0] in own:
                rest = Use(use.path[1:], use.read or use.into is not None)
                inner = f"{name}.{use.path[0]}"
                self.value(own[use.path[0]], owner, inner, depth, frozenset({rest}))

    def _items(self, value: Any, owner: str, name: str, depth: int) -> None:
        if id(value) in self._seen or id(value) in self._known:
            return
        self._seen.add(id(value))
        inside = inside_of(value)
        items = inside.items() if isinstance(inside, dict) else enumerate(inside)
        for index, (key, item) in enumerate(list(islice(items, _ITEMS))):
            # Python's own collections give their contents, too, and objects may lie in these.
            nested = isinstance(item, COLLECTIONS)
            # The rows of a history are many, and are looked at at each save.
            plain = is_plain_row(item, _ITEMS) if nested else isinstance(item, PLAIN)
            if not plain and (nested or not holds_data(item)):
                # The collection's own signature has those that it holds.
                uses = frozenset[Use]() if nested else ALL
                # A parameter's numbers are no name for what is kept for it.
                label = repr(key) if isinstance(key, SCALARS) else f"{type(key).__name__} {index}"
                self.value(item, owner, f"{name}[{label}]", depth, uses)

    def attributes(
        self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]
    ) -> None:
        """Looks into those attributes of an object that are used, and what its methods use."""
        kind: Any = type(value)
        own = {**_values_of(kind), **attributes_of(value)}
        if isinstance(value, enum.Enum):
            # Its class holds the other members, and both what Python knows of them.
            own = {name: one for name, one in attributes_of(value).items() if name[:1] != "_"}
            if not isinstance(value._value_, SCALARS):
                own["value"] = value._value_
        elif isinstance(value, TRAINED):
            # Numbers and words of what is trained are recorded, and put back.
            kept = RECORDED if id(value) in self.used.recorded else ()
            recorded = {name for name, one in own.items() if type(one) in kept}
            own = {name: own[name] for name in own.keys() - recorded - TORCHS_OWN}
        elif id(value) in self._known or id(value) in self._saved.inside:
            # What its state has, under whichever name, goes on with it. A number is looked at by
            # whoever compares: what the state has at one look, it need not have at another.
            own = {
                name: one
                for name, one in own.items()
                if isinstance(one, SCALARS) or not self._saved.has(value, one)
            }
        used = frozenset(use.path[0] for use in uses if use.path)
        if any(name not in own and not hasattr(kind, name) for name in used):
            # The object answers itself, from what it keeps under other names.
            used |= {"__getattr__", "__getattribute__"}
        more, functions = self._uses_of_self(kind, used)
        # What is passed on, or passes itself on, may be used in any way.
        whole = any(use.path[:1] in ((), ("__dict__",)) for use in (*uses, *more))
        if whole:
            more, functions = self._uses_of_self(kind, frozenset(dir(kind)) - MAKING)
        for function in functions:
            self._variables(function, owner, depth - 1)
        by_name: dict[str, set[Use]] = {attribute: set() for attribute in own if whole}
        for use in _settled({*uses, *more}, whole):
            if use.path[:1] == ("__class__",):
                use = use._replace(path=use.path[1:])
            for attribute in own.keys() & set(_spellings(use.path[:1], kind)):
                rest = Use(use.path[1:], use.read or use.into is not None)
                by_name.setdefault(attribute, set()).add(rest)
        # In an order that is the same in each process: some are found by two names.
        for attribute, found in sorted(by_name.items()):
            # What no method uses is there for those that the object is passed on to.
            item, some = own[attribute], frozenset(found) or ALL
            if isinstance(value, _DATA) and _is_entered(item, some):
                continue
            if (id(value), attribute, some) not in self._seen:
                self._seen.add((id(value), attribute, some))
                self.note_holder(value, attribute, owner, f"{name}.{attribute}")
                self.value(item, owner, f"{name}.{attribute}", depth - 1, some)

    def _uses_of_self(
        self, kind: type, names: frozenset[str]
    ) -> tuple[set[Use], list[types.FunctionType]]:
        # Many objects of a library's are of one class.
        if (kind, names) not in self._of_classes:
            self._of_classes[kind, names] = uses_of_self(kind, names)
        return self._of_classes[kind, names]


def _fetching(data: Any, uses: frozenset[Use]) -> frozenset[Use]:
    """Returns what is done with data: where it is fetched from, what its methods and parts do."""
    if not any(use.path[:1] in ((), *((one,) for one in FETCHES)) for use in uses):
        return uses
    kind: Any = type(data)
    names = _ASKED if isinstance(data, DataLoader) else names_of_ours(kind)
    if isinstance(data, Sampler):
        # Of its samples it asks how many there are.
        names -= {"data_source", "dataset"}
    parts = {Use((one,), True) for one in names & (own_attributes(data) or {}).keys()}
    return frozenset(use for use in uses if use.path) | parts | _FETCHING


def _is_entered(item: Any, uses: frozenset[Use]) -> bool:
    """Tells whether data reads a file where the index of a sample says, and not where it was."""
    if isinstance(item, io.IOBase):
        return any(use.path[:1] == ("seek",) for use in uses)
    return is_a(item, Mapping) and not isinstance(item, COLLECTIONS) and holds_data(item)


def _settled(uses: set[Use], whole: bool) -> set[Use]:
    """Returns uses of an object: what ends in an attribute of it is read if that is."""
    left = {use for use in uses if use.into is not None and "." in use.into}
    found = uses - left
    while left:
        read = {use.path[0] for use in found if use.path and (use.read or use.into is not None)}
        more = {use for use in left if whole or str(use.into).rpartition(".")[2] in read}
        if not more:
            break
        left -= more
        found |= {use._replace(read=True, into=None) for use in more}
    return found | {use._replace(into=None) for use in left}


def _spellings(path: tuple[str, ...], kind: type) -> list[str]:
    """Returns what an attribute may be called: Python puts its class before a private one."""
    if not path or not path[0].startswith("__") or path[0].endswith("__"):
        return list(path)
    return [f"_{each.__name__.lstrip('_')}{path[0]}" for each in kind.__mro__]


def _values_of(kind: Any) -> dict[str, Any]:
    """Returns what classes of the user's hold themselves, such as a counter of all instances."""
    return {
        name: value
        for each in reversed(kind.__mro__)
        if each is not object and not is_others(each)
        for name, value in vars(each).items()
        if not name.startswith("__")
        and (isinstance(value, (*PLAIN, *COLLECTIONS)) or is_users_object(value))
    }


def has_state(value: Any) -> bool:
    """Tells whether an object is one that is named in `to_save`, by its type."""
    kind: Any = type(value)
    module = module_of(kind)
    root = module.partition(".")[0]
    if root == "ignite":
        held = ".handlers." in module and not module.endswith(("logger", "tqdm"))
    elif root == "crosstrain":
        held = module.endswith(("early_stopping", "model_part", ".handler", "model_checkpoint"))
    else:
        held = root == "torch" or root not in OTHER_PACKAGES
    methods = (getattr(kind, "state_dict", None), getattr(kind, "load_state_dict", None))
    # Which files are the newest, their names say; which are the best, only who has chosen.
    chooses = (own_attributes(value) or {}).get("score_function", True) is not None
    return held and chooses and all(map(callable, methods))


def _without_wrapper(value: Any) -> Any:
    """Returns the model inside what compiles or spreads it, and the memory inside its lock."""
    if is_module(value):
        return unwrap(value)
    return value.get_obj() if is_a(value, SynchronizedBase) else value


def is_source(value: Any) -> bool:
    """Tells whether a value has a position or random states of its own.

    A generator of random numbers is one, and an iterator that cannot be looked into: of a known
    package, or not written in Python. A file is an iterator by its type only.
    """
    if isinstance(value, _SOURCES):
        return True
    kind: Any = type(value)
    if not isinstance(value, Iterator) or isinstance(value, io.IOBase):
        return False
    # What has a state is told where that changes.
    return not (inspect.isfunction(kind.__next__) and not is_others(kind)) and not hasattr(
        kind, "state_dict"
    )
