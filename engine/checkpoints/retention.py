"""Names of checkpoint files, the step that is in them, and which files are kept."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine


class Item(NamedTuple):
    """A saved file and its priority; the file of the lowest one is the first to go."""

    priority: int | float
    filename: str


class Retention(NamedTuple):
    """Decides which files are kept: the `n_saved` of the highest priority; None keeps all.

    With `or_equal`, a file of the same priority as the lowest takes its place.
    """

    n_saved: int | None
    or_equal: bool
    items: Sequence[Item]

    def admits(self, priority: int | float) -> bool:
        """Tells whether a file of this priority is to be saved."""
        if self.n_saved is None or len(self.items) < self.n_saved:
            return True
        new, lowest = _order(priority), _order(self.items[0].priority)
        return bool(new >= lowest if self.or_equal else new > lowest)

    def with_added(self, item: Item) -> tuple[list[Item], list[str]]:
        """Returns what is there after a file is saved: the items, and the names to be removed.

        A file of the same name is replaced and counts no longer. More than one is to be removed
        where a run was killed between a save and the removal that follows it.
        """
        kept = [old for old in self.items if old.filename != item.filename]
        removed: list[str] = []
        while self.n_saved is not None and len(kept) >= self.n_saved:
            removed.append(kept.pop(0).filename)
        kept.append(item)
        kept.sort(key=lambda each: _order(each.priority))
        return kept, removed


def _order(priority: Any) -> Any:
    # NaN compares with nothing; a score that is none is the worst of all.
    return -math.inf if isinstance(priority, float) and math.isnan(priority) else priority


def format_score(priority: Any) -> str:
    """Returns a score as it stands in a file's name: whole numbers as they are, else 4 places."""
    return f"{priority}" if isinstance(priority, numbers.Integral) else f"{priority:.4f}"


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
