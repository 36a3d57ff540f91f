"""The event-driven training loop, exact resume and checkpoints of crosstrain."""

if __name__ != "crosstrain.engine":
    raise ImportError(
        "crosstrain's engine was imported as 'engine'. Install the project (pip install -e .) and "
        "use 'import crosstrain.engine'."
    )

from .engine import Engine
from .events import (
    CallableEventWithFilter,
    EventEnum,
    Events,
    EventsList,
    RemovableEventHandle,
    State,
)

__all__ = [
    "CallableEventWithFilter",
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "RemovableEventHandle",
    "State",
]
