"""Whether statements write to anything else, or draw: told by their syntax alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .tree import name_of, root_of

_SAYS: Final = frozenset({"debug", "info", "log", "print", "warn", "warning", "register_buffer"})
_MAKERS: Final = frozenset({"F", "collections", "itertools", "math", "np", "numpy", "torch"})
# What draws from a generator that all share, or sets one, or does a training's work.
_DRAWS: Final = re.compile(
    "bernoulli|choice|dropout|exponential|multinomial|normal|perm|poisson|rand|sample|seed|shuffle"
    "|uniform|rng|^step$|zero_grad|backward|load_state|^next$|^apply$|^exec$|^eval$|setattr|delattr"
)
# Made with a state of their own, they draw from nothing else.
_OWN_DRAWS: Final = frozenset({"default_rng", "RandomState"})


def is_in_place(name: str) -> bool:
    """Tells whether a method is named as those that change a tensor."""
    return name.endswith("_") and not name.endswith("__")


def calls_in(statements: Iterable[ast.AST]) -> set[str]:
    """Returns the last names of what statements call."""
    inside = (node for one in statements for node in ast.walk(one))
    return {name_of(node.func) for node in inside if isinstance(node, ast.Call)}


def made_in(statements: Iterable[ast.AST]) -> set[str]:
    """Returns the local variables that statements set to what they make."""
    return {
        target.id
        for one in statements
        for node in ast.walk(one)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.comprehension))
        for targets in [node.targets if isinstance(node, ast.Assign) else [node.target]]
        for each in targets
        for target in ast.walk(each)
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    }


def fresh_in(statements: Sequence[ast.AST]) -> set[str]:
    """Returns the local variables that hold nothing but what statements have made themselves.

    What is taken of something else, such as `weight = self.weight`, is not theirs to change.
    """
    found: set[str] = set()
    inside = [node for one in statements for node in ast.walk(one)]
    for _ in range(2):
        for node in inside:
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {one.id for one in targets if isinstance(one, ast.Name)}
                if _is_fresh(node.value, found):
                    found |= names
    return found


def _is_fresh(value: ast.AST | None, fresh: set[str]) -> bool:
    if isinstance(value, ast.Call):
        root = root_of(value.func)
        if isinstance(root, ast.Call):
            return _is_fresh(root, fresh)
        plain = isinstance(value.func, ast.Name)
        return plain or (isinstance(root, ast.Name) and root.id in _MAKERS | fresh)
    return not isinstance(value, (ast.Name, ast.Attribute, ast.Subscript, ast.IfExp, ast.BoolOp))


def does_nothing(
    node: ast.AST,
    made: set[str],
    holders: set[str],
    is_itself: Callable[[ast.AST], bool],
    through: frozenset[str] = frozenset(),
) -> bool:
    """Tells whether a statement writes to nothing but what is made, and draws nothing.

    Args:
        node: the statement.
        made: local variables that hold what is made.
        holders: what it may write to beside, such as a size to `self`.
        is_itself: tells whether a node is what is made.
        through: functions that make it.
    """
    for one in ast.walk(node):
        if isinstance(one, (ast.Await, ast.Yield, ast.YieldFrom, ast.Delete)):
            return False
        if isinstance(one, ast.Call) and draws(one, made):
            return False
        if isinstance(one, ast.Expr) and not _is_quiet(one.value, made, is_itself, through):
            return False
        if isinstance(one, ast.AugAssign):
            root = root_of(one.target)
            if not (isinstance(root, ast.Name) and root.id in made):
                return False
        if isinstance(one, (ast.Attribute, ast.Subscript)) and isinstance(one.ctx, ast.Store):
            root = root_of(one)
            name = root.id if isinstance(root, ast.Name) else ""
            beside = isinstance(one, ast.Attribute) and one.value is root and name in holders
            if not (is_itself(one) or beside or name in made):
                return False
    return True


def _is_quiet(
    value: ast.AST, made: set[str], is_itself: Callable[[ast.AST], bool], through: frozenset[str]
) -> bool:
    """Tells whether an expression that stands alone writes to nothing but what is made."""
    if isinstance(value, ast.Constant):
        return True
    if not isinstance(value, ast.Call):
        return False
    if name_of(value.func) in _SAYS or name_of(value.func) in through:
        return True
    root = root_of(value.func)
    itself = isinstance(value.func, ast.Attribute) and is_itself(value.func.value)
    return itself or (isinstance(root, ast.Name) and root.id in made)


def is_nothing(value: ast.AST | None) -> bool:
    """Tells whether an expression is missing, or None."""
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def returns_nothing(body: Iterable[ast.AST]) -> bool:
    """Tells whether statements return nothing."""
    inside = (node for one in body for node in ast.walk(one))
    return all(is_nothing(one.value) for one in inside if isinstance(one, ast.Return))


def draws(call: ast.Call, made: set[str]) -> bool:
    """Tells whether a call may draw from, or set, a generator that others use."""
    name = name_of(call.func)
    if name in _OWN_DRAWS or not _DRAWS.search(name):
        return False
    if any(one.arg == "generator" for one in call.keywords):
        return False
    root = root_of(call.func)
    own = isinstance(root, ast.Call) or (isinstance(root, ast.Name) and root.id in made)
    return not (own and isinstance(call.func, ast.Attribute))
