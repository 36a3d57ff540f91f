"""Which functions of the user's a run calls, and what each is made of.

The step and the handlers are the beginning. What a `forward` of the user's or a hook does, what
collates samples, what a scheduler asks for its rate: a run calls all of these, and no state has
anything of what they refer to.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from typing import Any, Final

from torch.nn import Module
from torch.nn.modules import module as torch_module
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from crosstrain.engine.data.attributes import owners_of
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.guards import (
    OTHER_PACKAGES,
    is_a,
    is_others,
    is_users_object,
    module_of,
    own_attributes,
)
from crosstrain.engine.nests import is_module

from .source import names_in

#: The methods that data is fetched by.
FETCHES: Final = ("__getitem__", "__getitems__", "__iter__", "__call__")
# How far into nests functions are looked for, and among how many of each.
_NESTED: Final = 4
_MANY: Final = 64
#: What a checkpoint has by torch's own state of it, and nothing else.
TRAINED: Final = (Module, Optimizer)
#: The attributes that torch gives each of them.
TORCHS_OWN: Final = frozenset({*vars(Module()), "defaults", "param_groups", "state"})
#: What makes an object, before anything is missing of it.
MAKING: Final = frozenset({"__new__", "__init__", "__post_init__"})
_FUNCTIONS: Final = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    partial,
)
_LAYERS: Final = 16
# Of which folders packages are installed into, their paths have one.
_INSTALLED: Final = ("site-packages", "dist-packages")
_NOTHING: Final[Mapping[str, Any]] = {}
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


# ----------------------------------------------------------------------------------------- of a run


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


# ------------------------------------------------------------------------------------ of a function


def is_installed(space: Mapping[str, Any]) -> bool:
    """Tells whether the variables of a module are those of an installed package."""
    place = space.get("__file__")
    return isinstance(place, str) and any(folder in place for folder in _INSTALLED)


def is_users_file(value: Any) -> bool:
    """Tells whether a value is a module of Python's that the user wrote: a file, not installed."""
    if not is_a(value, types.ModuleType):
        return False
    own = vars(value)
    name = own.get("__name__")
    # A notebook has no file.
    place = "" if name == "__main__" else own.get("__file__")
    if not isinstance(name, str) or not isinstance(place, str) or is_installed(own):
        return False
    root = name.partition(".")[0]
    return root not in OTHER_PACKAGES and root not in sys.stdlib_module_names


def layers_of(function: Any) -> list[types.FunctionType]:
    """Returns what a function is in Python: itself, and the functions that it wraps."""
    found: list[types.FunctionType] = []
    while function is not None and len(found) < _LAYERS:
        if isinstance(function, property):
            found += layers_of(function.fset)
            function = function.fget
        elif isinstance(function, cached_property):
            function = function.func
        function = getattr(function, "__func__", function)
        if isinstance(function, types.FunctionType):
            found.append(function)
        function = getattr(function, "__dict__", _NOTHING).get("__wrapped__")
    return found


def methods_in(kind: type) -> dict[str, Any]:
    """Returns what a class of the user's own files, and those it derives from, can be asked to do.

    By name; a property is what it calls.
    """
    return {
        name: layers_of(one)[0]
        for each in reversed(kind.__mro__)
        if is_users_file(sys.modules.get(module_of(each)))
        for name, one in vars(each).items()
        if layers_of(one)
    }


def variables_of(function: types.FunctionType) -> dict[str, Any]:
    """Returns what a function's code names: defaults, the closure's variables and globals.

    Globals of an installed package are its registries and caches, and no matter of a run.
    """
    code, values = function.__code__, function.__defaults__ or ()
    # A default is one object for all calls.
    first = code.co_argcount - len(values)
    defaults = zip(code.co_varnames[first : code.co_argcount], values, strict=True)
    found = {**dict(defaults), **(function.__kwdefaults__ or {})}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        # `super()` finds its class by the first; a cell may not be set yet.
        if name != "__class__":
            with contextlib.suppress(ValueError):
                found[name] = cell.cell_contents
    names = {*names_in(code)}
    if is_installed(function.__globals__):
        return found
    if "globals" in names:
        names |= {one for one in code.co_consts if isinstance(one, str)}
    return found | {
        name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())
    }
