"""What is made lazily: by its source, something that is made where it is missing, and used after.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from .reads import WRITES, syntax_tree

_MAKING: Final = frozenset({"__new__", "__init__", "__post_init__"})
# What changes a collection and depends on what it holds, or takes something away.
_CHANGES: Final = WRITES | {
    "difference_update",
    "discard",
    "intersection_update",
    "pop",
    "popitem",
    "popleft",
    "remove",
    "resize",
    "reverse",
    "rotate",
    "sort",
    "symmetric_difference_update",
}
_SAYS: Final = frozenset({"debug", "info", "log", "print", "warn", "warning", "register_buffer"})
_SIZES: Final = frozenset({"device", "dtype", "len", "ndim", "numel", "shape", "size"})
# What draws from a generator that all share, or sets one, or does a training's work.
_DRAWS: Final = re.compile(
    "bernoulli|choice|dropout|exponential|multinomial|normal|perm|poisson|rand|sample|seed|shuffle"
    "|uniform|rng|^step$|zero_grad|backward|load|^next$|^apply$|^exec$|^eval$|setattr|delattr"
)
_HOOK: Final = re.compile("^register_.*hook$")
# Made with a state of their own, they draw from nothing else.
_OWN_DRAWS: Final = frozenset({"default_rng", "RandomState"})
_Above = tuple[ast.AST, ...]
_CONTROL: Final = (ast.If, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.IfExp)
_COPIES: Final = frozenset({"__getitem__", "get", "getattr"})


def is_made_lazily(path: str, functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether something is made where it is missing, and used nowhere before that.

    Args:
        path: where functions find it, such as `self.mask`: a variable, and attributes.
        functions: all that may use it.
    """
    codes = [one.__code__ for one in functions if one.__name__ not in _MAKING]
    made = False
    for index, name in enumerate(re.sub(r"\[.*?\]", "", path).split(".")):
        answer = _is_made(name, index == 0, codes)
        if answer is False:
            return False
        made |= answer is True
    return made


def hooks_are_made_lazily(functions: Iterable[types.FunctionType]) -> bool:
    """Tells whether functions that register hooks do it before all else, where there are none.

    Args:
        functions: all that may register some.
    """
    codes = {one.__code__ for one in functions if one.__name__ not in _MAKING}
    return all(map(_hooks_first, codes))


@lru_cache(maxsize=1 << 15)
def _hooks_first(code: types.CodeType) -> bool:
    if not any(_HOOK.search(name) for name in code.co_names):
        return True
    body = getattr(syntax_tree(code), "body", [None])
    statements: list[ast.stmt] = getattr(body[0] if body else None, "body", [])
    for one in statements:
        if any(isinstance(node, ast.Call) and _is_hook(node) for node in ast.walk(one)):
            made = _made_in([one])
            inside = [node for part in getattr(one, "body", []) for node in ast.walk(part)]
            if not isinstance(one, ast.If) or one.orelse:
                return False
            if any(isinstance(node, (ast.Return, ast.AugAssign, ast.Delete)) for node in inside):
                return False
            return all(
                not isinstance(node, ast.Call) or _is_hook(node) or not _draws(node, made)
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
    return _HOOK.search(_last(call.func)) is not None


def _is_made(name: str, variable: bool, codes: Sequence[types.CodeType]) -> bool | None:
    """Returns whether a name's writes all make it; None if nothing writes to it."""
    codes = list(dict.fromkeys(codes))
    found = [_of(code, name, variable) for code in codes]
    # A function that makes it and does nothing else may be called where it is missing.
    if through := frozenset(one.name for one in found if one.spoils):
        if not all(one.only_makes for one in found if one.spoils):
            return False
        found = [
            _of(code, name, variable, through)
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
        _is_harmless(code) for code in codes if code.co_name in called - makers - through
    ):
        return False
    if any(one.itself for one in found):
        # Whoever reads it makes it.
        return True
    return all(not one.reads_first or one.called_before & makers for one in found)


@dataclass
class _Found:
    """What one function does with a name.

    Args:
        name: the function's.
        makes: whether it makes it.
        spoils: whether it writes to it in any other way.
        only_makes: whether it does that, and nothing else.
        itself: whether it is a property that is kept, of that name.
        reads_first: whether it reads it before it has made it, or without that.
        called_before: the functions that it calls before it does.
        calls: those that it calls where it makes it.
    """

    name: str
    makes: bool = False
    spoils: bool = False
    only_makes: bool = False
    itself: bool = False
    reads_first: bool = False
    called_before: set[str] = field(default_factory=set[str])
    calls: set[str] = field(default_factory=set[str])


@lru_cache(maxsize=1 << 15)
def _of(
    code: types.CodeType, name: str, variable: bool, through: frozenset[str] = frozenset()
) -> _Found:
    found = _Found(code.co_name)
    if not any(_mentions_by_name(code, one) for one in (name, *through)):
        return found
    tree = syntax_tree(code)
    if tree is None:
        found.spoils = True
        return found
    if _is_cached_property(tree, name):
        found.makes = found.itself = True
        found.spoils = not _is_harmless(code)
        return found
    if variable and (name in code.co_varnames or name == "object"):
        return found
    _Places(tree, name, variable, through).judge(found)
    return found


def _mentions_by_name(code: types.CodeType, name: str) -> bool:
    names = {*code.co_names, *code.co_freevars, *code.co_cellvars, code.co_name, *code.co_consts}
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return name in names or any(_mentions_by_name(one, name) for one in inner)


def _is_cached_property(tree: ast.AST, name: str) -> bool:
    body = getattr(tree, "body", [None])
    first: Any = body[0] if body else None
    return (
        isinstance(first, ast.FunctionDef)
        and first.name == name
        and any(ast.unparse(one).endswith("cached_property") for one in first.decorator_list)
    )


class _Places:
    """The places of a function's source where it mentions a name."""

    def __init__(
        self, tree: ast.AST, name: str, variable: bool, through: frozenset[str] = frozenset()
    ) -> None:
        self._tree, self._name, self._variable, self._through = tree, name, variable, through
        self._nodes = sorted(_in_order(tree, ()), key=_position)
        self._aliases = {
            target.id
            for node, _ in self._nodes
            if isinstance(node, ast.Assign) and self._is_copy(node.value)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        # What holds it, by one name, such as `self`.
        self._holders = {
            node.value.id
            for node, _ in self._nodes
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (self._is_mention(node) or node.attr in through)
        }

    def judge(self, found: _Found) -> None:
        """Notes what the function does with it."""
        writes = [place for place in self._nodes if self._writes(*place)]
        found.makes = bool(writes)
        regions: list[_Region] = []
        for node, above in writes:
            region = self._region_of(node, above)
            if region is None:
                found.spoils = True
                body: list[ast.stmt] = getattr(getattr(self._tree, "body", [None])[0], "body", [])
                found.only_makes = bool(body) and self._is_alone(body) and _returns_nothing(body)
                return
            regions.append(region)
            found.calls |= _calls_in(region.statements)
        asked = {
            one.id for each in regions for one in ast.walk(each.asks) if isinstance(one, ast.Name)
        }
        for node, above in self._nodes:
            if not self._is_mention(node) or any(one.has(node, above) for one in regions):
                continue
            statement = next((one for one in reversed(above) if isinstance(one, ast.stmt)), None)
            if isinstance(statement, ast.Assign) and self._is_copy(statement.value):
                targets = {ast.unparse(one) for one in statement.targets}
                if targets <= asked & self._aliases:
                    # It is looked at no sooner than where it is asked for.
                    continue
            if not any(one.comes_before(node, above) for one in regions):
                found.reads_first = True
                found.called_before = {
                    _last(call.func)
                    for call, _ in self._nodes
                    if isinstance(call, ast.Call) and _position((call, ())) < _position((node, ()))
                }
                return

    def _is_mention(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id == self._name and self._variable
        if isinstance(node, ast.Attribute):
            return node.attr == self._name and not self._variable
        return isinstance(node, ast.Constant) and node.value == self._name and not self._variable

    def _mentions(self, node: ast.AST, aliases: bool = False) -> bool:
        return any(
            self._is_mention(one)
            or (aliases and isinstance(one, ast.Name) and one.id in self._aliases)
            for one in ast.walk(node)
        )

    def _is_copy(self, value: ast.AST) -> bool:
        """Tells whether a value is the thing itself, or what it holds under some key."""
        if isinstance(value, ast.Call):
            return _last(value.func) in _COPIES and self._mentions(value)
        if isinstance(value, ast.Subscript):
            value = value.value
        return self._is_mention(value)

    def _writes(self, node: ast.AST, above: _Above) -> bool:
        """Tells whether a node is where it is written to, in whichever way."""
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and self._is_itself(function.value):
                own = function.attr
                return own in _CHANGES or own == "setdefault" or _is_in_place(own)
            if _last(function) in self._through:
                return True
            return _last(function) in ("setattr", "delattr") and self._mentions(node)
        if not self._is_mention(node) or isinstance(node, ast.Constant):
            return False
        inner = node
        for parent in reversed(above):
            if not (isinstance(parent, ast.Subscript) and parent.value is inner):
                break
            inner = parent
        return not isinstance(getattr(inner, "ctx", ast.Load()), ast.Load)

    def _is_itself(self, node: ast.AST) -> bool:
        while isinstance(node, ast.Subscript):
            node = node.value
        return self._is_mention(node)

    def _region_of(self, node: ast.AST, above: _Above) -> _Region | None:
        """Returns where it is made, if it is made there as it was missing, and nothing else is."""
        statement = next((one for one in reversed(above) if isinstance(one, ast.stmt)), None)
        by_call = isinstance(node, ast.Call) and _last(node.func) in self._through
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not by_call:
            if node.func.attr == "setdefault":
                alone = self._is_alone([node])
                return _Region([node], node, above, node) if alone else None
            if node.func.attr in _CHANGES - WRITES:
                return None
        elif isinstance(statement, ast.Assign) and self._keeps_its_own(statement.value):
            if not self._is_alone([statement]):
                return None
            return _Region([statement], statement, above[: above.index(statement)], statement.value)
        elif not isinstance(statement, (ast.Assign, ast.AnnAssign, *[ast.Expr] * by_call)):
            return None
        inside = isinstance(node, ast.Call) and not by_call
        whole = not inside and not isinstance(above[-1], ast.Subscript)
        value = getattr(statement, "value", None)
        if not isinstance(node, ast.Call) and value is not None and self._mentions(value):
            return None
        for region, missing in self._regions(above):
            if (missing or whole) and self._is_alone(region.statements) and self._ends(region):
                return region
        return None

    def _keeps_its_own(self, value: ast.AST) -> bool:
        """Tells whether a value is the thing itself unless that is missing."""
        if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.Or):
            return self._is_mention(value.values[0])
        if isinstance(value, ast.IfExp):
            says = self._says_missing(value.test)
            kept = {1: value.orelse, -1: value.body}.get(says or 0)
            return kept is not None and self._is_mention(kept)
        return False

    def _regions(self, above: _Above) -> Iterator[tuple[_Region, bool]]:
        """Yields what is done because it was missing or of another size, and whether missing."""
        for index in range(len(above) - 1, -1, -1):
            one, inner = above[index], above[index + 1] if index + 1 < len(above) else None
            if isinstance(one, ast.If) and (says := self._says_missing(one.test)) is not None:
                for branch, other, wrong in ((one.body, one.orelse, -1), (one.orelse, one.body, 1)):
                    if inner in branch and says != wrong and not any(map(self._mentions, other)):
                        region = _Region([*branch, *other], one, above[:index], one.test)
                        yield region, says != 0
            if isinstance(one, ast.ExceptHandler) and index:
                tried = above[index - 1]
                if isinstance(tried, ast.Try) and any(map(self._mentions, tried.body)):
                    region = _Region([*tried.body, *one.body], tried, above[: index - 1], tried)
                    region.returns = True
                    yield region, True
            for block in (getattr(one, "body", None), getattr(one, "orelse", None)):
                if isinstance(block, list) and inner in block:
                    yield from self._after_exits(block, inner, above[: index + 1])

    def _after_exits(
        self, block: list[Any], inner: Any, above: _Above
    ) -> Iterator[tuple[_Region, bool]]:
        """Yields what follows a test for it in a block that ends where it is there."""
        for place, one in enumerate(block[: block.index(inner)]):
            if not isinstance(one, ast.If) or one.orelse or len(one.body) != 1:
                continue
            says, leaves = self._says_missing(one.test), one.body[0]
            if says in (-1, 0) and isinstance(leaves, (ast.Return, ast.Continue)):
                rest = [leaves, *block[place + 1 :]]
                yield _Region(rest, one, above, one.test, returns=True), says != 0

    def _ends(self, region: _Region) -> bool:
        """Tells whether what follows is the same, whether or not it had to be made."""
        inside = [node for one in region.statements for node in ast.walk(one)]
        if region.returns:
            returned = [one.value for one in inside if isinstance(one, ast.Return)]
            made = _made_in(region.statements) | self._aliases
            return all(map(_is_nothing, returned)) or all(
                one is not None and self._gives_it(one, made) for one in returned
            )
        if any(isinstance(one, (ast.Return, ast.Break, ast.Continue)) for one in inside):
            return False
        # What it has made under other names is not looked at where nothing was made.
        local = _made_in(region.statements) - ({self._name} if self._variable else set())
        asked = {one.id for one in ast.walk(region.asks) if isinstance(one, ast.Name)}
        if asked & self._aliases - local:
            return False
        return not any(
            isinstance(node, ast.Name)
            and node.id in local - self._aliases
            and not region.has(node, above)
            for node, above in self._nodes
        )

    def _gives_it(self, value: ast.AST, made: set[str]) -> bool:
        """Tells whether what is returned is what was made, or a part of it."""
        if isinstance(value, ast.Tuple):
            return all(self._gives_it(one, made) for one in value.elts)
        while isinstance(value, ast.Subscript):
            value = value.value
        if isinstance(value, ast.Name) and value.id in made:
            return True
        beside = isinstance(value, ast.Attribute) and _root(value) is value.value
        return self._is_copy(value) or beside

    def _says_missing(self, test: ast.AST) -> int | None:
        """Returns what a test that holds says of it.

        1: it is missing; -1: it is there; 0: its size. None: it asks for something else.
        """
        if isinstance(test, ast.BoolOp):
            answers = [self._says_missing(one) for one in test.values]
            if isinstance(test.op, ast.Or):
                return answers[0] if answers[0] in (0, 1) else None
            if answers[0] == -1:
                return -1
            return answers[0] if len({*answers}) == 1 else None
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._says_missing(test.operand)
            return None if inner is None else -inner
        if not self._mentions(test, aliases=True):
            return None
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            return self._compared(test.left, test.ops[0], test.comparators[0])
        return -1 if self._is_asked(test) else None

    def _compared(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> int | None:
        if isinstance(how, (ast.Is, ast.IsNot)):
            sign = 1 if isinstance(how, ast.Is) else -1
            return sign if _is_nothing(right) and self._is_asked(left) else None
        if isinstance(how, (ast.In, ast.NotIn)):
            sign = -1 if isinstance(how, ast.In) else 1
            return sign if self._is_mention(right) else None
        if isinstance(right, ast.Constant) and right.value == 0 and isinstance(left, ast.Call):
            if _last(left.func) == "len":
                return {ast.Eq: 1, ast.NotEq: -1, ast.Gt: -1}.get(type(how))
            return None
        asked = {_last(one) for one in ast.walk(ast.Tuple([left, right])) if _last(one)}
        return 0 if asked & _SIZES else None

    def _is_asked(self, node: ast.AST) -> bool:
        if isinstance(node, ast.NamedExpr):
            node = node.value
        if isinstance(node, ast.Name) and node.id in self._aliases:
            return True
        named = isinstance(node, ast.Call) and _last(node.func) == "hasattr"
        return self._is_copy(node) or (named and self._mentions(node))

    def _is_alone(self, statements: Sequence[ast.AST]) -> bool:
        """Tells whether statements do nothing but make it."""
        made = _made_in(statements) | self._aliases
        return all(
            _does_nothing(one, made, self._holders, self._is_itself, self._through)
            for one in statements
        )


@dataclass
class _Region:
    """Statements that are done where something is missing, and that test.

    Args:
        statements: what makes it.
        test: the statement that finds it missing.
        above: what is around that.
        asks: the part of that which asks.
        returns: whether what follows a test in its block ends with the block.
    """

    statements: Sequence[ast.AST]
    test: ast.AST
    above: _Above
    asks: ast.AST
    returns: bool = False

    def has(self, node: ast.AST, above: _Above) -> bool:
        """Tells whether a node is in the test or in the statements."""
        around = (*above, node)
        return any(one is self.test or one in self.statements for one in around)

    def comes_before(self, node: ast.AST, above: _Above) -> bool:
        """Tells whether it has been made wherever a node is come to."""
        holds = [one for one in self.above if isinstance(one, _CONTROL)]
        return _position((self.test, ())) <= _position((node, ())) and all(
            one in above for one in holds
        )


def _in_order(node: ast.AST, above: _Above) -> Iterator[tuple[ast.AST, _Above]]:
    yield node, above
    if isinstance(node, ast.ClassDef):
        # Its methods are functions of their own.
        return
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child, (*above, node))


def _position(place: tuple[ast.AST, _Above]) -> tuple[int, int]:
    node: Any = place[0]
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _last(function: ast.AST) -> str:
    if isinstance(function, ast.Call):
        function = function.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _root(node: ast.AST) -> ast.AST:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _calls_in(statements: Iterable[ast.AST]) -> set[str]:
    inside = (node for one in statements for node in ast.walk(one))
    return {_last(node.func) for node in inside if isinstance(node, ast.Call)}


def _made_in(statements: Iterable[ast.AST]) -> set[str]:
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


def _does_nothing(
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
        if isinstance(one, ast.Call) and _draws(one, made):
            return False
        if isinstance(one, ast.Expr) and not _is_quiet(one.value, made, is_itself, through):
            return False
        if isinstance(one, ast.AugAssign):
            root = _root(one.target)
            if not (isinstance(root, ast.Name) and root.id in made):
                return False
        if isinstance(one, (ast.Attribute, ast.Subscript)) and isinstance(one.ctx, ast.Store):
            root = _root(one)
            name = root.id if isinstance(root, ast.Name) else ""
            beside = isinstance(one, ast.Attribute) and one.value is root and name in holders
            if not (is_itself(one) or beside or name in made):
                return False
    return True


def _is_quiet(
    value: ast.AST,
    made: set[str],
    is_itself: Callable[[ast.AST], bool],
    through: frozenset[str],
) -> bool:
    """Tells whether an expression that stands alone writes to nothing but what is made."""
    if isinstance(value, ast.Constant):
        return True
    if not isinstance(value, ast.Call):
        return False
    if _last(value.func) in _SAYS or _last(value.func) in through:
        return True
    root = _root(value.func)
    itself = isinstance(value.func, ast.Attribute) and is_itself(value.func.value)
    return itself or (isinstance(root, ast.Name) and root.id in made)


def _is_nothing(value: ast.AST | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def _returns_nothing(body: Iterable[ast.AST]) -> bool:
    inside = (node for one in body for node in ast.walk(one))
    return all(_is_nothing(one.value) for one in inside if isinstance(one, ast.Return))


def _draws(call: ast.Call, made: set[str]) -> bool:
    """Tells whether a call may draw from, or set, a generator that others use."""
    name = _last(call.func)
    if name in _OWN_DRAWS or not _DRAWS.search(name):
        return False
    if any(one.arg == "generator" for one in call.keywords):
        return False
    root = _root(call.func)
    own = isinstance(root, ast.Call) or (isinstance(root, ast.Name) and root.id in made)
    return not (own and isinstance(call.func, ast.Attribute))


@lru_cache(maxsize=1 << 15)
def _is_harmless(code: types.CodeType) -> bool:
    """Tells whether a function does nothing but return something."""
    body = getattr(syntax_tree(code), "body", [None])
    first: Any = body[0] if body else None
    if not isinstance(first, ast.FunctionDef):
        return False
    made = _made_in(first.body)
    return all(_does_nothing(one, made, set(), lambda _: False) for one in first.body)
