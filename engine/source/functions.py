"""What a function of the user's is: in Python, what it wraps, and what its code names."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

from crosstrain.engine.guards import OTHER_PACKAGES, is_a, module_of

from .tree import names_in

#: What makes an object, before anything is missing of it.
MAKING: Final = frozenset({"__new__", "__init__", "__post_init__"})
_LAYERS: Final = 16
# Of which folders packages are installed into, their paths have one.
_INSTALLED: Final = ("site-packages", "dist-packages")
_NOTHING: Final[Mapping[str, Any]] = {}


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
