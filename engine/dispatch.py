"""Dispatch: which functions run at which event, in which order, and how they are run.

A function is bound to an event when it is added (`HandlerTable`), so a wrong signature is an error
there. Handlers of one event run in the order in which they were attached; those of the engine's own
that must run before or after all of the user's say so by a `Phase`. Binding, order and calling are
one file: each is a side of the same table, and none is used without the others.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

from .events import (
    EventFilter,
    Events,
    Gate,
    RemovableEventHandle,
    gate_of,
    is_event,
    is_events_list,
)
from .state import State

Handler = TypeVar("Handler", bound=Callable[..., Any])
# The rest of a gate after `every` and `offset`.
Window = tuple[int, int, frozenset[int] | None, EventFilter | None]
# At which counts a handler runs (`every`, 0 for all; `offset`; the rest of its gate, None where
# these two are all of it), and its further arguments.
Extra = tuple[int, int, Window | None, tuple[Any, ...], dict[str, Any]]
# A handler as it was added: the function, whether it takes the engine first, and the rest, None for
# a plain handler. Plain tuples: unpacking named ones is slower, and the loop unpacks one for each
# handler and event.
Binding = tuple[Callable[..., Any], bool, Extra | None]

OPEN: Window = Gate().after, Gate().before, None, None  # lets every count pass


class Phase(IntEnum):
    """When, among an event's handlers, one of the engine's own runs; users' run in `NORMAL`.

    FIRST: before the users' handlers, which evaluate and save what it does. LAST: after them, since
    it acts upon what they ask for. SAVE: after all, since it saves what they have changed.
    """

    FIRST = 0
    NORMAL = 1
    LAST = 2
    SAVE = 3


class _Late:
    """Runs an event's handlers of the phases after NORMAL: one binding, the last of its slot."""

    __slots__ = ("bindings", "running")

    def __init__(self) -> None:
        self.bindings: list[tuple[Phase, Binding]] = []
        self.running = 0

    def __call__(self, engine: Any) -> None:
        self.running += 1
        try:
            for _, (handler, takes_engine, _) in self.bindings:
                if takes_engine:
                    handler(engine)
                else:
                    handler()
        finally:
            self.running -= 1


class Slot:
    """One event's place in the table.

    `handlers` grows in place, so a handler that is added while its event fires runs at once; it is
    replaced when one is removed, or is added before those that run, so that a running loop over it
    is not disturbed. `counter` is the attribute of the state that counts the event, None if none
    does.
    """

    __slots__ = ("_first", "_late", "counter", "event", "handlers", "name")

    def __init__(self, name: str, event: Any) -> None:
        self.name = name
        self.event = event
        self.counter: str | None = None
        self.handlers: list[Binding] = []
        self._first = 0  # how many of them are of the phase FIRST
        self._late: _Late | None = None  # the last of them, if there are any of a later phase

    def add(self, binding: Binding, phase: Phase = Phase.NORMAL) -> None:
        """Adds a handler after those of its phase and of the phases before."""
        handlers, late = self.handlers, self._late
        if phase is Phase.FIRST:
            self.handlers = [*handlers[: self._first], binding, *handlers[self._first :]]
            self._first += 1
        elif phase is not Phase.NORMAL:
            if late is None:
                late = self._late = _Late()
                handlers.append((late, True, None))
            late.bindings = sorted([*late.bindings, (phase, binding)], key=lambda item: item[0])
        elif late is None:
            handlers.append(binding)
        elif late.running:
            self.handlers = [*handlers[:-1], binding, handlers[-1]]
        else:
            handlers.insert(len(handlers) - 1, binding)

    def bindings(self) -> Iterator[Binding]:
        """Yields all bindings, in their order."""
        late = self._late
        yield from (binding for binding in self.handlers if binding[0] is not late)
        yield from (binding for _, binding in (() if late is None else late.bindings))

    def bound(self) -> Iterator[Callable[..., Any]]:
        """Yields the functions that are attached, in their order."""
        return (handler for handler, *_ in self.bindings())

    @property
    def users(self) -> list[Binding]:
        """The bindings of the phase NORMAL; setting it sets what runs from the next event on."""
        return self.handlers[self._first : len(self.handlers) - (self._late is not None)]

    @users.setter
    def users(self, bindings: list[Binding]) -> None:
        own = self.handlers[len(self.handlers) - (self._late is not None) :]
        self.handlers = [*self.handlers[: self._first], *bindings, *own]

    def put(self, index: int, binding: Binding) -> None:
        """Puts a binding in the place of another, an index of `users`; at once, too."""
        self.handlers[self._first + range(len(self.users))[index]] = binding

    def discard(self, handler: Callable[..., Any]) -> bool:
        """Takes a function off, as often as it is attached; tells whether it was."""
        before = len(tuple(self.bound()))
        first, late = self.handlers[: self._first], self._late
        self._first -= sum(binding[0] == handler for binding in first)
        self.handlers = [binding for binding in self.handlers if binding[0] != handler]
        if late is not None:
            late.bindings = [item for item in late.bindings if item[1][0] != handler]
            if not late.bindings:
                self._late = None
                self.handlers = [binding for binding in self.handlers if binding[0] is not late]
        return len(tuple(self.bound())) < before


def _name_of(function: Any) -> str:
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


# What an event passes to its handlers besides the engine, as samples for the signature check.
_EVENT_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    Events.EXCEPTION_RAISED.name: ((Exception(),), {}),
    Events.TERMINATE_SINGLE_EPOCH.name: ((), {"iter_counter": 0}),
}


class HandlerTable:
    """Holds one `Slot` for each registered event of an owner, found by the event's name."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._slots: dict[str, Slot] = {}

    def register(self, event: Any) -> Slot:
        """Gives an event a slot, or finds the one that it has, and returns it."""
        name = event if isinstance(event, str) else event.name
        slot = self._slots.setdefault(name, Slot(name, event))
        known = slot.event
        if is_event(event) and is_event(known) and event.value != known.value:
            raise ValueError(
                f"Event {event!r} with value {event.value!r} has the name of an event that is "
                f"registered already, with value {known.value!r}. Give it another name."
            )
        return slot

    def slot(self, event: Any) -> Slot | None:
        """Returns the slot of an event, or None if it is not registered."""
        name = event if isinstance(event, str) else getattr(event, "name", None)
        slot = self._slots.get(name) if isinstance(name, str) else None
        if slot is None or slot.event is event:
            return slot
        if is_event(event) and is_event(slot.event) and event.value != slot.event.value:
            return None
        return slot

    def require(self, event: Any) -> Slot:
        """Returns the slot of an event that has to be registered."""
        slot = self.slot(event)
        if slot is None:
            raise ValueError(
                f"Event {event} is not a valid event for this {self._owner}. Registered events: "
                f"{', '.join(self._slots)}. Add your own with register_events()."
            )
        return slot

    def all_functions(
        self, without: Container[Any] = ()
    ) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yields the handlers of events, all but some, and their filters, and what to call each.

        Handlers that are passed more than the engine have it bound to them.
        """
        for name, slot in self._slots.items():
            for handler, _, extra in () if slot.event in without else slot.bindings():
                called = f"{_name_of(handler)} (a handler of {name})"
                if extra is None:
                    yield called, handler
                    continue
                _, _, window, args, kwargs = extra
                yield called, partial(handler, *args, **kwargs) if args or kwargs else handler
                if window is not None and window[-1] is not None:
                    yield f"{_name_of(window[-1])} (a filter of {name})", window[-1]

    def all_handlers(self) -> Iterator[tuple[str, Callable[..., Any], bool]]:
        """Yields the handlers of all events, what to call each, and whether it is called for good.

        One that waits for a count, by `once`, is not: removed when that has come, it is not missed.
        """
        for name, slot in self._slots.items():
            for handler, _, extra in slot.bindings():
                window = None if extra is None else extra[2]
                lasts = window is None or window[2] is None
                yield f"{_name_of(handler)} (a handler of {name})", handler, lasts

    def bind(
        self,
        engine: Any,
        event: Any,
        handler: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Binding:
        """Makes the binding of a handler to an event, with the engine first if it takes that.

        A method of the engine itself, such as `terminate`, has it already: it is passed only where
        it must be.
        """
        event_args, event_kwargs = _EVENT_ARGUMENTS.get(self.require(event).name, ((), {}))
        passed, named = (*event_args, *args), {**kwargs, **event_kwargs}
        takes_engine = getattr(handler, "__self__", None) is not engine
        try:
            check_signature(handler, "handler", *(engine,) * takes_engine, *passed, **named)
        except ValueError as error:
            takes_engine = not takes_engine
            try:
                check_signature(handler, "handler", *(engine,) * takes_engine, *passed, **named)
            except ValueError:
                raise ValueError(
                    f"{error} Nor can it be called {'with' if takes_engine else 'without'} the "
                    "engine first."
                ) from None
        gate = gate_of(event)
        if gate is not None:
            every, offset, *_ = gate
            window: Window = gate.after, gate.before, gate.once, gate.event_filter
            open_window = window == OPEN
            extra: Extra = every, offset, None if open_window else window, args, kwargs
            return handler, takes_engine, extra
        return handler, takes_engine, (0, 0, None, args, kwargs) if args or kwargs else None

    def has(self, handler: Callable[..., Any], event: Any | None) -> bool:
        """Tells whether a handler is bound to an event, or to any where `event` is None."""
        if event is None:
            slots: Iterable[Slot | None] = self._slots.values()
        else:
            slots = (self.slot(event),)
        return any(bound == handler for slot in slots if slot for bound in slot.bound())

    def remove(self, handler: Callable[..., Any], event: Any) -> None:
        """Removes each binding of a handler to an event."""
        slot = self.slot(event)
        if slot is None or not slot.handlers:
            raise ValueError(
                f"Input event name '{event}' does not exist: no handler is attached to it. Events "
                f"with handlers: {', '.join(s.name for s in self if s.handlers) or 'none'}"
            )
        if not slot.discard(handler):
            raise ValueError(
                f"Input handler '{handler}' is not found among registered event handlers of "
                f"{event}: {list(slot.bound())}"
            )

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())


class Dispatcher:
    """Holds a state, its events and their handlers: the half of an Engine that runs no loop."""

    def __init__(self) -> None:
        self.logger = logging.getLogger(f"{__package__}.{type(self).__name__}")
        #: What is known of the run: iteration, epoch, output, metrics, and what you set.
        self.state = State()
        self.last_event_name: Any = None
        self._handlers = HandlerTable(type(self).__name__)
        # Whether each event is logged; read when a run begins or goes on and when an epoch
        # begins, not at each event.
        self._observed = self._overridden
        self.register_events(*Events)

    def register_events(
        self, *event_names: Any, event_to_attr: Mapping[Any, str] | None = None
    ) -> None:
        """Adds events that `fire_event` may fire and to which handlers may be attached.

        Args:
            *event_names: members of an `EventEnum`, or strings.
            event_to_attr: for events that are counted, the state's attribute that counts them; it
                is set to 0 if absent, and filters such as `every` compare with it.

        Raises:
            TypeError: if a name is neither.
            ValueError: if `event_to_attr` is not a mapping, or a name is taken.
        """
        if event_to_attr is not None and not isinstance(event_to_attr, Mapping):
            raise ValueError(
                "Expected event_to_attr to be dictionary of events and names of attributes. Got "
                f"{type(event_to_attr)}."
            )
        for index, event in enumerate(event_names):
            if not (isinstance(event, str) or is_event(event)):
                raise TypeError(
                    f"Value at {index} of event_names should be a str or EventEnum, but given "
                    f"{event!r}"
                )
        slots = [self._handlers.register(event) for event in event_names]
        if event_to_attr:
            known = {event: event_to_attr[event] for event in event_names if event in event_to_attr}
            self.state.count_events(known)
        for slot in slots:
            slot.counter = self.state.event_to_attr.get(slot.name)

    def slot(self, event: Any) -> Slot:
        """Returns an event's place in the table; its `handlers` is empty where nobody listens."""
        return self._handlers.require(event)

    def has_registered_events(self, event: Any) -> bool:
        """Tells whether an event is registered with this engine."""
        return self._handlers.slot(event) is not None

    @property
    def _allowed_events(self) -> list[Any]:
        # pytorch-ignite's ProgressBar looks here, and works with our engine because of it.
        return self.registered_events()

    def registered_events(self) -> list[Any]:
        """Returns the events that this engine may fire, in the order in which they came."""
        return [slot.event for slot in self._handlers]

    def add_event_handler(
        self, event_name: Any, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Attaches a handler to an event, or to several.

        Args:
            event_name: an event, with or without a filter, or several joined by `|`.
            handler: called with the engine first if it takes that, then with what the event passes
                (EXCEPTION_RAISED: the exception), then with `args` and `kwargs`.
            *args: further positional arguments for the handler.
            **kwargs: further keyword arguments for the handler.

        Returns:
            A handle that takes the handler off again.

        Raises:
            TypeError: if the handler is not callable.
            ValueError: if the event is not registered, or the handler does not take these
                arguments.
            RuntimeError: if the event has a filter but no attribute of the state counts it.
        """
        bound: list[tuple[Slot, Binding]] = []
        for event in event_name if is_events_list(event_name) else (event_name,):
            slot = self._handlers.require(event)
            if gate_of(event) is not None and slot.counter is None:
                self.state.get_event_attrib_value(slot.name)
            bound.append((slot, self._handlers.bind(self, event, handler, args, kwargs)))
        for slot, binding in bound:
            slot.add(binding)
        self.logger.debug("Added handler %s for event %s", handler, event_name)
        return RemovableEventHandle(event_name, handler, self)

    def add_in_phase(self, event: Any, handler: Callable[..., Any], phase: Phase) -> None:
        """Attaches a handler of the engine's own that runs before or after all of the user's.

        The event has no filter and passes nothing to its handlers.
        """
        slot = self._handlers.require(event)
        assert gate_of(event) is None
        assert slot.name not in _EVENT_ARGUMENTS
        slot.add(self._handlers.bind(self, event, handler, (), {}), phase)

    def on(self, event_name: Any, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Attaches the decorated function as `add_event_handler` does, and returns it unchanged."""

        def attach(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return attach

    def has_event_handler(self, handler: Callable[..., Any], event_name: Any | None = None) -> bool:
        """Tells whether a handler is attached to an event, or to any where none is named."""
        return self._handlers.has(handler, event_name)

    def has_users_handler(self, event: Any) -> bool:
        """Tells whether a handler that is not this library's own is attached to an event."""
        ours = "crosstrain.engine"
        return any(
            not str(getattr(handler, "__module__", "")).startswith(ours)
            for handler in self._handlers.require(event).bound()
        )

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Any) -> None:
        """Takes a handler off an event.

        Raises:
            ValueError: if it is not attached to it.
        """
        self._handlers.remove(handler, event_name)

    def fire_event(self, event_name: Any) -> None:
        """Runs the handlers of a registered event, in the order in which they were attached.

        Raises:
            ValueError: if the event is not registered.
        """
        self._emit(event_name)

    def _emit(self, event: Any) -> None:
        slot = self._handlers.require(event)
        if self._observed:
            self._fire_observed(slot)
        else:
            self._fire(slot)

    @property
    def _overridden(self) -> bool:
        return type(self)._fire_event is not Dispatcher._fire_event

    def _observe(self) -> None:
        self._observed = self._overridden or self.logger.isEnabledFor(logging.DEBUG)

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        """Fires an event; a subclass may override it to see each go by, as in pytorch-ignite."""
        self._run_observed(self._handlers.require(event_name), event_args, event_kwargs)

    def _fire_observed(self, slot: Slot) -> None:
        self._fire_with(slot.event)

    def _fire(self, slot: Slot) -> None:
        """Runs an event's handlers: the hot path, so what a filter asks is compared right here."""
        self.last_event_name = slot.event
        for handler, takes_engine, extra in slot.handlers:
            if extra is None:
                if takes_engine:
                    handler(self)
                else:
                    handler()
                continue
            every, offset, window, args, kwargs = extra
            if every:
                counter = slot.counter
                state: Any = self.state
                # Read for each handler: one may change the count that the next one sees. The
                # iteration, which most filters ask for, is read the fastest way.
                count = state.iteration if counter == "iteration" else getattr(state, counter)  # type: ignore[arg-type]
                if (count - offset) % every:
                    continue
                if window is not None:
                    after, before, once, event_filter = window
                    if (
                        not (after < count < before)
                        or (once is not None and count not in once)
                        or (event_filter is not None and not event_filter(self, count))
                    ):
                        continue
            if takes_engine:
                handler(self, *args, **kwargs)
            else:
                handler(*args, **kwargs)

    def _fire_with(self, event: Any, *event_args: Any, **event_kwargs: Any) -> bool:
        """Fires an event that passes something to its handlers; tells whether one of them ran."""
        slot = self._handlers.require(event)
        if not self._overridden:
            return self._run_observed(slot, event_args, event_kwargs)
        # What the override does not tell: whether a handler runs.
        runs = bool(slot.handlers)
        self._fire_event(slot.event, *event_args, **event_kwargs)
        return runs

    def _run_observed(self, slot: Slot, passed: tuple[Any, ...], named: dict[str, Any]) -> bool:
        """Does what `_fire` does, of any event, logged; tells whether a handler ran."""
        state = self.state
        self.logger.debug(
            "%s | %s, Firing handlers for event %s", state.epoch, state.iteration, slot.event
        )
        self.last_event_name = slot.event
        ran = False
        for handler, takes_engine, extra in slot.handlers:
            every, offset, window, args, kwargs = extra or (0, 0, OPEN, (), {})
            if every:
                count = getattr(self.state, slot.counter)  # type: ignore[arg-type]
                if not Gate(every, offset, *(window or OPEN)).passes(self, count):
                    continue
            first = (self,) if takes_engine else ()
            handler(*first, *passed, *args, **{**kwargs, **named})
            ran = True
        return ran


def check_signature(fn: Callable[..., Any], description: str, *args: Any, **kwargs: Any) -> None:
    """Checks that a function can be called with these arguments, without calling it."""
    if not callable(fn):
        raise TypeError(
            f"Error adding {fn!r} '{description}': it is not callable. Pass a function, a bound "
            "method, or an object with __call__."
        )
    try:
        signature = inspect.signature(fn)
    except ValueError as error:
        raise ValueError(
            f"Error adding {fn} '{description}': its parameters cannot be read ({error}). Wrap it "
            "in a function of your own."
        ) from None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        passed = [*(type(value).__name__ for value in args), *kwargs]
        raise ValueError(
            f"Error adding {fn} '{description}': takes parameters {list(signature.parameters)} but "
            f"will be called with {passed} ({error})."
        ) from None
