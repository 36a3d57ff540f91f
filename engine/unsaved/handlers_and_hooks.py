"""Handlers, hooks and modules that were attached, removed or exchanged since the run began.

A handler may attach another handler, remove one that has done its part, register a hook, or put a
module in another's place. No state holds that: a script that is started again sets up the
beginning's. So what there is when a run begins is compared with what there is when a state is
taken.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin

from crosstrain.engine.guards import module_of
from crosstrain.engine.source.functions import is_users_file
from crosstrain.engine.source.made_where_missing import hooks_are_made_lazily, is_made_lazily
from crosstrain.engine.structure import parts_of

from .used import Used

_Marks = Counter[tuple[str, int, bool]]


class Attached:
    """Finds what has been attached, removed or exchanged since a run began.

    What handlers of EPOCH_STARTED change, they change again where a run goes on within their epoch:
    it counts once that epoch has ended.
    """

    def __init__(self) -> None:
        self._begun: _Marks | None = None
        self._epoch: _Marks = Counter()
        self._batches: _Marks = Counter()
        # What the first step has made.
        self._made: _Marks | None = None
        self._expected: list[str] = []

    def begin(self) -> None:
        """Forgets the run before: what a script does between runs, it does again."""
        self._begun = self._made = None

    def expect(self, names: Iterable[str]) -> None:
        """Takes what the first step of the run before had made, as of `made`."""
        self._expected = list(names)

    @property
    def made(self) -> list[str]:
        """What the first step of this run has made, by what to call it, for a state."""
        names = {what: None for what, _, _ in self._made or ()}
        return sorted(names or dict.fromkeys(self._expected))

    def has_made(self, used: Used) -> bool:
        """Notes what hooks and modules the first step has made; tells whether there are any."""
        self._made = _marks(used, called=False) - self._batches
        return bool(self._made)

    def keep_made(self, used: Used, functions: Sequence[types.FunctionType]) -> bool:
        """Keeps of it what functions make anew in each first step; tells whether there is any."""
        self._made = _made_lazily(self._made or Counter(), used, functions)
        return bool(self._made)

    def not_made(self, used: Used) -> list[str]:
        """Returns what the first step of the run before had made, and is not there; once."""
        expected, self._expected = self._expected, []
        there = {what for what, _, _ in _marks(used, called=False)} if expected else set()
        return [what for what in expected if what not in there]

    def epoch_begins(self, used: Used) -> None:
        """Notes what there is before the handlers of EPOCH_STARTED are called."""
        self._epoch = self._batches = _marks(used)
        if self._begun is None:
            self._begun = self._epoch

    def batches_begin(self, used: Used) -> None:
        """Notes what there is after them."""
        self._batches = _marks(used)

    def names(self, used: Used) -> set[str]:
        """Returns what to call all that there is now, and was when the run began."""
        return {what for what, _, _ in (*_marks(used), *(self._begun or ()))}

    def changed(self, used: Used, ended: bool) -> list[str]:
        """Returns what is other than when the run began, each as a phrase."""
        if self._begun is None:
            return []
        now, made = _marks(used), self._made or Counter()
        gone = [f"{what}, which was removed" for what, _, _ in made - now]
        if ended:
            return _differences(self._begun, now - made) + gone
        found = _differences(self._begun, self._epoch - made)
        found += _differences(self._batches - made, now - made) + gone
        return list(dict.fromkeys(found))


def _differences(before: _Marks, now: _Marks) -> list[str]:
    return [
        *(f"{what}, which was added" for what, _, _ in now - before),
        *(f"{what}, which was removed" for what, _, lasts in before - now if lasts),
    ]


def _marks(used: Used, called: bool = True) -> _Marks:
    """Returns what there is, with the code of what is called: closures are made anew.

    The step and the handlers count, too, if they are to (`called`).
    """
    found: _Marks = Counter()
    held = [(name, function, True) for name, function in used.of_trained.items()]
    for name, function, lasts in (*(used.called if called else ()), *held):
        while isinstance(function, partial):
            function = function.func
        plain = inspect.unwrap(getattr(function, "__func__", function))
        # A checkpoint's handler asks for more of the engine when it is first called.
        if not module_of(plain).startswith("crosstrain."):
            found[name, id(getattr(plain, "__code__", type(plain))), lasts] += 1
    found.update(_classes(used.objects))
    return found


def _made_lazily(made: _Marks, used: Used, functions: Sequence[types.FunctionType]) -> _Marks:
    """Returns what of that which a first step has made each first step makes again."""
    hooks = {
        name: is_users_file(sys.modules.get(module_of(function)))
        for name, function in used.of_trained.items()
    }
    by_users = hooks_are_made_lazily(functions)
    found: _Marks = Counter()
    for (name, code, lasts), count in made.items():
        path = name.partition(" (a ")[0]
        if name in hooks:
            lazy = by_users or not hooks[name]
        else:
            lazy = is_made_lazily(f".{path.rpartition('.')[2]}", functions)
        if lazy:
            found[name, code, lasts] = count
    return found


def _classes(objects: Mapping[str, Any]) -> Iterator[tuple[str, int, bool]]:
    for name, value in objects.items():
        for path, module in parts_of(value).items() if isinstance(value, Module) else ():
            kind: Any = type(module)
            if isinstance(module, LazyModuleMixin):
                kind = module.cls_to_become or kind
            yield f"{name}{'.' if path else ''}{path} (a {kind.__name__})", 0, True
