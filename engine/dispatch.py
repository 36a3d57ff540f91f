"""Dispatcher: registers events, attaches handlers to them, runs them when the events fire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .events import Events, Gate, RemovableEventHandle, gate_of, is_event, is_events_list
from .handlers import OPEN, Binding, HandlerTable, Slot
from .state import State

__all__ = ["Dispatcher"]

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Dispatcher:
    """Holds a state, its events and their handlers: the half of an Engine that runs no loop."""

    def __init__(self) -> None:
        self.logger = logging.getLogger(f"{__package__}.{type(self).__name__}")
        self.state = State()
        self.last_event_name: Any = None
        self._handlers = HandlerTable(type(self).__name__)
        # Whether each event is logged; read when a run begins or goes on and when an epoch begins,
        # not at each event.
        self._logs_events = False
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
        if event_to_attr is not None and not isinstance(event_to_attr, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
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
        """Returns an event's place in the table; its `handlers` is empty where nobody listens.

        Raises:
            ValueError: if the event is not registered.
        """
        return self._handlers.require(event)

    def has_registered_events(self, event: Any) -> bool:
        """Tells whether an event is registered with this engine."""
        return self._handlers.slot(event) is not None

    @property
    def _allowed_events(self) -> list[Any]:
        # pytorch-ignite's ProgressBar looks here, and works with our engine because of it.
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
            slot.handlers.append(binding)
        self.logger.debug("Added handler %s for event %s", handler, event_name)
        return RemovableEventHandle(event_name, handler, self)

    def on(self, event_name: Any, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Attaches the decorated function as `add_event_handler` does, and returns it unchanged."""

        def attach(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return attach

    def has_event_handler(self, handler: Callable[..., Any], event_name: Any | None = None) -> bool:
        """Tells whether a handler is attached to an event, or to any where none is named."""
        return self._handlers.has(handler, event_name)

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
        if self._logs_events:
            self._log_and_fire(slot)
        else:
            self._fire(slot)

    def _log_and_fire(self, slot: Slot) -> None:
        self._log(slot)
        self._fire(slot)

    def _log(self, slot: Slot) -> None:
        state = self.state
        self.logger.debug(
            "%s | %s, Firing handlers for event %s", state.epoch, state.iteration, slot.event
        )

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

    def _fire_with(self, slot: Slot, *event_args: Any, **event_kwargs: Any) -> int:
        """Runs the handlers of an event that passes something to them; returns how many ran."""
        if self._logs_events:
            self._log(slot)
        self.last_event_name = slot.event
        ran = 0
        for handler, takes_engine, extra in slot.handlers:
            every, offset, window, args, kwargs = extra or (0, 0, OPEN, (), {})
            if every:
                count = getattr(self.state, slot.counter)  # type: ignore[arg-type]
                if not Gate(every, offset, *(window or OPEN)).passes(self, count):
                    continue
            first = (self,) if takes_engine else ()
            handler(*first, *event_args, *args, **{**kwargs, **event_kwargs})
            ran += 1
        return ran
