"""What a checkpoint gave the objects of a run, kept and laid over what handlers change of it.

A run that goes on within an epoch fires STARTED and EPOCH_STARTED once more. Handlers reset there
what the rest of the epoch has filled: metrics, hidden states, counters. What the straight run had
at that iteration is what the checkpoint holds.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from crosstrain.engine.digest import same


class LaidOver:
    """Keeps copies of the states of objects, and puts them back where they have changed.

    Args:
        objects: by name; each has `state_dict` and `load_state_dict`.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._kept = {name: (value, _kept(value)) for name, value in objects.items()}

    def lay(self) -> list[str]:
        """Gives each object that has changed the state that was kept; returns their names."""
        changed: list[str] = []
        for name, (_, kept) in self._kept.items():
            kept.end()
            if not kept.holds():
                changed.append(name)
                kept.lay()
        return changed


class _Kept:
    """The state of one object.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        self._state = _copied(value.state_dict())

    def holds(self) -> bool:
        """Tells whether the object still has this state."""
        return same(self._value.state_dict(), self._state)

    def end(self) -> None:
        """Ends what was done for the handlers."""

    def lay(self) -> None:
        """Gives the object this state."""
        self._value.load_state_dict(_copied(self._state))


class _KeptOptimizer(_Kept):
    """The state of an optimizer, which its `load_state_dict` would cast to its parameters' type.

    A handler that adds a group of parameters when an epoch begins adds one that is there already:
    the checkpoint has it, and it was added again before the optimizer took its state. So that group
    is left as it is.
    """

    def __init__(self, value: Optimizer) -> None:
        self._value = value
        present = [{*map(id, group["params"])} for group in value.param_groups]
        add = value.add_param_group

        def add_new(group: dict[str, Any]) -> None:
            if {*map(id, _parameters_of(group))} not in present:
                add(group)

        self._adds = vars(value).get("add_param_group")
        vars(value)["add_param_group"] = add_new
        self._groups = [_copied(_without_parameters(group)) for group in value.param_groups]
        # Where each tensor lies is kept, too: some lie elsewhere than the parameter.
        self._states = [
            (parameter, _copied(state), {k: _device(item) for k, item in state.items()})
            for parameter, state in value.state.items()
        ]

    def holds(self) -> bool:
        """Tells whether the optimizer still has this state."""
        value = self._value
        return (
            len(value.param_groups) == len(self._groups)
            and len(value.state) == len(self._states)
            and all(
                same(_without_parameters(group), kept)
                for group, kept in zip(value.param_groups, self._groups, strict=True)
            )
            and all(
                p in value.state and same(dict(value.state[p]), kept) for p, kept, _ in self._states
            )
        )

    def end(self) -> None:
        """Lets groups be added as ever."""
        if self._adds is None:
            vars(self._value).pop("add_param_group", None)
        else:
            vars(self._value)["add_param_group"] = self._adds

    def lay(self) -> None:
        """Gives the optimizer this state; groups that were added are left as they are."""
        value = self._value
        for group, kept in zip(value.param_groups, self._groups, strict=False):
            group.update(_copied(kept))
        value.state.clear()
        for parameter, kept, devices in self._states:
            value.state[parameter] = {
                key: item.to(devices[key], copy=True) if isinstance(item, torch.Tensor) else item
                for key, item in kept.items()
            }


def _kept(value: Any) -> _Kept:
    return _KeptOptimizer(value) if isinstance(value, Optimizer) else _Kept(value)


def _parameters_of(group: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the parameters of a group that is to be added, which may come as a generator."""
    given = group["params"]
    if not isinstance(given, torch.Tensor):
        given = group["params"] = list(given)
        # A parameter may come with its name.
        return [one[1] if isinstance(one, tuple) else one for one in given]
    return [given]


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in group.items() if key != "params"}


def _device(value: Any) -> torch.device | None:
    return value.device if isinstance(value, torch.Tensor) else None


def _copied(value: Any) -> Any:
    """Copies a nest; plain tensors to the host, as a checkpoint has them."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to("cpu", copy=True) if type(value) is torch.Tensor else value.clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)
