"""The table of handlers: which functions run at which event, bound when they are added."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .events import EventFilter, Events, Gate, gate_of, is_event

__all__ = ["OPEN", "Binding", "HandlerTable", "Slot", "check_signature"]

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


class Slot:
    """One event's place in the table.

    `handlers` grows in place, so a handler that is added while its event fires runs at once; it is
    replaced when one is removed, so that a running loop over it is not disturbed. `counter` is the
    attribute of the state that counts the event, None if none does.
    """

    __slots__ = ("counter", "event", "handlers", "name")

    def __init__(self, name: str, event: Any) -> None:
        self.name = name
        self.event = event
        self.counter: str | None = None
        self.handlers: list[Binding] = []


# What an event passes to its handlers besides the engine, as samples for the signature check.
_EVENT_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    Events.EXCEPTION_RAISED.name: ((Exception(),), {}),
    Events.TERMINATE_SINGLE_EPOCH.name: ((), {"iter_counter": 0}),
}


class HandlerTable:
    """Holds one `Slot` for each registered event, found by the event's name.

    Args:
        owner: the name of the class whose events these are, for error messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._slots: dict[str, Slot] = {}

    def register(self, event: Any) -> Slot:
        """Gives an event a slot, or finds the one that it has, and returns it.

        Raises:
            ValueError: if another event of this name and of another value has the slot.
        """
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
        if slot is None:
            return None
        if is_event(event) and is_event(slot.event) and event.value != slot.event.value:
            return None
        return slot

    def require(self, event: Any) -> Slot:
        """Returns the slot of an event.

        Raises:
            ValueError: if it is not registered.
        """
        slot = self.slot(event)
        if slot is None:
            raise ValueError(
                f"Event {event} is not a valid event for this {self._owner}. Registered events: "
                f"{', '.join(self._slots)}. Add your own with register_events()."
            )
        return slot

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

        Raises:
            TypeError: if the handler is not callable.
            ValueError: if the event is not registered or the handler can be called neither with the
                engine first nor without it.
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
        return any(bound == handler for slot in slots if slot for bound, *_ in slot.handlers)

    def remove(self, handler: Callable[..., Any], event: Any) -> None:
        """Removes each binding of a handler to an event.

        Raises:
            ValueError: if the event has no handler, or not this one.
        """
        slot = self.slot(event)
        if slot is None or not slot.handlers:
            raise ValueError(
                f"Input event name '{event}' does not exist: no handler is attached to it. Events "
                f"with handlers: {', '.join(s.name for s in self if s.handlers) or 'none'}"
            )
        kept = [binding for binding in slot.handlers if binding[0] != handler]
        if len(kept) == len(slot.handlers):
            raise ValueError(
                f"Input handler '{handler}' is not found among registered event handlers of "
                f"{event}: {[bound for bound, *_ in kept]}"
            )
        slot.handlers = kept

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._slots.values())


def check_signature(fn: Callable[..., Any], description: str, *args: Any, **kwargs: Any) -> None:
    """Checks that a function can be called with these arguments, without calling it.

    Args:
        fn: the function.
        description: what it is, for the error message.
        *args: sample positional arguments.
        **kwargs: sample keyword arguments.

    Raises:
        TypeError: if it is not callable.
        ValueError: if it cannot be called so, or does not tell its signature.
    """
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
