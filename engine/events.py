"""Events: the named moments of a run, filters on them, and the handle that undoes an attachment.

The programming model (events with `every`, `once`, `before`, `after`, combination by `|`) is that
of pytorch-ignite's `ignite.engine.events`. Events of that library, or of any other, are understood
wherever ours are: an event is known by its name and value, not by its class.
"""

from __future__ import annotations

import inspect
import numbers
import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from types import DynamicClassAttribute, MethodType
from typing import Any, NamedTuple, Self, TypeGuard, cast

from .state import State, Unread

__all__ = [
    "CallableEventWithFilter",
    "EventEnum",
    "Events",
    "EventsList",
    "RemovableEventHandle",
    "State",
    "Unread",
]

EventFilter = Callable[[Any, int], bool]
_UNBOUNDED = 2**63


class Gate(NamedTuple):
    """Says at which counts of an event a handler runs; compared inline by the engine.

    A count passes if `after < count < before`, `(count - offset)` is a multiple of `every`, `once`
    is None or holds it, and `event_filter` is None or returns true for it.
    """

    every: int = 1
    offset: int = 0
    after: int = -_UNBOUNDED
    before: int = _UNBOUNDED
    once: frozenset[int] | None = None
    event_filter: EventFilter | None = None

    def passes(self, engine: Any, event: int) -> bool:
        """Tells whether a handler behind this gate runs at the count `event`."""
        if not (self.after < event < self.before) or (event - self.offset) % self.every:
            return False
        if self.once is not None and event not in self.once:
            return False
        return self.event_filter is None or bool(self.event_filter(engine, event))


class CallableEventWithFilter:
    """One event, with or without a filter on its count.

    Args:
        value: the event's value.
        event_filter: called with the engine and the event's count; the handler runs where it
            returns true. None lets every count pass.
        name: the event's name.
    """

    gate: Gate | None = None

    def __init__(
        self, value: str, event_filter: EventFilter | None = None, name: str | None = None
    ) -> None:
        # An Enum member already has both when this runs.
        if not hasattr(self, "_value_"):
            self._value_ = value
        if name is not None and not hasattr(self, "_name_"):
            self._name_ = name
        if event_filter is not None:
            self.gate = Gate(event_filter=event_filter)

    @DynamicClassAttribute
    def name(self) -> str:
        """The event's name."""
        return self._name_

    @DynamicClassAttribute
    def value(self) -> str:
        """The event's value."""
        return self._value_

    @property
    def filter(self) -> EventFilter | None:
        """The filter as one callable of (engine, count), or None where every count passes."""
        if self.gate is None:
            return None
        given = self.gate.event_filter
        return (
            given
            if given is not None and self.gate == Gate(event_filter=given)
            else self.gate.passes
        )

    def __call__(
        self,
        event_filter: EventFilter | None = None,
        every: int | None = None,
        once: int | Sequence[int] | None = None,
        before: int | None = None,
        after: int | None = None,
    ) -> CallableEventWithFilter:
        """Returns the same event with a filter on its count (iteration or epoch, from 1).

        Exactly one of `event_filter`, `once` and the group (`every`, `before`, `after`) is given.

        Args:
            event_filter: called with (engine, count), returns whether the handler runs.
            every: runs at each `every`-th count; with `before` or `after`, at the first count after
                `after` and each `every`-th one from there.
            once: runs at this count, or at each of these.
            before: runs at counts below this one.
            after: runs at counts above this one.

        Raises:
            ValueError: if arguments are combined otherwise, are out of range, or the filter does
                not take (engine, count).
            TypeError: if `event_filter` is not callable.
        """
        window = every is not None or before is not None or after is not None
        if (event_filter is not None) + (once is not None) + window != 1:
            raise ValueError(
                "Only one of the input arguments should be specified, except before, after and "
                f"every; got event_filter={event_filter}, every={every}, once={once}, "
                f"before={before}, after={after}"
            )
        gate: Gate | None
        if event_filter is not None:
            gate = _gate_of_filter(event_filter)
        elif once is not None:
            gate = Gate(once=_counts("once", once))
        else:
            gate = _gate_of_window(every, before, after)
        event = CallableEventWithFilter(self.value, None, self.name)
        event.gate = gate
        return event

    def __repr__(self) -> str:
        return f"Events.{self.name}" + ("" if self.gate is None else f"(filter={self.gate})")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return self.name == other
        if isinstance(other, CallableEventWithFilter):
            return self.name == other.name
        if is_event(other):
            return bool(self.name == other.name and self.value == other.value)
        return NotImplemented

    def __hash__(self) -> int:
        # The hash of the bare name, which is also that of pytorch-ignite's events: one of theirs
        # finds ours in a dict and the other way round.
        return hash(self._name_)

    def __or__(self, other: Any) -> EventsList:
        return EventsList().joined(self, other)

    def __ror__(self, other: Any) -> EventsList:
        return EventsList().joined(other, self)


def is_event(value: object) -> TypeGuard[Any]:
    """Tells whether `value` is an event of ours or of another library."""
    return (
        not isinstance(value, (str, type))
        and isinstance(getattr(value, "name", None), str)
        and hasattr(value, "value")
    )


def gate_of(event: object) -> Gate | None:
    """Returns the gate of an event, whichever library it comes from; None if every count passes."""
    if isinstance(event, CallableEventWithFilter):
        return event.gate
    foreign: EventFilter | None = getattr(event, "filter", None)
    return None if foreign is None else Gate(event_filter=foreign)


def _gate_of_filter(event_filter: EventFilter) -> Gate:
    if not callable(event_filter):
        raise TypeError(
            f"Argument event_filter should be a callable of (engine, event), got {event_filter!r}"
        )
    try:
        inspect.signature(event_filter).bind(None, 1)
    except TypeError as error:
        raise ValueError(
            f"Error adding {event_filter} 'event_filter': takes parameters "
            f"{list(inspect.signature(event_filter).parameters)} but will be called with "
            f"['engine', 'event'] ({error})."
        ) from None
    return Gate(event_filter=event_filter)


def _gate_of_window(every: int | None, before: int | None, after: int | None) -> Gate | None:
    if every is not None and not (isinstance(every, numbers.Integral) and every > 0):
        raise ValueError(f"Argument every should be integer and greater than zero, got {every!r}")
    for name, value in (("before", before), ("after", after)):
        if value is not None and not (isinstance(value, numbers.Integral) and value >= 0):
            raise ValueError(
                f"Argument {name} should be integer and greater or equal to zero, got {value!r}"
            )
    if before is None and after is None:
        return None if every == 1 else Gate(every=int(cast(int, every)))
    low = int(after or 0)
    return Gate(
        every=int(every or 1),
        offset=low + 1,
        after=low,
        before=_UNBOUNDED if before is None else int(before),
    )


def _counts(name: str, value: int | Sequence[int]) -> frozenset[int]:
    counts: list[Any] = list(value) if isinstance(value, Sequence) else [value]
    if not counts or not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(
            f"Argument {name} should either be a positive integer or a list of positive integers, "
            f"got {value!r}"
        )
    return frozenset(counts)


class EventEnum(CallableEventWithFilter, Enum):
    """The base of every set of events, yours as well.

    Members are declared as `NAME = "value"` and registered with `Engine.register_events`.
    """

    def __new__(cls, value: str) -> Self:
        """Makes a member of the given value."""
        member = object.__new__(cls)
        member._value_ = value
        return member

    __hash__ = CallableEventWithFilter.__hash__
    __eq__ = CallableEventWithFilter.__eq__
    __or__ = CallableEventWithFilter.__or__
    __ror__ = CallableEventWithFilter.__ror__


class Events(EventEnum):
    """The events of a run, in the order in which `Engine.run` fires them.

    `TERMINATE_SINGLE_EPOCH` follows `terminate_epoch()` and `TERMINATE` follows `terminate()`; the
    first passes the number of iterations of the epoch so far to its handlers, `EXCEPTION_RAISED`
    the exception. `DATALOADER_STOP_ITERATION` fires when the data has run out before the epoch has,
    and is about to be started anew. `INTERRUPT` follows `interrupt()`.
    """

    EPOCH_STARTED = "epoch_started"
    EPOCH_COMPLETED = "epoch_completed"
    STARTED = "started"
    COMPLETED = "completed"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    EXCEPTION_RAISED = "exception_raised"
    GET_BATCH_STARTED = "get_batch_started"
    GET_BATCH_COMPLETED = "get_batch_completed"
    DATALOADER_STOP_ITERATION = "dataloader_stop_iteration"
    TERMINATE = "terminate"
    TERMINATE_SINGLE_EPOCH = "terminate_single_epoch"
    INTERRUPT = "interrupt"


class EventsList:
    """Several events as one, made by `|`: a handler attached to it is attached to each."""

    def __init__(self) -> None:
        self._events: list[Any] = []

    def __getitem__(self, item: int) -> Any:
        return self._events[item]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def __or__(self, other: Any) -> EventsList:
        return self.joined(other)

    def joined(self, *others: Any) -> EventsList:
        """Returns a new list: these events, then each of `others`, an event or a list of them."""
        combined = EventsList()
        combined._events.extend(self._events)
        for other in others:
            combined._events.extend(other if is_events_list(other) else (other,))
        for event in combined._events:
            if not is_event(event):
                raise TypeError(
                    "Argument event should be Events or CallableEventWithFilter, "
                    f"got: {type(event)} ({event!r})"
                )
        return combined


def is_events_list(value: object) -> bool:
    """Tells whether `value` is a list of events made by `|`, of ours or of another library."""
    return isinstance(value, EventsList) or (
        type(value).__name__ == "EventsList" and hasattr(value, "__iter__")
    )


class RemovableEventHandle:
    """Takes an attached handler off again; also a context manager that does so at its end.

    Holds handler and engine weakly, so keeping the handle keeps neither alive.

    Args:
        event_name: the event or events to which the handler was attached.
        handler: the attached handler.
        engine: the engine to which it was attached.
    """

    def __init__(self, event_name: Any, handler: Callable[..., Any], engine: Any) -> None:
        self.event_name = event_name
        self.handler: Callable[[], Callable[..., Any] | None] = _weakly(handler)
        self.engine: Callable[[], Any] = weakref.ref(engine)

    def remove(self) -> None:
        """Removes the handler from the engine; does nothing if either is gone already."""
        handler, engine = self.handler(), self.engine()
        if handler is None or engine is None:
            return
        events = self.event_name if is_events_list(self.event_name) else (self.event_name,)
        for event in events:
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def _weakly(handler: Callable[..., Any]) -> Callable[[], Callable[..., Any] | None]:
    if isinstance(handler, MethodType):
        return weakref.WeakMethod(handler)
    try:
        return weakref.ref(handler)
    except TypeError:
        # A callable without weak references (a C type, a slotted class): the handle keeps it alive.
        return lambda: handler
