"""What functions do with their variables, and methods with their own object, by their source."""

from __future__ import annotations

import ast
import itertools
import types
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple

from crosstrain.engine.guards import is_others

from .functions import layers_of
from .tree import KEPT, Above, name_of, nodes_in, syntax_tree

#: What changes a collection and does not look at it.
WRITES: Final = frozenset(
    {"__setitem__", "add", "append", "appendleft", "clear", "extend", "insert", "update"}
) | {"write", "writerow"}
#: What shows what it is given.
SHOWS: Final = frozenset(
    {"add_scalar", "debug", "dumps", "error", "info", "log", "print", "set_description"}
) | {"set_postfix", "warning", "write"}
#: What does nothing but give a value: what goes in, comes out.
QUIET: Final = (
    frozenset({"abs", "bool", "clone", "copy", "cpu", "deepcopy", "detach", "dict", "float", "int"})
    | {"get", "item", "len", "list", "max", "mean", "min", "numpy", "round", "set", "sorted"}
    | {"state_dict", "str", "sum", "tolist", "tuple"}
)


class Use(NamedTuple):
    """What is done with a variable.

    Args:
        path: the attributes of it that lead to what is used; a call and its length are methods.
        read: whether that is looked at, and not only written to or shown.
        into: the variable of a collection, or another attribute of the same object, as
            `self.average`, that it ends in, if it is looked at for nothing else.
    """

    path: tuple[str, ...]
    read: bool
    into: str | None = None


class AttributeUse(NamedTuple):
    """What is done with an attribute.

    Args:
        base: the variable of which it is one; None: it is one of an expression's.
        of: the last word of what it is one of, such as `state`.
        use: what is done with it.
    """

    base: str | None
    of: str
    use: Use


ALL_OF_IT: Final = Use((), True)
#: Everything that a class does with its own attributes.
ALL: Final = frozenset({ALL_OF_IT})


@lru_cache(maxsize=KEPT)
def uses_of(code: types.CodeType) -> Mapping[str, frozenset[Use]] | None:
    """Returns what a function does with each of its variables; None where that is not known."""
    tree = syntax_tree(code)
    if tree is None:
        return None
    found: dict[str, set[Use]] = {}
    for node, above in nodes_in(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.setdefault(node.id, set()).add(_use(node, above))
    return {name: frozenset(uses) for name, uses in found.items()}


@lru_cache(maxsize=KEPT)
def attributes_used(code: types.CodeType) -> Mapping[str, frozenset[AttributeUse]]:
    """Returns what a function does with attributes, by their names, whatever object they are of.

    What is fetched by a name that stands in the source is an attribute, too: `getattr(x, "name")`,
    `vars(x)["name"]`, `x.__dict__["name"]`.
    """
    tree = syntax_tree(code)
    if tree is None:
        return {name: frozenset({AttributeUse(None, "", ALL_OF_IT)}) for name in code.co_names}
    found: dict[str, set[AttributeUse]] = {}
    aliases: dict[str, str] = {}
    for node, above in nodes_in(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            one = node.targets[0]
            if isinstance(one, ast.Name):
                aliases.setdefault(one.id, node.value.attr)
        owner, name = _attribute(node)
        if owner is not None and name is not None:
            base = owner.id if isinstance(owner, ast.Name) else None
            if base is not None and _is_self(base, above):
                continue
            of = owner.attr if isinstance(owner, ast.Attribute) else base or ""
            found.setdefault(name, set()).add(AttributeUse(base, of, _use(node, above)))
    return {
        name: frozenset(one._replace(of=aliases.get(one.of, one.of)) for one in uses)
        for name, uses in found.items()
    }


def _is_self(name: str, above: Above) -> bool:
    """Tells whether a variable is the object of a method of a class that is made in a function."""
    return any(
        isinstance(outer, ast.ClassDef)
        and isinstance(inner, ast.FunctionDef)
        and name in [one.arg for one in (*inner.args.posonlyargs, *inner.args.args)[:1]]
        for outer, inner in itertools.pairwise(above)
    )


def _attribute(node: ast.AST) -> tuple[ast.expr | None, str | None]:
    """Returns of which expression a node fetches an attribute, and that one's name."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return node.value, node.attr
    name: ast.expr | None = None
    owner: ast.expr | None = None
    if isinstance(node, ast.Call) and name_of(node.func) == "getattr" and len(node.args) > 1:
        owner, name = node.args[:2]
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        held, name = node.value, node.slice
        if isinstance(held, ast.Attribute) and held.attr == "__dict__":
            owner = held.value
        elif isinstance(held, ast.Call) and name_of(held.func) == "vars" and held.args:
            owner = held.args[0]
    text = name.value if isinstance(name, ast.Constant) else None
    return owner, text if isinstance(text, str) else None


def _use(node: ast.AST, above: Above) -> Use:
    path: list[str] = []
    end: ast.AST = node
    outer = list(above)
    while outer and isinstance(outer[-1], ast.Attribute):
        end = outer.pop()
        path.append(end.attr)  # type: ignore[attr-defined]
    parent = outer[-1] if outer else None
    if isinstance(parent, ast.Call):
        if parent.func is end:
            path.append("__call__")
        elif name_of(parent.func) == "len":
            path.append("__len__")
    if not _is_read(node, above):
        return Use(tuple(path), False)
    text = ast.unparse(end)
    into = _ends_in(end, tuple(outer))
    if into is not None and (text == into or text.startswith(f"{into}.")):
        return Use(tuple(path), False)
    base, _, own = (into or "").rpartition(".")
    of_itself = path and isinstance(node, ast.Name) and base == node.id and own.isidentifier()
    if into is None or not (into.isidentifier() or of_itself):
        return Use(tuple(path), True)
    return Use(tuple(path), False, into)


def _is_read(node: ast.AST, above: Above) -> bool:
    """Tells whether a value that is loaded is looked at: neither only written to, nor shown."""
    for index in range(len(above) - 1, -1, -1):
        parent = above[index]
        # Not what computes, and is only called alike: `math.log`.
        shows = isinstance(parent, ast.Call) and name_of(parent.func) in SHOWS
        if shows and is_thrown_away(above[:index]):
            return False
        if isinstance(parent, ast.stmt):
            break
    for index in range(len(above) - 1, -1, -1):
        parent = above[index]
        if isinstance(parent, (ast.Subscript, ast.Attribute)) and parent.value is node:
            if not isinstance(parent.ctx, ast.Load):
                return False
            call = above[index - 1] if index else None
            if isinstance(call, ast.Call) and written_by(call) is node:
                return not is_thrown_away(above[: index - 1])
            node = parent
        else:
            return True
    return True


def written_by(call: ast.Call) -> ast.AST | None:
    """Returns what a call writes to, if it does nothing else."""
    function = call.func
    writes = isinstance(function, ast.Attribute) and function.attr in WRITES
    return function.value if writes else None  # type: ignore[attr-defined]


def is_thrown_away(above: Above) -> bool:
    """Tells whether what a call returns is thrown away: by a statement, or by a handler."""
    outer = next((one for one in reversed(above) if not isinstance(one, ast.IfExp)), None)
    return isinstance(outer, (ast.Expr, ast.Lambda, ast.Tuple))


def _ends_in(node: ast.AST, above: Above) -> str | None:
    """Returns the collection, or the variable, that a value ends in, if it is used for no more."""
    for index in range(len(above) - 1, -1, -1):
        parent = above[index]
        if isinstance(parent, ast.Call):
            if (target := written_by(parent)) is not None:
                return ast.unparse(target) if is_thrown_away(above[:index]) else None
            if name_of(parent.func) not in QUIET:
                return None
        elif isinstance(parent, ast.IfExp) and not is_thrown_away(above[: index + 1]):
            calls = [one for one in ast.walk(parent) if isinstance(one, ast.Call)]
            if any(name_of(one.func) not in QUIET for one in calls):
                return None
        elif isinstance(parent, (ast.If, ast.IfExp)):
            if parent.test is not node:
                return None
            one, other = parent.body, parent.orelse
            parts = [*(one if isinstance(one, list) else [one])]
            parts += other if isinstance(other, list) else [other]
            targets = {target for part in parts for target in _targets(part)}
            return targets.pop() if len(targets) == 1 else None
        elif isinstance(parent, (ast.Assign, ast.AugAssign)):
            targets = set(_assigned(parent))
            return targets.pop() if len(targets) == 1 else None
        elif isinstance(parent, (ast.stmt, ast.comprehension, ast.Lambda, ast.NamedExpr)):
            return None
        node = parent
    return None


def _targets(part: ast.AST) -> list[str]:
    """Returns what a statement, or a part of one, writes to; "" among them: more than that."""
    if isinstance(part, (ast.Pass, ast.Constant)):
        return []
    if isinstance(part, ast.Expr):
        return _targets(part.value)
    calls = [one for one in ast.walk(part) if isinstance(one, ast.Call)]
    written = written_by(part) if isinstance(part, ast.Call) else None
    if any(name_of(one.func) not in QUIET for one in calls if one is not part):
        return [""]
    if written is not None:
        return [ast.unparse(written)]
    return _assigned(part) if isinstance(part, (ast.Assign, ast.AugAssign)) else [""]


def _assigned(part: ast.Assign | ast.AugAssign) -> list[str]:
    """Returns what a statement assigns to; "" for what has no name."""
    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
    return [
        ast.unparse(one.value if isinstance(one, ast.Subscript) else one)
        if isinstance(one, (ast.Subscript, ast.Name, ast.Attribute))
        else ""
        for one in targets
    ]


# ---------------------------------------------------------------------------------- of classes


def _methods_of(kind: type, name: str) -> list[types.FunctionType]:
    """Returns what a class and those that it derives from call by a name, if users wrote it."""
    found: list[types.FunctionType] = []
    for each in kind.__mro__:
        if each is object or is_others(each):
            continue
        found += layers_of(vars(each).get(name))
    return found


def uses_of_self(kind: type, names: Iterable[str]) -> tuple[set[Use], list[types.FunctionType]]:
    """Returns what methods do with their own object, and they and those of it that they call.

    Names that are no methods of its class are passed over.
    """
    found: set[Use] = set()
    functions: list[types.FunctionType] = []
    left, seen = list(names), set[str]()
    while left:
        if (name := left.pop()) in seen:
            continue
        seen.add(name)
        for function in _methods_of(kind, name):
            functions.append(function)
            uses = uses_of(function.__code__)
            itself = function.__code__.co_varnames[:1]
            own = ALL if uses is None else uses.get("".join(itself), ())
            found.update(own)
            left.extend(use.path[0] for use in own if use.path)
    return found, functions
