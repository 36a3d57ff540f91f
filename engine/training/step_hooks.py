"""Hooks of optimizers' steps around a graph, which steps without calling them.

torch calls the hooks that somebody registered with an optimizer from its `step()`. A background
save has the step wait in one; users keep moving averages in them. None of them may run while a step
is only rehearsed, and all of them have to where a graph is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from crosstrain.backends.graphs import is_repeatable

# Where torch keeps them; it has no public way to call one.
_BEFORE, _AFTER = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
# The key of the hook that notes a step; torch's own are numbers.
_MARK = "crosstrain"


def has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether an optimizer calls hooks: one of a class that only wraps another does not."""
    return all(hasattr(optimizer, place) for place in (_BEFORE, _AFTER))


class StepHooks:
    """The hooks of some optimizers."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = list(optimizers)

    def wait(self) -> None:
        """Waits for those who copy what a step changes."""
        self._run(_BEFORE, is_repeatable)

    def before(self) -> None:
        """Runs what is to run before a step."""
        self._run(_BEFORE)

    def after(self) -> None:
        """Runs what is to run after a step."""
        self._run(_AFTER)

    def _run(self, place: str, which: Callable[[Any], bool] | None = None) -> None:
        for optimizer in self._optimizers:
            for hook in list(getattr(optimizer, place, {}).values()):
                if which is None or which(hook):
                    hook(optimizer, (), {})

    @contextmanager
    def silenced(self) -> Generator[list[torch.optim.Optimizer], None, None]:
        """Has steps inside call no hooks but those that are repeatable; gives who was stepped."""
        stepped: list[torch.optim.Optimizer] = []
        tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        for one in self._optimizers:
            for place in (_BEFORE, _AFTER):
                table: dict[Any, Any] | None = getattr(one, place, None)
                if table is None:
                    continue
                tables.append((table, dict(table)))
                for key in [key for key, hook in table.items() if not is_repeatable(hook)]:
                    del table[key]
                if place == _AFTER:
                    table[_MARK] = lambda which, *_: stepped.append(which)
        try:
            yield stepped
        finally:
            for table, before in tables:
                # Those that were registered inside stay.
                added = {k: hook for k, hook in table.items() if k not in before and k != _MARK}
                table.clear()
                table.update({**before, **added})
