"""What is saved of a process function that has no state of its own: the gradients of its windows.

A process function that steps its optimizer every few iterations has gradients between them that no
`state_dict` of a model or an optimizer holds. They belong to the models and optimizers that the
engine knows: those in `engine.objects`, and those that the function refers to.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from . import gradients

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine

__all__ = ["OwnStep"]


class OwnStep:
    """The state of a process function that offers none.

    Args:
        function: the process function.
        engine: the engine that runs it.
    """

    def __init__(self, function: Callable[..., Any], engine: Engine) -> None:
        self._function = function
        self._engine = weakref.ref(engine)
        # Of each optimizer: the gradients that its last step has used, and their versions then.
        self._used: weakref.WeakKeyDictionary[Any, list[tuple[Any, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def watch(self) -> None:
        """Notes from here on which gradients the optimizers have stepped with."""
        for optimizer in self._optimizers().values():
            if optimizer not in self._used:
                self._used[optimizer] = []
                optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._used[optimizer] = [
            (weakref.ref(parameter.grad), parameter.grad._version)
            for parameter in gradients.parameters_of(optimizer)
            if parameter.grad is not None
        ]

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the gradients that no step has used yet; None where there are none."""
        used = {
            id(gradient): version
            for noted in self._used.values()
            for reference, version in noted
            if (gradient := reference()) is not None
        }
        found = gradients.capture_named(
            {
                name: parameter
                for name, parameter in self._named().items()
                if parameter.grad is not None
                and used.get(id(parameter.grad)) != parameter.grad._version
            }
        )
        return {"gradients": found} if found else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: if a gradient belongs to no parameter that is known here.
        """
        gradients.restore_named(state["gradients"], self._named())

    def _named(self) -> dict[str, torch.Tensor]:
        found = self._found()
        models = [(n, thing) for n, thing in found if isinstance(thing, torch.nn.Module)]
        return gradients.named(models, list(self._optimizers().items()))

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            name: thing for name, thing in self._found() if isinstance(thing, torch.optim.Optimizer)
        }

    def _found(self) -> list[tuple[str, Any]]:
        """Returns the models and optimizers that are known, by name, each once."""
        engine = self._engine()
        told = {} if engine is None else engine.objects
        found: list[tuple[str, Any]] = []
        seen: set[int] = set()
        for name, thing in [*_flat(told), *_flat(_referred_to(self._function))]:
            if id(thing) not in seen:
                seen.add(id(thing))
                found.append((name, thing))
        return found


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields models and optimizers, those in lists, tuples and dicts as well."""
    for name, value in values.items():
        if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
            yield name, value
        elif type(value) is dict:
            nested: dict[Any, Any] = value
            yield from _flat({f"{name}.{key}": item for key, item in nested.items()})
        elif type(value) in (list, tuple):
            items: Any = value
            yield from _flat({f"{name}.{place}": item for place, item in enumerate(items)})


def _referred_to(function: Any) -> dict[str, Any]:
    """Returns what a function's names stand for: closure, globals, and its object's attributes."""
    owner = getattr(function, "__self__", None)
    if owner is None and not inspect.isfunction(function):
        owner = function
    found: dict[str, Any] = dict(sorted(getattr(owner, "__dict__", {}).items()))
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        found |= {**names.globals, **names.nonlocals}
    return found
