"""What is set anew before anything reads it: whenever an epoch or an iteration begins, or at once.

    @trainer.on(Events.EPOCH_STARTED)
    def draw():
        mixup.lam = random.betavariate(0.4, 0.4)

A run that goes on calls such a handler first, with the random states that the epoch began with, and
a `forward` that keeps `self.factors` for what it calls next has written them before they are read.
None of that needs a checkpoint. That it is so, the source has to show: the value is set by a
statement that is done in any case, and not by what it was. In doubt the answer is no.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any, Final

from crosstrain.engine.events import Events
from crosstrain.engine.nests import is_module
from crosstrain.engine.source.set_first import Held, set_by
from crosstrain.engine.source.uses import Use

from .used import Used
from .walk import Walk

# What comes after each of the two, before what it has set is set once more.
_AFTER: Final = {
    Events.EPOCH_STARTED: frozenset(
        {"GET_BATCH_STARTED", "GET_BATCH_COMPLETED", "ITERATION_STARTED"}
        | {"ITERATION_COMPLETED", "EPOCH_COMPLETED"}
    ),
    Events.ITERATION_STARTED: frozenset({"ITERATION_COMPLETED"}),
}


def set_at(used: Used, event: Events) -> list[Held]:
    """Returns the attributes that handlers of an event set each time, whatever these were."""
    slot = used.engine._handlers.require(event)
    found: list[Held] = []
    for handler, takes_engine, extra in slot.bindings():
        every, offset, window, args, named = extra or (0, 0, None, (), {})
        if every <= 1 and offset == 0 and window is None:
            found += set_by(handler, [*[used.engine] * takes_engine, *args], named)
    return found


def called_before(used: Used, event: Events) -> list[types.FunctionType]:
    """Returns the functions that may be called before handlers of an event have set anything.

    By what fires at another event than those that follow, by these handlers themselves, and by what
    fetches the data, which may be ahead.
    """
    before: dict[str, Any] = dict(used.of_data)
    for slot in used.engine._handlers:
        if slot.name not in _AFTER[event]:
            for handler, _, extra in slot.bindings():
                if extra is not None and (extra[3] or extra[4]):
                    handler = partial(handler, *extra[3], **extra[4])
                before[f"{slot.name}, number {len(before)}"] = handler
                if extra is not None and extra[2] is not None:
                    before[f"a filter, number {len(before)}"] = extra[2][-1]
    walk = _Reached(used)
    walk.from_functions({name: one for name, one in before.items() if one is not None})
    if walk.computes:
        walk.from_functions(used.of_trained)
    return walk.functions


class _Reached(Walk):
    """Comes to the functions that some call, and tells whether they compute by a model."""

    def __init__(self, used: Used) -> None:
        # What ends in a log is read, too.
        super().__init__(used, waits=False)
        self.computes = False

    def look(self, value: Any, owner: str, name: str, depth: int, uses: frozenset[Use]) -> None:
        """Notes a model that may be called: more is done with it than to set what it holds."""
        if is_module(value):
            self.computes |= any(use.read for use in uses)
        super().look(value, owner, name, depth, uses)
