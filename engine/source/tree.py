"""The source of a function as a syntax tree: the one place where source is read."""

from __future__ import annotations

import ast
import contextlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

#: How many functions' answers are kept: a library's model leads to thousands, at each look.
KEPT: Final = 1 << 15
#: What is around a node, the outermost first.
Above = tuple[ast.AST, ...]


@lru_cache(maxsize=256)
def syntax_tree(code: types.CodeType) -> ast.AST | None:
    """Returns the syntax tree of a function; None where there is no source, as of `exec`."""
    is_lambda = code.co_name == "<lambda>"
    if not is_lambda:
        with contextlib.suppress(SyntaxError):
            # To find the end of a function by its tokens takes many times as long.
            return ast.parse(textwrap.dedent(_lines_of(code)))
    try:
        source = textwrap.dedent(inspect.getsource(code))
    except (OSError, TypeError):
        return None
    # A lambda lies in the middle of a statement, whose lines may be no statement by themselves.
    start = source.find("lambda") if is_lambda else len(source)
    for text in (source, *(f"({source[start:end]})" for end in range(len(source), start, -1))):
        with contextlib.suppress(SyntaxError):
            tree = ast.parse(text)
            if not is_lambda:
                return tree
            inside = [one for one in ast.walk(tree) if isinstance(one, ast.Lambda)]
            if inside:
                return ast.Module([ast.Expr(one) for one in inside], [])
    return None


def _lines_of(code: types.CodeType) -> str:
    """Returns a function's source as far as its code goes.

    Raises:
        SyntaxError: if that is not known.
    """
    lines = linecache.getlines(code.co_filename)
    source = "".join(lines[code.co_firstlineno - 1 : _last_line(code)])
    if not source.lstrip().startswith(("def ", "async def ", "@")):
        raise SyntaxError
    return source


def _last_line(code: types.CodeType) -> int:
    ends = (place[1] for one in codes_in(code) for place in one.co_positions())
    return max((code.co_firstlineno, *(end for end in ends if end is not None)))


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields a function's code, and that of the functions inside."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from codes_in(one)


def definition_of(code: types.CodeType) -> ast.FunctionDef | None:
    """Returns the statement that defines a function; None where there is none, as for a lambda."""
    body: list[Any] = getattr(syntax_tree(code), "body", [])
    return body[0] if body and isinstance(body[0], ast.FunctionDef) else None


def nodes_in(tree: ast.AST, into_classes: bool = True) -> Iterator[tuple[ast.AST, Above]]:
    """Yields a node and all in it, in their order, with what is around each.

    Of a class this is all that is in it, or, if not `into_classes`, itself alone.
    """
    stack: list[tuple[ast.AST, Above]] = [(tree, ())]
    while stack:
        node, above = stack.pop()
        yield node, above
        if into_classes or not isinstance(node, ast.ClassDef):
            inner = (*above, node)
            stack.extend((child, inner) for child in reversed([*ast.iter_child_nodes(node)]))


def name_of(function: ast.AST) -> str:
    """Returns the last name of what is called, or of an attribute or a variable; "" if none."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def root_of(node: ast.AST) -> ast.AST:
    """Returns what attributes and items are taken of."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


@lru_cache(maxsize=KEPT)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Returns the names of globals and attributes in a function: a quick look at its code."""
    return frozenset(name for one in codes_in(code) for name in one.co_names)


@lru_cache(maxsize=KEPT)
def words_in(code: types.CodeType) -> frozenset[str]:
    """Returns these names, and what may be one, as in `getattr`: its strings."""
    constants = (word for one in codes_in(code) for word in one.co_consts)
    return names_in(code).union(word for word in constants if isinstance(word, str))
