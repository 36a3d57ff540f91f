"""What pytorch-ignite's own handlers look at in an engine beyond its methods: class and handlers.

Some of them take no engine but an instance of their library's `Engine`, and its time profilers
change its table of handlers in place. Both are given here, so that they attach to ours unchanged.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from typing import Any

from .dispatch import Binding, HandlerTable, Slot

# A handler as pytorch-ignite keeps it: the function, its arguments, its keyword arguments. The
# first of the arguments is a weak reference to the engine where the handler is to get it.
Entry = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class SeenByIgnite:
    """Makes an engine an instance of pytorch-ignite's `Engine`, for whoever asks with `isinstance`.

    Their class is no abstract one, with which ours could be registered, and to inherit from it
    would be to need it. So an engine says so itself, by `__class__`, where theirs is imported:
    with a class that has both for its bases, and of which nothing is ever made. `type` tells the
    truth.
    """

    _handlers: HandlerTable

    # Read-only, where `object` lets it be set: an engine's class is not to be changed.
    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        """The engine's class; one that is pytorch-ignite's as well, where that is imported."""
        own: type = type(self)
        theirs = getattr(sys.modules.get("ignite.engine.engine"), "Engine", None)
        if not isinstance(theirs, type) or issubclass(own, theirs):
            return own
        # A class has a hash; mypy looks at that of its instances.
        return _both(own, theirs)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Returns what `pickle` and `copy` make an engine of: pickle compares with `__class__`."""
        how = object.__reduce_ex__(self, protocol)
        if how[0] is copyreg.__newobj__:  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            return _new, *how[1:]
        return how

    @property
    def _event_handlers(self) -> HandlersByEvent:
        return HandlersByEvent(self, self._handlers)


@functools.cache
def _both(ours: type, theirs: type) -> type:
    named = {"__module__": ours.__module__, "__qualname__": ours.__qualname__}
    return types.new_class(ours.__name__, (ours, theirs), {}, lambda body: body.update(named))


def _new(kind: type, *args: Any) -> Any:
    return kind.__new__(kind, *args)


class HandlersByEvent(MutableMapping[Any, MutableSequence[Entry]]):
    """The handlers of an engine by event, as pytorch-ignite keeps them; changes change the engine.

    They are the user's: the library's own, such as a training step's, are left out.
    """

    def __init__(self, engine: Any, table: HandlerTable) -> None:
        self._engine, self._table = engine, table

    def __getitem__(self, event: Any) -> HandlersOfEvent:
        slot = self._table.slot(event)
        if slot is None:
            raise KeyError(event)
        return HandlersOfEvent(self._engine, slot)

    def __setitem__(self, event: Any, entries: Iterable[Entry]) -> None:
        kept = list(entries)
        self[event].clear()
        self[event].extend(kept)

    def __delitem__(self, event: Any) -> None:
        self[event].clear()

    def __iter__(self) -> Iterator[Any]:
        return (slot.event for slot in self._table if slot.users)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class HandlersOfEvent(MutableSequence[Entry]):
    """The user's handlers of one event, in the order in which they run.

    What is put in the place of a handler runs when that one did: it has its filter.
    """

    def __init__(self, engine: Any, slot: Slot) -> None:
        self._engine, self._slot = engine, slot

    def __getitem__(self, index: Any) -> Any:
        found = self._slot.users[index]
        return list(map(self._entry, found)) if isinstance(index, slice) else self._entry(found)

    def __setitem__(self, index: Any, entry: Any) -> None:
        _, _, extra = self._slot.users[index]
        function, takes_engine, rest = self._binding(entry)
        if extra is not None:
            _, _, _, args, kwargs = rest or (0, 0, None, (), {})
            rest = *extra[:3], args, kwargs
        self._slot.put(index, (function, takes_engine, rest))

    def __delitem__(self, index: Any) -> None:
        kept = self._slot.users
        del kept[index]
        self._slot.users = kept

    def __len__(self) -> int:
        return len(self._slot.users)

    def insert(self, index: int, value: Entry) -> None:
        """Attaches a handler before the one of an index."""
        kept = self._slot.users
        kept.insert(index, self._binding(value))
        self._slot.users = kept

    def append(self, value: Entry) -> None:
        """Attaches a handler after the others; while their event fires, it runs at once."""
        self._slot.add(self._binding(value))

    def _entry(self, binding: Binding) -> Entry:
        function, takes_engine, extra = binding
        args, kwargs = ((), {}) if extra is None else extra[3:]
        return function, (weakref.ref(self._engine),) * takes_engine + args, kwargs

    def _binding(self, entry: Entry) -> Binding:
        function, args, kwargs = entry
        first = args[0]() if args and isinstance(args[0], weakref.ref) else args[:1] and args[0]
        takes_engine = first is self._engine
        rest = args[takes_engine:]
        return function, takes_engine, (0, 0, None, rest, kwargs) if rest or kwargs else None

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]
