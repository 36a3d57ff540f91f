"""What a function sets in any case, and whether those that read it have set it before.

    def forward(self, x):
        self.factors = self.net(x)
        return self.mix(x)

What `mix` reads there follows from nothing that was before. That it is so, the source has to show:
the value is set by a statement that is done in any case, and not by what it was. In doubt the
answer is no.
"""

from __future__ import annotations

import ast
import dis
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from crosstrain.engine.guards import is_others, module_of, own_attributes
from crosstrain.engine.nests import is_module
from crosstrain.engine.state import State

from .functions import layers_of, variables_of
from .tree import KEPT, codes_in, syntax_tree
from .uses import attributes_used

#: An object's attribute: whose, and its name.
Held = tuple[Any, str]

_LEAVES: Final = (ast.Return, ast.Raise, ast.Yield, ast.YieldFrom, ast.Await)
_LOADS: Final = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "DELETE_ATTR"})
# How far calls are followed from a function.
_DEPTH: Final = 4


def set_by(
    function: Any, given: Sequence[Any], named: Mapping[str, Any], depth: int = _DEPTH
) -> Iterator[Held]:
    """Yields the attributes that a call sets in any case; what is passed may be None: unknown."""
    layers = layers_of(function)
    if not layers or depth == 0 or not all(map(is_others, layers[:-1])):
        return
    # What torch's samplers are told is as plain as what users write.
    if is_others(layers[-1]) and not module_of(layers[-1]).startswith("torch.utils.data."):
        return
    plain, owner = layers[-1], getattr(function, "__self__", None)
    names = plain.__code__.co_varnames[: plain.__code__.co_argcount]
    values = given if owner is None else [owner, *given]
    known = _known_in(plain, {**dict(zip(names, values, strict=False)), **named})
    for statement in _surely_done(plain.__code__):
        yield from _set_in(statement, known, depth)


def _known_in(plain: types.FunctionType, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what variables of a function stand for, but for those that it sets itself."""
    known = {**variables_of(plain), **passed}
    return {name: known[name] for name in known.keys() - _stored_in(plain.__code__)}


def _set_in(statement: ast.stmt, known: Mapping[str, Any], depth: int) -> Iterator[Held]:
    """Yields the attributes that a statement sets, itself or by what it calls."""
    for target in _targets(statement):
        if (holder := _resolved(target.value, known)) is not None:
            yield holder, target.attr
    call = getattr(statement, "value", None)
    if isinstance(statement, ast.Expr) and isinstance(call, ast.Call):
        passed = [_resolved(one, known) for one in call.args]
        by_name = {str(one.arg): _resolved(one.value, known) for one in call.keywords}
        if "None" not in by_name and not any(isinstance(one, ast.Starred) for one in call.args):
            yield from set_by(_resolved(call.func, known), passed, by_name, depth - 1)


def _surely_done(code: types.CodeType) -> Iterator[ast.stmt]:
    """Yields the statements of a function that are done whenever it is called."""
    tree: Any = syntax_tree(code)
    # Of several lambdas in one statement, nobody knows which it is.
    (outer,) = body if len(body := getattr(tree, "body", [])) == 1 else [None]
    inner = outer.value if isinstance(outer, ast.Expr) else outer
    if isinstance(inner, ast.Lambda):
        yield ast.Expr(inner.body)
    for statement in inner.body if isinstance(inner, ast.FunctionDef) else ():
        yield statement
        if any(isinstance(one, _LEAVES) for one in ast.walk(statement)):
            return


@lru_cache(maxsize=KEPT)
def _stored_in(code: types.CodeType) -> frozenset[str]:
    """Returns the variables that a function sets itself."""
    inside = ast.walk(syntax_tree(code) or ast.Pass())
    return frozenset(
        one.id for one in inside if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load)
    )


def _targets(statement: ast.stmt) -> list[ast.Attribute]:
    """Returns the attributes that a statement sets, if it does no more."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    inside = [part for one in targets for part in getattr(one, "elts", [one])]
    return [one for one in inside if isinstance(one, ast.Attribute)]


def _resolved(node: ast.AST, known: Mapping[str, Any]) -> Any:
    """Returns what a variable, or an attribute of one, is now; None where that is not known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute) or (base := _resolved(node.value, known)) is None:
        return None
    own = own_attributes(base) or {}
    if node.attr in own:
        return own[node.attr]
    if is_module(base) and node.attr in base._modules:
        return base._modules[node.attr]
    method = inspect.getattr_static(type(base), node.attr, None)
    return types.MethodType(method, base) if inspect.isfunction(method) else None


# ------------------------------------------------------------------------------ what reads it


def may_read(function: types.FunctionType, held: Held) -> bool:
    """Tells whether a function loads an attribute of that name, and not of a state only."""
    code, (holder, name) = function.__code__, held
    if name not in _loaded(code):
        return False
    uses = attributes_used(code).get(name, ())
    # Such as `engine.state.epoch`, which is no sampler's.
    only = uses and name not in code.co_consts and all(one.of == "state" for one in uses)
    return isinstance(holder, State) or not only


@lru_cache(maxsize=KEPT)
def _loaded(code: types.CodeType) -> frozenset[str]:
    """Returns the attributes that a function loads, and its words, which may be names of some."""
    does = (one for each in codes_in(code) for one in dis.get_instructions(each))
    words = (one for each in codes_in(code) for one in each.co_consts if isinstance(one, str))
    return frozenset((*(one.argval for one in does if one.opname in _LOADS), *words))


def is_written_where_read(held: Held, functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether each function that reads an attribute has set it before, in any case."""
    found = [one for one in functions if may_read(one, held)]
    return bool(found) and all(_writes_first(one, held) for one in found)


def is_variable_set_first(held: Held, functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether each function that reads a variable has set it before, in any case."""
    holder, name = held
    found = [one.__code__ for one in functions if _reads_variable(one.__code__, name)]
    return holder is None and bool(found) and all(_sets_first(one, name) for one in found)


@lru_cache(maxsize=KEPT)
def _reads_variable(code: types.CodeType, name: str) -> bool:
    """Tells whether a function, or one in it, may read a variable that is not its own."""
    own = {*code.co_varnames, *code.co_cellvars}
    if name not in own and name in {*code.co_names, *code.co_freevars, *code.co_consts}:
        return True
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return name not in own and any(_reads_variable(one, name) for one in inner)


def _sets_first(code: types.CodeType, name: str) -> bool:
    for statement in _surely_done(code):
        changed = {id(one.target) for one in ast.walk(statement) if isinstance(one, ast.AugAssign)}
        inside = [one for one in ast.walk(statement) if isinstance(one, ast.Name)]
        loaded = (one for one in inside if id(one) in changed or isinstance(one.ctx, ast.Load))
        if any(one.id == name for one in loaded):
            return False
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        if any(isinstance(one, ast.Name) and one.id == name for one in targets):
            return True
    return False


def _writes_first(function: types.FunctionType, held: Held) -> bool:
    code, (holder, name) = function.__code__, held
    loads = _loads_of(code, name)
    if loads is None:
        return False
    known, stored = _known_in(function, {}), _stored_in(code)
    for statement in _surely_done(code):
        end = statement.end_lineno or 0, statement.end_col_offset or 0
        if any((one.lineno, one.col_offset) < end for one in loads):
            return False
        if any(one is holder and own == name for one, own in _set_in(statement, known, _DEPTH)):
            return True
        # Of whichever object: it is read of the same one, such as `self`.
        bases = {ast.unparse(one.value) for one in _targets(statement) if one.attr == name}
        if bases & set(code.co_varnames) - stored >= {ast.unparse(one.value) for one in loads}:
            return bool(bases)
    return False


@lru_cache(maxsize=KEPT)
def _loads_of(code: types.CodeType, name: str) -> list[ast.Attribute] | None:
    """Returns where a function loads an attribute; None where that is not known."""
    tree = syntax_tree(code)
    if tree is None or name in code.co_consts:
        return None
    inside = [*ast.walk(tree)]
    called = {id(one.func) for one in inside if isinstance(one, ast.Call)}
    return [
        one
        for one in inside
        if isinstance(one, ast.Attribute)
        and one.attr == name
        and not isinstance(one.ctx, ast.Store)
        and id(one) not in called
    ]
