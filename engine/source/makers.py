"""What one function does with a name: makes it where it is missing, reads it, or writes otherwise.

The name is a variable's or an attribute's. Statements that make it are a region, with the test that
finds it missing.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from .side_effects import (
    calls_in,
    does_nothing,
    fresh_in,
    is_in_place,
    is_nothing,
    made_in,
    returns_nothing,
)
from .tree import (
    KEPT,
    Above,
    codes_in,
    definition_of,
    name_of,
    nodes_in,
    root_of,
    syntax_tree,
    words_in,
)
from .uses import WRITES

# What changes a collection and depends on what it holds, or takes something away.
_CHANGES: Final = (
    WRITES
    | {"difference_update", "discard", "intersection_update", "pop", "popitem", "popleft"}
    | {"remove", "resize", "reverse", "rotate", "sort", "symmetric_difference_update"}
)
_SIZES: Final = frozenset({"device", "dtype", "len", "ndim", "numel", "shape", "size"})
_CONTROL: Final = (ast.If, ast.For, ast.While, ast.Try, ast.ExceptHandler, ast.IfExp)
_COPIES: Final = frozenset({"__getitem__", "get", "getattr"})


@dataclass
class Found:
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
        beside: other attributes that it writes to there.
    """

    name: str
    makes: bool = False
    spoils: bool = False
    only_makes: bool = False
    itself: bool = False
    reads_first: bool = False
    called_before: set[str] = field(default_factory=set[str])
    calls: set[str] = field(default_factory=set[str])
    beside: set[str] = field(default_factory=set[str])


@lru_cache(maxsize=KEPT)
def found_in(
    code: types.CodeType,
    name: str,
    variable: bool,
    through: frozenset[str] = frozenset(),
    kin: frozenset[str] = frozenset(),
) -> Found:
    """Returns what a function does with a name.

    Args:
        code: the function's.
        name: of a variable or an attribute.
        variable: whether it is a variable's.
        through: functions that make it, which this one may call where it is missing.
        kin: what else these make.
    """
    found = Found(code.co_name)
    if not any(_mentions_by_name(code, one) for one in (name, *through)):
        return found
    tree = syntax_tree(code)
    if tree is None:
        found.spoils = True
        return found
    if _is_cached_property(code, name):
        found.makes = found.itself = True
        found.spoils = not is_harmless(code)
        return found
    if variable and (name in code.co_varnames or name == "object"):
        return found
    _Places(tree, name, variable, through, kin).judge(found)
    return found


def _mentions_by_name(code: types.CodeType, name: str) -> bool:
    return name in words_in(code) or any(
        name in (*one.co_freevars, *one.co_cellvars, one.co_name) for one in codes_in(code)
    )


def _is_cached_property(code: types.CodeType, name: str) -> bool:
    own = definition_of(code)
    decorators = own.decorator_list if own is not None and own.name == name else []
    return any(ast.unparse(one).endswith("cached_property") for one in decorators)


def _position_of(place: tuple[ast.AST, Above]) -> tuple[int, int]:
    """Returns the line and the column of a node."""
    node: Any = place[0]
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


class _Places:
    """The places of a function's source where it mentions a name."""

    def __init__(
        self,
        tree: ast.AST,
        name: str,
        variable: bool,
        through: frozenset[str] = frozenset(),
        kin: frozenset[str] = frozenset(),
    ) -> None:
        self._tree, self._name, self._variable, self._through = tree, name, variable, through
        # Functions that make it, and what else these make.
        self._kin, self._is_beside = kin, False
        self._nodes = sorted(nodes_in(tree, into_classes=False), key=_position_of)
        # A method that is called so, as `cos` of a tensor, is another thing.
        self._methods = {id(node.func) for node, _ in self._nodes if isinstance(node, ast.Call)}
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

    def judge(self, found: Found) -> None:
        """Notes what the function does with it."""
        writes = [place for place in self._nodes if self._writes(*place)]
        found.makes = bool(writes)
        regions: list[_Region] = []
        for node, above in writes:
            region = self._region_of(node, above)
            if region is None:
                found.spoils = True
                body: list[ast.stmt] = getattr(getattr(self._tree, "body", [None])[0], "body", [])
                found.only_makes = bool(body) and self._is_alone(body) and returns_nothing(body)
                found.beside = self._written_beside(body)
                return
            regions.append(region)
            found.calls |= calls_in(region.statements)
            found.beside |= self._written_beside(region.statements)
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
                    name_of(call.func)
                    for call, _ in self._nodes
                    if isinstance(call, ast.Call)
                    and _position_of((call, ())) < _position_of((node, ()))
                }
                return

    def _is_mention(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id == self._name and self._variable
        if isinstance(node, ast.Attribute):
            named = node.attr == self._name and not self._variable
            return named and id(node) not in self._methods
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
            return name_of(value.func) in _COPIES and self._mentions(value)
        if isinstance(value, ast.Subscript):
            value = value.value
        return self._is_mention(value)

    def _writes(self, node: ast.AST, above: Above) -> bool:
        """Tells whether a node is where it is written to, in whichever way."""
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and self._is_itself(function.value):
                own = function.attr
                return own in _CHANGES or own == "setdefault" or is_in_place(own)
            if name_of(function) in self._through:
                return True
            if name_of(function) not in ("setattr", "delattr"):
                return False
            named = node.args[1:2]
            known = bool(named) and isinstance(named[0], ast.Constant)
            return self._mentions(named[0] if known else node)
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

    def _region_of(self, node: ast.AST, above: Above) -> _Region | None:
        """Returns where it is made, if it is made there as it was missing, and nothing else is."""
        statement = next((one for one in reversed(above) if isinstance(one, ast.stmt)), None)
        by_call = isinstance(node, ast.Call) and name_of(node.func) in self._through
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
        return self._with_another(node, above) if whole else None

    def _with_another(self, node: ast.AST, above: Above) -> _Region | None:
        """Returns where it is made together with another attribute, that was missing."""
        if self._variable or self._is_beside:
            return None
        block = next((one for one in reversed(above) if isinstance(one, (ast.If, ast.Try))), None)
        others = self._written_beside([] if block is None else [block])
        for name in sorted((others | self._kin) - {self._name}):
            other = _Places(self._tree, name, False, self._through, self._kin)
            other._is_beside = True
            for place in other._nodes:
                if other._writes(*place):
                    region = other._region_of(*place)
                    if region is not None and region.has(node, above):
                        return region
        return None

    def _written_beside(self, statements: Iterable[ast.AST]) -> set[str]:
        """Returns the attributes of what holds it that statements set."""
        return {
            one.attr
            for statement in statements
            for one in ast.walk(statement)
            if isinstance(one, ast.Attribute)
            and isinstance(one.ctx, ast.Store)
            and isinstance(one.value, ast.Name)
            and one.value.id in self._holders
        }

    def _keeps_its_own(self, value: ast.AST) -> bool:
        """Tells whether a value is the thing itself unless that is missing."""
        if isinstance(value, ast.BoolOp) and isinstance(value.op, ast.Or):
            return self._is_mention(value.values[0])
        if isinstance(value, ast.IfExp):
            says = self._says_missing(value.test)
            kept = {1: value.orelse, -1: value.body}.get(says or 0)
            return kept is not None and self._is_mention(kept)
        return False

    def _regions(self, above: Above) -> Iterator[tuple[_Region, bool]]:
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
        self, block: list[Any], inner: Any, above: Above
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
            made = made_in(region.statements) | self._aliases
            return all(map(is_nothing, returned)) or all(
                one is not None and self._gives_it(one, made) for one in returned
            )
        if any(isinstance(one, (ast.Return, ast.Break, ast.Continue)) for one in inside):
            return False
        # What it has made under other names is not looked at where nothing was made.
        local = made_in(region.statements) - ({self._name} if self._variable else set())
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
        beside = isinstance(value, ast.Attribute) and root_of(value) is value.value
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
            return sign if is_nothing(right) and self._is_asked(left) else None
        if isinstance(how, (ast.In, ast.NotIn)):
            sign = -1 if isinstance(how, ast.In) else 1
            return sign if self._is_mention(right) else None
        if isinstance(right, ast.Constant) and right.value == 0 and isinstance(left, ast.Call):
            if name_of(left.func) == "len":
                return {ast.Eq: 1, ast.NotEq: -1, ast.Gt: -1}.get(type(how))
            return None
        asked = {name_of(one) for one in ast.walk(ast.Tuple([left, right])) if name_of(one)}
        return 0 if asked & _SIZES or self._is_mention(left) or self._is_mention(right) else None

    def _is_asked(self, node: ast.AST) -> bool:
        if isinstance(node, ast.NamedExpr):
            node = node.value
        if isinstance(node, ast.Name) and node.id in self._aliases:
            return True
        named = isinstance(node, ast.Call) and name_of(node.func) == "hasattr"
        return self._is_copy(node) or (named and self._mentions(node))

    def _is_alone(self, statements: Sequence[ast.AST]) -> bool:
        """Tells whether statements do nothing but make it."""
        made = fresh_in(statements) | self._aliases
        return all(
            does_nothing(one, made, self._holders, self._is_itself, self._through)
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
    above: Above
    asks: ast.AST
    returns: bool = False

    def has(self, node: ast.AST, above: Above) -> bool:
        """Tells whether a node is in the test or in the statements."""
        around = (*above, node)
        return any(one is self.test or one in self.statements for one in around)

    def comes_before(self, node: ast.AST, above: Above) -> bool:
        """Tells whether it has been made wherever a node is come to."""
        holds = [one for one in self.above if isinstance(one, _CONTROL)]
        return _position_of((self.test, ())) <= _position_of((node, ())) and all(
            one in above for one in holds
        )


@lru_cache(maxsize=KEPT)
def is_harmless(code: types.CodeType) -> bool:
    """Tells whether a function does nothing but return something."""
    if (own := definition_of(code)) is None:
        return False
    made = fresh_in(own.body)
    return all(does_nothing(one, made, set(), lambda _: False) for one in own.body)


@lru_cache(maxsize=KEPT)
def is_read_by_key_in(code: types.CodeType, name: str, variable: bool) -> bool:
    """Tells whether a function uses a mapping for single items only: see `_is_item`."""
    if not _mentions_by_name(code, name) or (variable and name in code.co_varnames):
        return True
    if (tree := syntax_tree(code)) is None:
        return False
    places = _Places(tree, name, variable)
    return all(_is_item(node, above) for node, above in places._nodes if places._is_mention(node))


@lru_cache(maxsize=KEPT)
def is_written_into(code: types.CodeType, name: str) -> bool:
    """Tells whether a function may set items of what an object has by a name."""
    if not _mentions_by_name(code, name):
        return False
    if (tree := syntax_tree(code)) is None:
        return True
    places = _Places(tree, name, False)
    aliases = {name, *places._aliases}
    return any(
        isinstance(above[-1], (ast.Attribute, ast.Subscript))
        and (
            not isinstance(above[-1].ctx, ast.Load)
            or getattr(above[-1], "attr", "") in {*_CHANGES, "setdefault"}
        )
        for node, above in places._nodes
        if name_of(node) in aliases and above
    )


def _is_item(node: ast.AST, above: Above) -> bool:
    """Tells whether a mapping is used for one item: that is set in any case, or has to be there."""
    item = above[-1]
    inside = any(isinstance(one, _CONTROL) for one in above)
    if isinstance(item, ast.Attribute) and item.attr == "__setitem__":
        return not inside
    if not isinstance(item, ast.Subscript) or item.value is not node:
        return False
    if isinstance(item.ctx, ast.Store):
        return not inside and isinstance(above[-2], ast.Assign)
    tried = any(isinstance(one, ast.Try) for one in above)
    return isinstance(item.ctx, ast.Load) and not tried
