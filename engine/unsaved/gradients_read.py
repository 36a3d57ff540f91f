"""Whether anybody looks at gradients of which a step has made its use.

They stay until the next step clears them, and handlers can see them until then: one that clips by
the last norm, or shows a histogram as an epoch ends. No state of a step has them, since it needs
them no more. Whose code names them, or a function that reads them, is taken to look at them.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from crosstrain.engine.guards import is_a, is_others
from crosstrain.engine.source.functions import layers_of, variables_of
from crosstrain.engine.source.tree import names_in, words_in

from .used import Used
from .walk import Walk

# Those of torch's by whatever name its modules are called, and what gives a parameter its group.
_READERS: Final = frozenset(
    {"grad", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "add_param_group"}
)


def reads_gradients(used: Used, functions: Iterable[Any]) -> bool:
    """Tells whether functions that a run calls, or what they lead to, may look at gradients."""
    # Also what only ends in a log may look at them.
    walk, looked_at = Walk(used, waits=False), [*functions]
    walk.from_functions({str(number): one for number, one in enumerate(looked_at)})
    layers = (layer for function in looked_at for layer in _layers(function))
    return any(map(_reads, (*walk.functions, *layers)))


def _layers(function: Any) -> list[types.FunctionType]:
    """Returns what a handler is, one of another package's too: the walk leaves these out."""
    while is_a(function, partial):
        function = function.func
    return layers_of(function) or layers_of(
        inspect.getattr_static(type(function), "__call__", None)
    )


def _reads(function: types.FunctionType) -> bool:
    if not _READERS.isdisjoint(words_in(function.__code__)):
        return True
    return any(
        is_a(other, types.FunctionType) and is_others(other) and "grad" in names_in(other.__code__)
        for other in variables_of(function).values()
    )
