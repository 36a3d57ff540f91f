"""Which functions of the user's a run calls.

The step and the handlers are the beginning. What a `forward` of the user's or a hook does, what
collates samples, what a scheduler asks for its rate: a run calls all of these, and no state has
anything of what they refer to.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Final

from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from crosstrain.engine.data.attributes import owners_of
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import is_a, is_others, is_users_object, own_attributes
from crosstrain.engine.nests import is_module

#: The methods that data is fetched by.
FETCHES: Final = ("__getitem__", "__getitems__", "__iter__", "__call__")
# How far into nests functions are looked for, and among how many of each.
_NESTED: Final = 4
_MANY: Final = 64
#: What a checkpoint has by torch's own state of it, and nothing else.
TRAINED: Final = (Module, Optimizer)
#: The attributes that torch gives each of them.
TORCHS_OWN: Final = frozenset({*vars(Module()), "defaults", "param_groups", "state"})
_FUNCTIONS: Final = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    partial,
)
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
    """Returns the functions of the user's in modules and optimizers, by what to call them."""
    found: dict[str, Any] = {}
    for name, value in objects.items():
        if is_module(value):
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
        for name, held in (own_attributes(value) or {}).items()
        for number, one in enumerate(_leaves(held, _NESTED))
        if is_a(one, *_FUNCTIONS)
    }


def _leaves(nest: Any, depth: int) -> Iterator[Any]:
    """Yields what lists, tuples and dictionaries hold: of what is large, the beginning."""
    if type(nest) not in (list, tuple, dict) or depth == 0:
        yield nest
        return
    inside = nest.values() if type(nest) is dict else nest
    for one in itertools.islice(inside, _MANY):
        yield from _leaves(one, depth - 1)


def _hooks(owner: Any, where: str, kinds: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for attribute, called in kinds.items():
        hooks: Mapping[int, Any] | None = getattr(owner, attribute, None)
        for number, hook in enumerate(hooks.values() if hooks else ()):
            yield f"{called} of {where}" + (f", number {number + 1}" if number else ""), hook


def functions_of_data(data: Any) -> dict[str, Any]:
    """Returns the functions of the user's that data is fetched with, by what to call them."""
    found: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        for name in ("collate_fn", "worker_init_fn"):
            if inspect.isroutine(function := getattr(data, name, None)):
                found[f"the {name}"] = function
        if is_users_object(data):
            found["the loader's __iter__"] = data.__iter__
    elif inspect.isroutine(data):
        found["data"] = data
    for place, owner in parts_of_data(data):
        if not is_users_object(owner):
            continue
        for method in FETCHES:
            function = getattr(type(owner), method, None)
            if inspect.isfunction(function):
                found[f"the {place}'s {method}"] = function
        for own, value in (own_attributes(owner) or {}).items():
            if is_a(value, types.FunctionType, partial):
                found[f"the {place}'s .{own}"] = value
    return found


def parts_of_data(data: Any) -> Iterator[tuple[str, Any]]:
    """Yields the objects that data is fetched with, torch's own too, and what to call them."""
    owners = {"data": data}
    if isinstance(data, DataLoader):
        # One that is a DataLoader by name only, and wraps another, may have none of them.
        names = ("dataset", "collate_fn", "sampler", "batch_sampler")
        owners = {name: getattr(data, name, None) for name in names}
    seen: set[int] = set()
    for name, owner in owners.items():
        yield from owners_of(name, owner, seen=seen)


def functions_of_step(step: Any) -> Iterator[tuple[str, Any]]:
    """Yields the functions among the attributes of a step of ours, and among its options."""
    for name, value in attributes_of(step).items():
        if inspect.isroutine(value) or isinstance(value, (partial, Module)):
            yield name, value
        elif is_dataclass(value) and not isinstance(value, type):
            for item in fields(value):
                option = getattr(value, item.name)
                if inspect.isroutine(option) or isinstance(option, partial):
                    yield item.name, option
