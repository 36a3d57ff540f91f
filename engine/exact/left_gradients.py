"""Gradients that a step leaves behind, of which its own state has nothing.

A step clears them before it makes new ones, so what it computes does not follow from them. What
handlers compute may: they are part of the state where one of them looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from crosstrain.engine.ranks.world import unshared
from crosstrain.engine.spread import parameters_of
from crosstrain.engine.training import gradients


def left_gradients(objects: Mapping[str, Any], reads: Callable[[bool], bool]) -> Mapping[str, Any]:
    """Returns the gradients that somebody may look at before they are cleared, by name.

    Args:
        objects: models and optimizers, by name.
        reads: tells whether anybody looks at gradients: between two steps; or, if True, at all.
    """
    there = {name: one for name, one in _named(objects).items() if one.grad is not None}
    if not there:
        return {}
    if reads(False):
        return gradients.capture_named(there)
    # Those that no optimizer clears are there, and grow, in the next step, too.
    cleared = {
        id(one) for o in objects.values() if isinstance(o, Optimizer) for one in parameters_of(o)
    }
    kept = {name: one for name, one in there.items() if id(one) not in cleared}
    return gradients.capture_named(kept) if kept and reads(True) else {}


def restore_left(saved: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
    """Sets the gradients that `left_gradients` returned; leaves all others."""
    if saved:
        named = _named(objects)
        gradients.restore(saved, {name: one for name, one in named.items() if name in saved})


def _named(objects: Mapping[str, Any]) -> dict[str, Any]:
    models = [unshared(one) for one in objects.values() if isinstance(one, Module)]
    return gradients.named_by_place(
        models, [o for o in objects.values() if isinstance(o, Optimizer)]
    )
