"""What a run uses at one moment: what it calls of the user's, and what of it a checkpoint has.

Each look begins with one of these, and all that is looked for is looked for in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from crosstrain.engine.data.source import ResumableSource
from crosstrain.engine.guards import is_users_object
from crosstrain.engine.nests import unwrap
from crosstrain.engine.structure import keeps_groups, named

from .added_attributes import Holders
from .contents_of_states import Saved
from .functions import (
    functions_held,
    functions_of_data,
    functions_of_trained,
    hooks_of_all,
    parts_of_data,
)

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine


class Used:
    """What an engine's run uses now; kept no longer than a look takes."""

    def __init__(self, engine: Engine, objects: Mapping[str, Any]) -> None:
        self.engine, self.objects = engine, objects
        #: What raised an error when it was looked at, by its owner and what that calls it.
        self.closed: dict[tuple[str, str], Exception] = {}

    # ------------------------------------------------------------ what it calls

    @cached_property
    def called(self) -> list[tuple[str, Any, bool]]:
        """The step and the handlers: what to call each, itself, and whether it lasts."""
        step = ("the step", self.engine._process_function, True)
        return [step, *self.engine._handlers.all_handlers()]

    @cached_property
    def of_trained(self) -> dict[str, Any]:
        """What modules and optimizers compute by, and their hooks, by what to call them."""
        return functions_of_trained(self.objects)

    @cached_property
    def functions(self) -> dict[str, Any]:
        """All that the run calls of the user's, by what to call it.

        The step, handlers, what fetches the data, and what named objects and models hold.
        """
        step = ("the step", self.engine._process_function)
        # Lambdas of one function are called alike.
        handlers = _told_apart([step, *self.engine._handlers.all_functions()], "number")
        return {**handlers, **self.of_data, **self.held, **self.of_trained, **hooks_of_all()}

    @cached_property
    def sources(self) -> dict[str, ResumableSource]:
        """What else is named as data, by what to add to the names of what is in each."""
        named = (one for one in self.engine.named_beside if isinstance(one, ResumableSource))
        return {f", of source {number}": one for number, one in enumerate(named, 1)}

    @cached_property
    def _data(self) -> dict[str, Any]:
        others = {where: one.source for where, one in self.sources.items()}
        return {"": self.engine.state.dataloader, **others}

    @cached_property
    def of_data(self) -> dict[str, Any]:
        """What the data is fetched by."""
        found = ((where, functions_of_data(data)) for where, data in self._data.items())
        return {
            f"{called}{at}": one for at, functions in found for called, one in functions.items()
        }

    @cached_property
    def held(self) -> dict[str, Any]:
        """What named objects hold, such as the functions of a `LambdaLR`."""
        held = map(functions_held, self.engine.named_beside)
        return _told_apart((pair for found in held for pair in found.items()), "of object")

    @cached_property
    def data(self) -> dict[str, Any]:
        """What of the user's fetches the data."""
        return {
            f"{place}{where}": part
            for where, data in self._data.items()
            for place, part in parts_of_data(data)
            if is_users_object(part)
        }

    @cached_property
    def positioned(self) -> frozenset[int]:
        """The data and what fetches it, whose attributes are saved with its position, by `id`."""
        data = self._data.values()
        parts = {id(part) for one in data for _, part in parts_of_data(one)}
        return frozenset(parts.union(map(id, data)))

    # ------------------------------------------------------------ what a checkpoint has of it

    @cached_property
    def named(self) -> list[Any]:
        """What is named, and what the engine trains."""
        engine = self.engine
        return [*engine.named_beside, *named(engine.objects, engine.saved_beside).values()]

    @cached_property
    def saved(self) -> Saved:
        """What of that which named objects hold goes on with them, and what may not."""
        return Saved(self.named)

    @cached_property
    def left_out(self) -> dict[str, list[torch.Tensor]]:
        """The tensors of what is trained that no state has, where a part of it is saved."""
        beside = self.engine.named_beside
        named = {id(unwrap(one)) for one in beside}
        found = {
            name: self.saved.left_out_of(value, beside)
            for name, value in self.objects.items()
            if isinstance(value, Module) and id(value) not in named
        }
        return {name: tensors for name, tensors in found.items() if tensors}

    @cached_property
    def known(self) -> frozenset[int]:
        """What a checkpoint takes care of, by `id`."""
        found = {id(self.engine.state.dataloader), id(self.engine)}
        for value in self.named:
            if id(value) in found:
                continue
            found.add(id(value))
            if isinstance(value, Optimizer) and keeps_groups(value):
                found |= {id(value.param_groups), *map(id, value.param_groups)}
            if isinstance(value, Module):
                parts = (*value.modules(), *value.parameters(), *value.buffers())
                found |= {id(part) for part in parts}
        return frozenset(found | self.saved.held)

    @cached_property
    def recorded(self) -> frozenset[int]:
        """The modules and optimizers whose numbers and words are recorded, by `id`."""
        return frozenset(
            id(one)
            for value in self.objects.values()
            for one in (value.modules() if isinstance(value, Module) else [value])
        )

    @cached_property
    def holders(self) -> Holders:
        """What handlers get or refer to, and on which users keep things of their own."""
        engine = self.engine
        holders = {**self.objects, "trainer": engine, "trainer.state": engine.state}
        return Holders(holders, engine.state_dict_user_keys, self.recorded)

    @cached_property
    def states(self) -> frozenset[str]:
        """The names that modules call their parameters and buffers by."""
        modules = (
            module
            for value in self.objects.values()
            if isinstance(value, Module)
            for module in value.modules()
        )
        return frozenset(
            name for module in modules for name in (*module._parameters, *module._buffers)
        )


def _told_apart(found: Iterable[tuple[str, Any]], by: str) -> dict[str, Any]:
    """Returns functions by what to call them, and those that are called alike by a number, too."""
    made: dict[str, Any] = {}
    for called, function in found:
        count = 1 + sum(one.startswith(called) for one in made)
        made[called if count == 1 else f"{called}, {by} {count}"] = function
    return made
