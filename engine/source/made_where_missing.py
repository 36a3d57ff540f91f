"""What is made only where it is missing, and used after that: told by the source of functions.

    if self.mask is None:
        self.mask = torch.tril(torch.ones(n, n))
    return x * self.mask

A run that goes on without such a mask makes it anew before it is used, and does nothing else where
it does. So whatever is written only where it was found to be missing, by statements that write
nothing else, and is read nowhere before that, needs no checkpoint if it is made equal; that it is,
`made_again.py` measures. In doubt the answer is no.
"""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

import torch

from crosstrain.engine.guards import is_others
from crosstrain.engine.structure import RECORDED

from .functions import MAKING
from .makers import found_in, is_harmless, is_read_by_key_in
from .side_effects import draws, made_in
from .tree import KEPT, definition_of, name_of
from .uses import uses_of_self

_HOOK: Final = re.compile("^register_.*hook$")


def is_made_lazily(
    path: str, functions: Iterable[types.FunctionType], states: frozenset[str] = frozenset()
) -> bool:
    """Tells whether something is made where it is missing, and used nowhere before that.

    Args:
        path: where functions find it, such as `self.mask`: a variable, and attributes.
        functions: all that may use it.
        states: names of parameters and buffers, which are no such things.
    """
    codes = _codes_of(functions)
    made = False
    for index, name in enumerate(_names_in(path)):
        answer = _is_made(name, index == 0, codes, states)
        if answer is False:
            return False
        made |= answer is True
    return made


def is_read_by_key(path: str, functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether a mapping is only written to, and read by keys that have to be there.

    Begun without it, a run either writes a key before it reads it, or fails: it never goes on
    otherwise in silence. Such are the activations that a hook keeps for the step. The arguments are
    those of `is_made_lazily`.
    """
    *outer, name = _names_in(path)
    codes = _codes_of(functions)
    if any(_is_made(one, index == 0, codes) is not None for index, one in enumerate(outer)):
        return False
    return all(is_read_by_key_in(code, name, not outer) for code in codes)


def is_made_beside(owner: Any, name: str) -> bool:
    """Tells whether a number or a flag of a module says that something else there was made.

    What is made beside it lies in no state and is not recorded.
    """
    kind = type(owner)
    if not isinstance(owner, torch.nn.Module) or is_others(kind):
        return False
    states = frozenset((*owner._parameters, *owner._buffers, *owner._modules))
    codes = _codes_of(uses_of_self(kind, ["forward"])[1])
    if _is_made(name, False, codes, states) is not True:
        return False
    through = frozenset(one.name for one in (found_in(c, name, False) for c in codes) if one.spoils)
    beside = set[str]()
    for code in codes:
        makers = frozenset[str]() if code.co_name in through else through
        beside |= found_in(code, name, False, makers).beside - {name}
    return any(not isinstance(vars(owner).get(one), (*RECORDED, type(None))) for one in beside)


def _names_in(path: str) -> list[str]:
    return re.sub(r"\[.*?\]", "", path).split(".")


def _codes_of(functions: Iterable[types.FunctionType]) -> list[types.CodeType]:
    return list(
        dict.fromkeys(
            one.__code__
            for one in functions
            if one.__name__ not in MAKING and not _is_generated(one)
        )
    )


def _is_generated(function: types.FunctionType) -> bool:
    """Tells whether Python wrote a function for a data class, to compare or to show it."""
    return function.__code__.co_filename == "<string>" and function.__name__ in dir(object)


def _is_made(
    name: str,
    variable: bool,
    codes: Sequence[types.CodeType],
    states: frozenset[str] = frozenset(),
    within: frozenset[str] = frozenset(),
) -> bool | None:
    """Returns whether a name's writes all make it; None if nothing writes to it.

    What is written beside it has to be so, too, and to be none of the states, which a resume puts
    back and that would be written over.
    """
    found = [found_in(code, name, variable) for code in codes]
    # A function that makes it and does nothing else may be called where it is missing.
    through_found = [one for one in found if one.spoils]
    if through := frozenset(one.name for one in through_found):
        if not all(one.only_makes for one in found if one.spoils):
            return False
        kin = frozenset[str]().union(*(one.beside for one in found))
        found = [
            found_in(code, name, variable, through, kin)
            for code, one in zip(codes, found, strict=True)
            if not one.spoils
        ]
        if any(one.spoils for one in found):
            return False
    makers = {one.name for one in found if one.makes}
    if not makers:
        return False if through else None
    called = set[str]().union(*(one.calls for one in found if one.makes))
    if through - called or not all(
        is_harmless(code) for code in codes if code.co_name in called - makers - through
    ):
        return False
    within |= {name}
    beside = frozenset[str]().union(*(one.beside for one in (*found, *through_found))) - within
    if beside & states or any(
        _is_made(one, False, codes, states, within | beside) is False for one in beside
    ):
        return False
    if any(one.itself for one in found):
        # Whoever reads it makes it.
        return True
    return all(not one.reads_first or one.called_before & makers for one in found)


def hooks_are_made_lazily(functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether functions that register hooks do it before all else, where there are none."""
    return all(map(_hooks_first, _codes_of(functions)))


@lru_cache(maxsize=KEPT)
def _hooks_first(code: types.CodeType) -> bool:
    if not any(_HOOK.search(name) for name in code.co_names):
        return True
    own = definition_of(code)
    for one in [] if own is None else own.body:
        calls = [node for node in ast.walk(one) if isinstance(node, ast.Call)]
        if any(map(_is_hook, calls)):
            return isinstance(one, ast.If) and not one.orelse and _only_registers(one)
        if calls:
            return False
    return False


def _only_registers(test: ast.If) -> bool:
    """Tells whether what is done if a test holds does nothing else than register hooks."""
    made = made_in([test])
    for node in (node for one in test.body for node in ast.walk(one)):
        if isinstance(node, (ast.Return, ast.AugAssign, ast.Delete)):
            return False
        if isinstance(node, ast.Call) and not _is_hook(node) and draws(node, made):
            return False
        alone = node.value if isinstance(node, ast.Expr) else None
        if alone is not None and not (isinstance(alone, ast.Call) and _is_hook(alone)):
            return False
    return True


def _is_hook(call: ast.Call) -> bool:
    return _HOOK.search(name_of(call.func)) is not None
