"""The user's functions in what is trained: forward, step, hooks.

A checkpoint has the states of models and optimizers. What a `forward` of the user's, or a hook of a
module, a parameter or an optimizer, counts, draws from or keeps elsewhere is in none of them.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final

from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer

from crosstrain.engine.guards import is_others

# How far into nests functions are looked for, and among how many of each.
_NESTED: Final = 4
_MANY: Final = 64
# By which of its methods a module says what its state is.
_STATES: Final = ("state_dict", "get_extra_state", "_save_to_state_dict")
# Where hooks are kept, and what to call them.
_OF_MODULES: Final = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_OF_TENSORS: Final = {
    "_backward_hooks": "a hook",
    "_post_accumulate_grad_hooks": "a hook after its gradient",
}
_OF_OPTIMIZERS: Final = {
    "_optimizer_step_pre_hooks": "a step pre-hook",
    "_optimizer_step_post_hooks": "a step post-hook",
}
# What is called for all of them, whichever they are.
_OF_ALL: Final = {
    "modules": (
        torch_module,
        {f"_global{attribute}": called for attribute, called in _OF_MODULES.items()},
    ),
    "optimizers": (
        sys.modules[Optimizer.__module__],
        {
            "_global_optimizer_pre_hooks": "a step pre-hook",
            "_global_optimizer_post_hooks": "a step post-hook",
        },
    ),
}


def functions_of_trained(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the functions of the user's in some objects, by what to call them.

    Args:
        objects: modules and optimizers, by name.
    """
    found: dict[str, Any] = {}
    for name, value in objects.items():
        if isinstance(value, Module):
            for path, module in value.named_modules():
                where = f"{name}.{path}" if path else name
                found.update(_hooks(module, where, _OF_MODULES))
                if not is_others(type(module)) or "forward" in vars(module):
                    found[f"the forward of {where}"] = module.forward
                for own, parameter in module._parameters.items():
                    found.update(_hooks(parameter, f"{where}.{own}", _OF_TENSORS))
        elif isinstance(value, Optimizer):
            found.update(_hooks(value, name, _OF_OPTIMIZERS))
            if not is_others(type(value)) or "step" in vars(value):
                found[f"the step of {name}"] = value.step
    return found


def hooks_of_all() -> dict[str, Any]:
    """Returns the hooks of all modules and of all optimizers, by what to call them."""
    return {
        called: hook
        for where, (owner, kinds) in _OF_ALL.items()
        for called, hook in _hooks(owner, f"all {where}", kinds)
    }


def functions_held(value: Any) -> dict[str, Any]:
    """Returns the functions among an object's attributes, such as those of a `LambdaLR`.

    A state has no functions, and so nothing of what they refer to.
    """
    return {
        f"the {name} of {type(value).__name__}, number {number + 1}": one
        for name, held in getattr(value, "__dict__", {}).items()
        for number, one in enumerate(_leaves(held, _NESTED))
        if inspect.isroutine(one) or isinstance(one, partial)
    }


def _leaves(nest: Any, depth: int) -> Iterator[Any]:
    """Yields what lists, tuples and dictionaries hold: of what is large, the beginning."""
    if type(nest) not in (list, tuple, dict) or depth == 0:
        yield nest
        return
    inside = nest.values() if isinstance(nest, dict) else nest
    for one in itertools.islice(inside, _MANY):
        yield from _leaves(one, depth - 1)


def holders_of_state(value: Any) -> list[Any]:
    """Returns the objects whose attributes may be a part of a named object's state.

    A module's state has its parameters, its buffers and its modules', and an optimizer's what torch
    has in it, unless a class says more.
    """
    if isinstance(value, Optimizer):
        return [] if type(value).state_dict is Optimizer.state_dict else [value]
    if not isinstance(value, Module):
        return [value]
    return [
        one
        for one in value.modules()
        if any(getattr(type(one), name) is not getattr(Module, name) for name in _STATES)
    ]


def _hooks(owner: Any, where: str, kinds: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for attribute, called in kinds.items():
        hooks: Mapping[int, Any] | None = getattr(owner, attribute, None)
        for number, hook in enumerate(hooks.values() if hooks else ()):
            yield f"{called} of {where}" + (f", number {number + 1}" if number else ""), hook
