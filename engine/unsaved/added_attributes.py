"""Attributes that users add to what is not theirs: to the engine, its state, a model, an optimizer.

`trainer.tracker = Tracker()`, `optimizer.factors = [...]`: a handler that is given the trainer, or
refers to the optimizer, finds it there, and no state has it. Of such an object the attributes are
looked at that are not its own, as far as a function fetches one of that name from what may be it.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import is_others
from crosstrain.engine.nests import unwrap
from crosstrain.engine.source.functions import methods_in
from crosstrain.engine.source.tree import words_in
from crosstrain.engine.source.uses import AttributeUse, Use, attributes_used
from crosstrain.engine.state import State
from crosstrain.engine.structure import RECORDED, parts_of

from .functions import TORCHS_OWN, TRAINED

# Attributes of every state; how often a step was applied, the step's own state tells.
_STATE: Final = frozenset({*vars(State()), "applied_steps", "skipped_steps"})
# By what a module or an optimizer computes.
_COMPUTES: Final = frozenset({"forward", "step"})


class Holders:
    """Finds which attributes of some objects functions use.

    Args:
        objects: an engine, states, modules, optimizers, by what to call each.
        keys: attributes of a state that are saved.
        recorded: modules and optimizers whose numbers and words are no matter, by `id`.
    """

    def __init__(
        self, objects: Mapping[str, Any], keys: Iterable[str] = (), recorded: Iterable[int] = ()
    ) -> None:
        kept = {*_STATE, *keys}
        recorded = frozenset(recorded)
        # What each has of a name, and where: attributes by their holder, and methods, bound here,
        # since to fetch a property from its object would call it.
        self._by_name: dict[str, list[tuple[str, Any, types.MethodType | None]]] = {}
        kinds: dict[type, dict[str, Any]] = {}
        for name, one in objects.items():
            for path, part in parts_of(one).items():
                where = f"{name}.{path}" if path else name
                for attribute in _further(part, kept, id(part) in recorded):
                    self._by_name.setdefault(attribute, []).append((where, part, None))
                if isinstance(part, TRAINED):
                    kind = type(part)
                    kinds[kind] = own = kinds[kind] if kind in kinds else methods_in(kind)
                    # What it computes by is looked at whether anybody names it or not.
                    for method in own.keys() - _COMPUTES:
                        bound = types.MethodType(own[method], part)
                        self._by_name.setdefault(method, []).append((where, part, bound))

    def are_named_in(self, function: types.FunctionType) -> bool:
        """Tells whether a function may fetch anything of them: a quick look at its code."""
        return not words_in(function.__code__).isdisjoint(self._by_name)

    def used_by(
        self, function: types.FunctionType, variables: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, Any, types.MethodType | None, frozenset[Use]]]:
        """Yields what a function may fetch: of what, its name, whose it is, what is done with it.

        A method of what is trained comes bound, an attribute with None. What the function's
        `variables` stand for is given where it is known.
        """
        used = attributes_used(function.__code__)
        names = sorted(used.keys() & self._by_name.keys())
        known = [(name, *one) for name in names for one in self._by_name[name]]
        # What methods lead to comes last.
        for name, where, holder, method in sorted(known, key=lambda one: one[-1] is not None):
            found = [one.use for one in used[name] if _may_be(holder, one, function, variables)]
            if found:
                yield where, name, holder, method, frozenset(found)


def _may_be(
    holder: Any, one: AttributeUse, function: types.FunctionType, variables: Mapping[str, Any]
) -> bool:
    """Tells whether what a function fetches an attribute of may be a holder."""
    if isinstance(holder, State):
        return one.of == "state"
    if one.base is not None and one.base in variables:
        return unwrap(variables[one.base]) is holder
    if one.base is not None and one.base in function.__code__.co_varnames[:1]:
        owner = _class_of(function)
        if owner is not None:
            # What a module or an optimizer does with itself is looked at elsewhere.
            names = {each.__name__ for each in type(holder).__mro__}
            return isinstance(holder, Dispatcher) and owner in names
    return True


def _class_of(function: types.FunctionType) -> str | None:
    """Returns the name of the class that a function was written in; None where it is no method."""
    parts = function.__qualname__.split(".")
    return parts[-2] if len(parts) > 1 and parts[-2] != "<locals>" else None


@lru_cache
def names_of_ours(kind: type) -> frozenset[str]:
    """Returns what classes that are no user's have, and what their constructors make.

    By their code: an engine whose dictionary was asked for when it was made is slower in its loop,
    since Python then looks each attribute up.
    """
    found: set[str] = set()
    for each in kind.__mro__:
        if is_others(each):
            found |= vars(each).keys()
            if isinstance(made := vars(each).get("__init__"), types.FunctionType):
                stored = dis.get_instructions(made)
                found |= {str(one.argval) for one in stored if one.opname == "STORE_ATTR"}
    return frozenset(found)


def _further(holder: Any, kept: set[str], recorded: bool) -> Iterator[str]:
    """Yields the names of those attributes of an object that it does not have by itself."""
    if isinstance(holder, State):
        # What counts events is saved.
        yield from vars(holder).keys() - kept - {*holder.event_to_attr.values()}
    elif isinstance(holder, Dispatcher):
        kind: Any = type(holder)
        yield from vars(holder).keys() - names_of_ours(kind)
    elif isinstance(holder, TRAINED):
        for name, value in vars(holder).items():
            if name not in TORCHS_OWN and not (recorded and type(value) in RECORDED):
                yield name
