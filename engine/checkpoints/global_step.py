"""The step that a file's or a log's entry is named by, taken from another engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine

__all__ = ["global_step_from_engine"]


def global_step_from_engine(
    engine: Engine, custom_event_name: Any | None = None, fallback_attr: str = "epoch"
) -> Callable[[Any, Any], int]:
    """Makes a `global_step_transform` that counts by another engine: an evaluator's by its trainer.

    Args:
        engine: the engine whose state is read.
        custom_event_name: the event whose count is taken; by default the one at which the handler
            runs.
        fallback_attr: the attribute of the state that is taken where no attribute counts the event.

    Returns:
        A function of (engine, event name) that returns the count.
    """

    def step(_: Any, event_name: Any) -> int:
        event = event_name if custom_event_name is None else custom_event_name
        name = event if isinstance(event, str) else getattr(event, "name", None)
        if name in engine.state.event_to_attr:
            return engine.state.get_event_attrib_value(name)
        count: int = getattr(engine.state, fallback_attr)
        return count

    return step
