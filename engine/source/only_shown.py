"""Whether what a value comes to is shown to somebody, and does nothing else: told by the source.

A meter keeps sums for a line of the progress; a best accuracy decides what is printed beside an
epoch. A resumed run begins without them, and trains the same. So a value is followed from where it
is read: into what is computed from it, into variables, attributes, parameters and what functions
return, and into what is done only if it says so. It is only shown if each of these ways ends in a
line that is printed or logged, or in another value of which that is true (Denning and Denning,
Certification of programs for secure information flow, 1977). Attributes count by their names,
whichever object they are of. What is not understood may be anything: then the answer is no.
It is one file although it is long: each kind of expression and statement has its one place in it.
"""

from __future__ import annotations

import ast
import dis
import inspect
import sys
import types
from collections.abc import Collection, Generator, Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any, Final, NamedTuple

import torch

from crosstrain.engine.guards import is_a, is_others, is_users_object, module_of
from crosstrain.engine.nests import NESTS, SCALARS

from .functions import is_users_file, layers_of, variables_of
from .set_first import Held
from .tree import KEPT, Above, name_of, names_in, nodes_in, syntax_tree, words_in
from .uses import QUIET, SHOWS, WRITES, is_thrown_away, written_by

_SHOWS: Final = SHOWS | {
    *("add_figure", "add_histogram", "add_image", "add_scalars", "add_text", "log_metrics"),
    *(
        "dump",
        "flush",
        "set_description_str",
        "set_postfix_str",
        "writeheader",
        "writerow",
        "writerows",
    ),
}
# What gives a value that follows from its arguments and its object, and changes neither.
_PURE: Final = QUIET | {
    *(
        "DictWriter",
        "OrderedDict",
        "all",
        "any",
        "array",
        "as_tensor",
        "asarray",
        "ceil",
        "defaultdict",
        "deque",
    ),
    *("divmod", "dumps", "enumerate", "exp", "floor", "format", "isfinite", "isinstance", "isnan"),
    *("isoformat", "items", "join", "keys", "ljust", "median", "now", "numel", "parameters"),
    *("perf_counter", "monotonic", "process_time", "pow", "range", "repr", "replace", "reversed"),
    *("rjust", "rstrip", "size", "split", "sqrt", "std", "strftime", "strip", "tensor", "time"),
    *("time_ns", "timedelta", "total_seconds", "upper", "values", "var", "zip"),
}
# What changes a collection, and may look at it.
_TAKES: Final = frozenset({"pop", "popleft", "remove", "reverse", "sort"})
_TEXTS: Final = frozenset({"__str__", "__repr__", "__format__"})
_PASSED_THROUGH: Final = (
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.JoinedStr, ast.FormattedValue, ast.Tuple),
    *(ast.List, ast.Dict, ast.Set, ast.Starred, ast.Slice, ast.keyword, ast.Subscript),
    *(ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp),
)
# What may read any attribute, or any variable.
_OF_ALL: Final = ("asdict", "getattr", "vars")
_DARK: Final = frozenset({"eval", "exec", "globals", "locals"})
_ALONE: Final = (ast.Pass, ast.Global, ast.Nonlocal, ast.Import, ast.ImportFrom)
_COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)
# How far into nests.
_DEPTH: Final = 4
_FRESH: Final = (ast.List, ast.Dict, ast.Set, *_COMPREHENSIONS)
_MAKERS: Final = frozenset({"OrderedDict", "defaultdict", "deque", "dict", "list", "set"})
_NOT_FOLLOWED: Final = (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda)
_FUNCTIONS: Final = (types.FunctionType, types.MethodType, staticmethod, classmethod)
_Code = types.CodeType


class _Value(NamedTuple):
    """Something that is followed.

    Args:
        kind: `attribute`, `variable`, or of one function: `local`, `returned`.
        name: what it is called.
        code: of which function.
        owner: of objects of which class, for an attribute.
    """

    kind: str
    name: str
    code: _Code | None = None
    owner: type | None = None


#: Values that one comes to, and at the end whether it goes no further.
_Steps = Generator[_Value, None, bool]


class NotOnlyShown(Exception):
    """Something else is done with it than to show it."""


class OnlyShown:
    """Follows values through the functions of a run.

    Args:
        functions: all that a run calls of the user's.
        kinds: the classes whose methods are among them.
        handlers: those functions that events call: what they return is thrown away.
        roots: those that somebody else calls, such as the step: what they return is used.
    """

    def __init__(
        self,
        functions: Iterable[types.FunctionType],
        kinds: Iterable[type],
        handlers: Collection[_Code],
        roots: Collection[_Code],
    ) -> None:
        self._functions = {one.__code__: one for one in functions}
        # Of methods, the class that defines each, and those that have it.
        self._defined_by: dict[_Code, type] = {}
        self._kinds: dict[_Code, list[type]] = {}
        for kind in kinds:
            for each in kind.__mro__:
                if not is_users_file(sys.modules.get(module_of(each))):
                    continue
                for layer in (one for value in vars(each).values() for one in layers_of(value)):
                    self._defined_by[layer.__code__] = each
                    self._kinds.setdefault(layer.__code__, []).append(kind)
        self._handlers, self._roots = handlers, roots
        self._by_name: dict[str, list[_Code]] = {}
        for code in self._functions:
            self._by_name.setdefault(code.co_name, []).append(code)
        self._known: dict[_Value, bool] = {}
        # Functions that are called, or not, by the value that is followed now.
        self._looked_into: set[_Code] = set()

    @cached_property
    def _is_dark(self) -> bool:
        """Whether a function may use variables by names that its source does not show."""
        return any(_calls_dark(code) for code in self._functions)

    def tells(self, held: Held, value: Any) -> bool:
        """Tells whether a plain value is only shown, wherever that is read."""
        holder, name = held
        if self._is_dark or not name.isidentifier() or not _is_number_or_nest(value):
            return False
        if holder is not None and not _is_users_alone(type(holder)):
            return False
        start = _Value("variable", name)
        if holder is not None:
            start = _Value("attribute", name, owner=type(holder))
        if start not in self._known:
            self._known[start] = self._is_shown(start)
        return self._known[start]

    def _is_shown(self, start: _Value) -> bool:
        seen, left = {start}, [start]
        self._looked_into.clear()
        try:
            if not any(self._reads(start)):
                return False
            while left:
                for found in self._goes_to(left.pop()):
                    if found not in seen:
                        seen.add(found)
                        left.append(found)
        except NotOnlyShown:
            return False
        return True

    # ------------------------------------------------------------ where something is read

    def _goes_to(self, value: _Value) -> Iterator[_Value]:
        """Yields what else a value comes to.

        Raises:
            NotOnlyShown: if it is more than shown.
        """
        if value.kind == "returned":
            if value.name in _TEXTS:
                return
            known = value.code in self._handlers or any(self._reads(value))
            if value.code in self._roots or not known:
                raise NotOnlyShown
        for node, above, code in self._reads(value):
            yield from self._follow(node, above, code)

    def _reads(self, value: _Value) -> Iterator[tuple[ast.AST, Above, _Code]]:
        if value.kind == "local" and value.code is not None:
            codes: Iterable[_Code] = [value.code]
        elif value.name.startswith("<"):
            codes = ()
        else:
            codes = [code for code in self._functions if _may_name(code, value.name)]
        for code in codes:
            if value.kind == "variable" and value.name in _locals_of(code):
                continue
            apart = self._inner(code) if value.kind != "local" else ()
            for node, above in _tree(code):
                if any(isinstance(one, ast.FunctionDef) and one.name in apart for one in above):
                    continue
                if _is_read(value, node, above) and self._may_be_of(value.owner, node, code):
                    yield node, above, code

    def _inner(self, code: _Code) -> frozenset[str]:
        """Returns the functions in one that are followed by themselves."""
        inner = [one for one in code.co_consts if isinstance(one, types.CodeType)]
        return frozenset(one.co_name for one in inner if one in self._functions) - {code.co_name}

    def _may_be_of(self, owner: type | None, node: ast.AST, code: _Code) -> bool:
        """Tells whether what is read may be one of an object of that class."""
        base = getattr(node, "value", None)
        if owner is None or not self._is_self(base, code):
            return True
        kind = self._defined_by[code]
        return issubclass(kind, owner) or issubclass(owner, kind)

    def _is_self(self, base: ast.AST | None, code: _Code) -> bool:
        """Tells whether it is the object of a method."""
        method = code in self._kinds and code.co_argcount > 0
        if not method or not isinstance(base, ast.Name) or base.id != code.co_varnames[0]:
            return False
        return not any(_is_stored(one, base.id) for one, _ in _tree(code))

    # ------------------------------------------------------------ where it goes from there

    def _follow(self, node: ast.AST, above: Above, code: _Code) -> Iterator[_Value]:
        """Yields the values that one comes to where it is read; raises as `_goes_to`."""
        outer = list(above)
        while outer:
            parent = outer.pop()
            if isinstance(parent, ast.stmt):
                yield from self._statement(node, parent, outer, code)
                return
            if isinstance(parent, ast.Call):
                if (yield from self._argument(node, parent, outer, code)):
                    return
            elif isinstance(parent, ast.Attribute):
                if not isinstance(parent.ctx, ast.Load):
                    raise NotOnlyShown
                call = outer[-1] if outer else None
                if isinstance(call, ast.Call) and call.func is parent:
                    outer.pop()
                    if (yield from self._method(call, outer, code)):
                        return
                    parent = call
            elif isinstance(parent, ast.Subscript) and not isinstance(parent.ctx, ast.Load):
                if parent.value is not node:
                    raise NotOnlyShown
                return  # It is written into.
            elif isinstance(parent, ast.IfExp | ast.BoolOp):
                yield from self._expression(parent, code)
            elif isinstance(parent, ast.comprehension):
                for one in ast.walk(parent.target):
                    if isinstance(one, ast.Name):
                        yield _Value("local", one.id, code)
                yield from self._expression(outer[-1], code)
            elif isinstance(parent, ast.Lambda) and code.co_name == "<lambda>":
                yield _Value("returned", code.co_name, code)
                return
            elif not isinstance(parent, _PASSED_THROUGH):
                raise NotOnlyShown
            node = parent
        raise NotOnlyShown

    def _method(self, call: ast.Call, above: list[ast.AST], code: _Code) -> _Steps:
        """Yields what a method does that is called of a value; returns whether it shows that."""
        name, base = name_of(call.func), getattr(call.func, "value", None)
        plain = isinstance(base, ast.Name) and self._is_own_collection(base, code)
        for own in () if plain else self._by_name.get(name, ()):
            yield from self._body(own)
        if name in _SHOWS | WRITES and is_thrown_away(tuple(above)):
            return True
        if name not in _PURE | _TAKES:
            raise NotOnlyShown
        return False

    def _argument(self, node: ast.AST, call: ast.Call, above: list[ast.AST], code: _Code) -> _Steps:
        """Yields what a call makes of an argument; returns whether what it gives is another."""
        if call.func is node:
            raise NotOnlyShown
        users, sure = self._called(call, code)
        for own in users:
            first = {0, int(isinstance(call.func, ast.Attribute))}
            if sure and self._takes_itself(own):
                first.discard(0)
            yield from _parameters(own, call, node, first)
        if sure:
            # What it returns follows from its parameter, or does not.
            return True
        name = name_of(call.func)
        if name in _SHOWS and is_thrown_away(tuple(above)):
            return True
        if (target := _changed_by(call)) is not None:
            yield from self._targets([target], code, into=True)
            return True
        if name not in _PURE:
            raise NotOnlyShown
        return False

    def _takes_itself(self, code: _Code) -> bool:
        """Tells whether a method has its object, or its class, before its arguments."""
        kind = self._defined_by.get(code)
        found = None if kind is None else inspect.getattr_static(kind, code.co_name, None)
        return is_a(found, types.FunctionType, classmethod)

    def _called(self, call: ast.Call, code: _Code) -> tuple[list[_Code], bool]:
        """Returns the functions that a call may be of, and whether it surely is of one of them."""
        name, function = name_of(call.func), self._functions[code]
        named = self._by_name.get(name, [])
        known = variables_of(function)
        if isinstance(call.func, ast.Name):
            if name in _locals_of(code):
                return named, False
            # Of anything else, it is not asked what it wraps: it may answer anything.
            found = known.get(name)
            layers = [one.__code__ for one in layers_of(found) if is_a(found, *_FUNCTIONS)]
            return [one for one in layers if one in self._functions], bool(layers)
        base = getattr(call.func, "value", None)
        if not isinstance(base, ast.Name):
            return named, False
        if base.id in _locals_of(code):
            if self._is_own_collection(base, code):
                return [], False
            return named, self._is_self(base, code) and bool(named)
        owner = known.get(base.id)
        if not is_users_object(owner) or isinstance(owner, types.ModuleType):
            return [], False
        found = inspect.getattr_static(type(owner), name, None)
        methods = [one.__code__ for one in layers_of(found) if is_a(found, *_FUNCTIONS)]
        return [one for one in named if one in methods], any(one in methods for one in named)

    def _statement(
        self, node: ast.AST, statement: ast.stmt, above: list[ast.AST], code: _Code
    ) -> Iterator[_Value]:
        if isinstance(statement, ast.Assign):
            yield from self._targets(statement.targets, code)
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
            yield from self._targets([statement.target], code)
        elif isinstance(statement, ast.Return):
            if sum(isinstance(one, ast.FunctionDef) for one in above) != 1:
                raise NotOnlyShown
            yield _Value("returned", code.co_name, code)
        elif isinstance(statement, ast.If) and statement.test is node:
            yield from self._statements([*statement.body, *statement.orelse], code)
        elif isinstance(statement, ast.For) and statement.iter is node:
            yield from self._targets([statement.target], code)
            yield from self._statements([*statement.body, *statement.orelse], code)
        elif not isinstance(statement, ast.Expr):
            raise NotOnlyShown

    # ------------------------------------------------------------ what is set

    def _targets(
        self, targets: Iterable[ast.AST], code: _Code, into: bool = False
    ) -> Iterator[_Value]:
        """Yields what is set, or written `into`."""
        for target in targets:
            if isinstance(target, ast.Tuple | ast.List):
                yield from self._targets(target.elts, code, into)
            elif isinstance(target, ast.Starred):
                yield from self._targets([target.value], code, into)
            elif isinstance(target, ast.Name):
                if into and not self._is_own_collection(target, code):
                    raise NotOnlyShown
                if target.id in _locals_of(code):
                    yield _Value("local", target.id, code)
                else:
                    yield _Value("variable", target.id)
            elif isinstance(target, ast.Attribute):
                if (owner := self._users_kind(target.value, code)) is None:
                    raise NotOnlyShown
                yield _Value("attribute", target.attr, owner=owner)
            elif isinstance(target, ast.Subscript):
                yield from self._targets([target.value], code, into=True)
            else:
                raise NotOnlyShown

    def _is_own_collection(self, target: ast.Name, code: _Code) -> bool:
        """Tells whether what is written into is a collection of the function's, or of the script's.

        A variable may stand for something of another's, such as an optimizer's group.
        """
        if target.id not in _locals_of(code):
            return isinstance(variables_of(self._functions[code]).get(target.id), NESTS)
        made = [_value_set(one, target.id) for one, _ in _tree(code)]
        return any(made) and all(
            isinstance(one, _FRESH) or (isinstance(one, ast.Call) and name_of(one.func) in _MAKERS)
            for one in made
            if one is not None
        )

    def _users_kind(self, base: ast.AST, code: _Code) -> type | None:
        """Returns the class of an object of the user's that nobody else reads; None of another."""
        if not isinstance(base, ast.Name):
            return None
        if base.id in _locals_of(code):
            if not self._is_self(base, code) or not all(map(_is_users_alone, self._kinds[code])):
                return None
            return self._defined_by[code]
        kind = type(variables_of(self._functions[code]).get(base.id))
        return kind if _is_users_alone(kind) else None

    # ------------------------------------------------------------ what is done if it says so

    def _body(self, code: _Code) -> Iterator[_Value]:
        """Yields what a function sets that is called, or is not, by a value that is followed."""
        if code in self._looked_into:
            return
        self._looked_into.add(code)
        body: Any = getattr(syntax_tree(code), "body", None)
        if not body or not isinstance(body[0], ast.FunctionDef):
            raise NotOnlyShown
        yield from self._statements(body[0].body, code, called=True)

    def _statements(
        self, statements: Iterable[ast.stmt], code: _Code, called: bool = False
    ) -> Iterator[_Value]:
        """Yields what statements set that are done or left out by such a value."""
        for one in statements:
            if isinstance(one, ast.Expr):
                yield from self._expression(one.value, code, called, thrown_away=True)
            elif isinstance(one, ast.Assign):
                yield from self._expression(one.value, code, called)
                yield from self._targets(one.targets, code)
            elif isinstance(one, ast.AnnAssign | ast.AugAssign):
                yield from self._expression(one.value, code, called)
                yield from self._targets([one.target], code)
            elif isinstance(one, ast.If):
                yield from self._expression(one.test, code, called)
                yield from self._statements([*one.body, *one.orelse], code, called)
            elif isinstance(one, ast.For):
                yield from self._expression(one.iter, code, called)
                yield from self._targets([one.target], code)
                yield from self._statements([*one.body, *one.orelse], code, called)
            elif isinstance(one, ast.Return) and called:
                yield from self._expression(one.value, code, called)
            elif not isinstance(one, _ALONE):
                raise NotOnlyShown

    def _expression(
        self,
        tree: ast.AST | None,
        code: _Code,
        called: bool = False,
        thrown_away: bool = False,
    ) -> Iterator[_Value]:
        """Yields what an expression writes to that is computed, or is not, by such a value."""
        for one in ast.walk(tree) if tree is not None else ():
            if isinstance(one, _NOT_FOLLOWED):
                raise NotOnlyShown
            if not isinstance(one, ast.Call):
                continue
            users, sure = self._called(one, code)
            for own in users:
                yield from self._body(own)
            shows = _SHOWS if thrown_away and one is tree else frozenset[str]()
            if not sure and name_of(one.func) not in _PURE | WRITES | _TAKES | shows:
                raise NotOnlyShown
            target = None if sure or name_of(one.func) in shows else _changed_by(one)
            if target is not None:
                yield from self._targets([target], code, into=True)


# ------------------------------------------------------------------------------ of the source


@lru_cache(maxsize=KEPT)
def _tree(code: _Code) -> list[tuple[ast.AST, Above]]:
    """Returns the nodes of a function, and what is around each."""
    if (tree := syntax_tree(code)) is None:
        raise NotOnlyShown
    return [*nodes_in(tree)]


@lru_cache(maxsize=KEPT)
def _may_name(code: _Code, name: str) -> bool:
    own = words_in(code)
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    if name in own or own & {"__dict__", "vars", "asdict", "getattr", "globals"}:
        return True
    return name in (*code.co_freevars, *code.co_cellvars) or any(
        _may_name(one, name) for one in inner
    )


@lru_cache(maxsize=KEPT)
def _calls_dark(code: _Code) -> bool:
    # Not by the method of that name, as `model.eval()`.
    own = (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    return bool(_DARK & names_in(code)) and not _DARK.isdisjoint(own)


def _locals_of(code: _Code) -> frozenset[str]:
    """Returns the variables of a function that nobody else sets."""
    return frozenset((*code.co_varnames, *code.co_cellvars))


def _is_read(value: _Value, node: ast.AST, above: Above) -> bool:
    if value.kind in ("local", "variable"):
        return _is_load(node, ast.Name) and name_of(node) == value.name
    called = bool(above) and isinstance(above[-1], ast.Call) and above[-1].func is node
    if value.kind == "returned":
        if isinstance(node, ast.Call):
            return name_of(node.func) == value.name
        if called or name_of(node) != value.name:
            return False
        if _is_load(node, ast.Name):
            raise NotOnlyShown  # It is passed on, to be called by whoever gets it.
        return _is_load(node, ast.Attribute)  # A property.
    if isinstance(node, ast.Attribute) and _is_load(node, ast.Attribute):
        return node.attr == "__dict__" or (node.attr == value.name and not called)
    if isinstance(node, ast.Call) and name_of(node.func) in _OF_ALL:
        name = node.args[1] if len(node.args) > 1 else None
        return not isinstance(name, ast.Constant) or name.value == value.name
    return False


def _is_load(node: ast.AST, kind: type[ast.AST]) -> bool:
    return isinstance(node, kind) and isinstance(getattr(node, "ctx", None), ast.Load)


def _value_set(node: ast.AST, name: str) -> ast.AST | None:
    """Returns what a statement sets a variable to; itself, if it does so in another way."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    if isinstance(node, ast.With | ast.AsyncWith):
        return next((node for one in ast.walk(node) if _is_stored(one, name)), None)
    if not isinstance(node, ast.stmt):
        return None
    if any(isinstance(one, ast.Name) and one.id == name for one in targets):
        return getattr(node, "value", node)
    inside = (each for one in targets if one is not node for each in ast.walk(one))
    return node if any(_is_stored(one, name) for one in inside) else None


def _is_stored(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)


def _changed_by(call: ast.Call) -> ast.AST | None:
    """Returns the collection that a call changes, if it is a method of one by its name."""
    takes = isinstance(call.func, ast.Attribute) and call.func.attr in _TAKES
    return call.func.value if takes else written_by(call)  # type: ignore[attr-defined]


def _parameters(
    code: _Code, call: ast.Call, node: ast.AST, first: Iterable[int]
) -> Iterator[_Value]:
    """Yields the parameters of a function that an argument may be; none, if it takes fewer.

    The `first` argument may be one of several: a method has its object before it.
    """
    count = code.co_argcount
    names = code.co_varnames[: count + code.co_kwonlyargcount]
    more = [*code.co_varnames[len(names) :]]
    # What takes all that is left: of those without a name, and of those with one.
    rest = more.pop(0) if code.co_flags & inspect.CO_VARARGS else None
    by_name = more.pop(0) if code.co_flags & inspect.CO_VARKEYWORDS else None
    if isinstance(node, ast.keyword):
        if (name := node.arg if node.arg in names else by_name) is None:
            raise NotOnlyShown
        yield _Value("local", name, code)
        return
    before: list[ast.AST] = [*call.args]
    if any(isinstance(one, ast.Starred) for one in before) or node not in before:
        raise NotOnlyShown
    for shift in first:
        place = before.index(node) + shift
        if (name := names[place] if place < count else rest) is not None:
            yield _Value("local", name, code)


# ------------------------------------------------------------------------------ of objects


def _is_number_or_nest(value: Any, depth: int = _DEPTH) -> bool:
    """Tells whether a value is a number, a word, a scalar on the host, or a nest of these."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.requires_grad
    if isinstance(value, NESTS) and depth > 0:
        inside = value.values() if isinstance(value, dict) else value
        return all(
            not isinstance(one, torch.Tensor) and _is_number_or_nest(one, depth - 1)
            for one in list(inside)
        )
    return isinstance(value, SCALARS)


def _is_users_alone(kind: Any) -> bool:
    """Tells whether objects of a class are the user's, and none that others read, as a module."""
    bases = [one for one in kind.__mro__ if one is not object]
    return all(not is_others(one) and not isinstance(one, types.GenericAlias) for one in bases)
