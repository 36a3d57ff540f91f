"""What functions and classes read of their variables and attributes, by their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Final, cast

from .unnamed import is_others

__all__ = ["attributes_read", "names_read", "names_read_of_state", "tree_of", "with_parents"]

# What changes a collection and does not look at it.
_WRITES: Final = frozenset(
    {"add", "append", "appendleft", "clear", "extend", "insert", "update", "write", "writerow"}
)
_SHOWS: Final = frozenset(
    {
        "add_scalar",
        "debug",
        "dumps",
        "error",
        "info",
        "log",
        "print",
        "set_description",
        "set_postfix",
        "warning",
        "write",
    }
)


def tree_of(thing: Any) -> ast.AST | None:
    """Returns the syntax tree of a function's code, or of a class; None where there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError, ValueError):
        # Typed in, made by exec, a lambda in the middle of a line.
        return None


@lru_cache(maxsize=256)
def _reads_of(code: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the variables that a function reads, and the attributes of `.state`."""
    tree = tree_of(code)
    if tree is None:
        return frozenset(), frozenset()
    names: set[str] = set()
    of_state: set[str] = set()
    for node, above in with_parents(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if _is_read(node, above):
                names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            inner = node.value
            of = inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", None)
            if of == "state" and _is_read(node, above):
                of_state.add(node.attr)
    return frozenset(names), frozenset(of_state)


def names_read(function: types.FunctionType) -> frozenset[str]:
    """Returns the variables that a function reads."""
    return _reads_of(function.__code__)[0]


def names_read_of_state(functions: Iterable[Any]) -> set[str]:
    """Returns the attributes that functions read of anything that is called `state`."""
    return {name for function in functions for name in _reads_of(function.__code__)[1]}


def attributes_read(kind: type, method: str | None = None) -> frozenset[str]:
    """Returns the attributes of its own object that a class reads.

    Args:
        kind: the class.
        method: the method that is called, with those of the object that it calls; all, by default.
    """
    reads = _reads_by_method(kind)
    if method not in reads:
        return frozenset().union(*reads.values())
    found: set[str] = set()
    left = [method]
    while left:
        for name in reads.get(left.pop(), frozenset()) - found:
            found.add(name)
            left.append(name)
    return frozenset(found)


@lru_cache(maxsize=256)
def _reads_by_method(kind: type) -> dict[str, frozenset[str]]:
    """Returns which attributes of its own object each method of a class reads."""
    found: dict[str, frozenset[str]] = {}
    for each in kind.__mro__:
        tree = None if is_others(each) or each is object else tree_of(each)
        if tree is None:
            continue
        for node, above in with_parents(tree):
            if isinstance(node, ast.FunctionDef):
                # It may read nothing.
                found.setdefault(node.name, frozenset())
            method = next((one.name for one in above if isinstance(one, ast.FunctionDef)), None)
            if (
                method is not None
                and isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and _is_read(node, above)
            ):
                found[method] = found.get(method, frozenset()) | {node.attr}
    return found


def with_parents(tree: ast.AST) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Yields each node of a tree, with what it lies in, from the outside."""
    stack: list[tuple[ast.AST, tuple[ast.AST, ...]]] = [(tree, ())]
    while stack:
        node, above = stack.pop()
        yield node, above
        inner = (*above, node)
        stack.extend((child, inner) for child in ast.iter_child_nodes(node))


def _is_read(node: ast.AST, above: tuple[ast.AST, ...]) -> bool:
    """Tells whether a value that is loaded is looked at: neither only written to, nor shown."""
    for parent in reversed(above):
        if isinstance(parent, ast.Call) and _called(parent.func) in _SHOWS:
            return False
        if isinstance(parent, ast.stmt):
            break
    for index in range(len(above) - 1, -1, -1):
        parent = above[index]
        if isinstance(parent, ast.Subscript) and parent.value is node:
            if not isinstance(parent.ctx, ast.Load):
                return False
            node = parent
        elif isinstance(parent, ast.Attribute) and parent.value is node:
            if not isinstance(parent.ctx, ast.Load):
                return False
            call, statement = (above[index - 1], above[index - 2]) if index > 1 else (None, None)
            if parent.attr in _WRITES and isinstance(call, ast.Call) and call.func is parent:
                # What it returns is thrown away: by a statement, or by a handler.
                return not isinstance(statement, (ast.Expr, ast.Lambda, ast.Tuple))
            node = parent
        else:
            return True
    return True


def _called(function: ast.expr) -> str | None:
    if isinstance(function, ast.Attribute):
        return function.attr
    return cast("str | None", getattr(function, "id", None))
