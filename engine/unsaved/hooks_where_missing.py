"""Hooks that a first step registers where there are none, before it computes: by its source."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from .made_where_missing import MAKING
from .side_effects import draws, made_in, name_of
from .uses_in_source import syntax_tree

_HOOK: Final = re.compile("^register_.*hook$")


def hooks_are_made_lazily(functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether functions that register hooks do it before all else, where there are none.

    Args:
        functions: all that may register some.
    """
    codes = {one.__code__ for one in functions if one.__name__ not in MAKING}
    return all(map(_hooks_first, codes))


@lru_cache(maxsize=1 << 15)
def _hooks_first(code: types.CodeType) -> bool:
    if not any(_HOOK.search(name) for name in code.co_names):
        return True
    body = getattr(syntax_tree(code), "body", [None])
    statements: list[ast.stmt] = getattr(body[0] if body else None, "body", [])
    for one in statements:
        if any(isinstance(node, ast.Call) and _is_hook(node) for node in ast.walk(one)):
            made = made_in([one])
            inside = [node for part in getattr(one, "body", []) for node in ast.walk(part)]
            if not isinstance(one, ast.If) or one.orelse:
                return False
            if any(isinstance(node, (ast.Return, ast.AugAssign, ast.Delete)) for node in inside):
                return False
            return all(
                not isinstance(node, ast.Call) or _is_hook(node) or not draws(node, made)
                for node in inside
            ) and all(
                not isinstance(node, ast.Expr)
                or (isinstance(node.value, ast.Call) and _is_hook(node.value))
                for node in inside
            )
        if any(isinstance(node, ast.Call) for node in ast.walk(one)):
            return False
    return False


def _is_hook(call: ast.Call) -> bool:
    return _HOOK.search(name_of(call.func)) is not None
