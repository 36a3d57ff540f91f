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

from crosstrain.engine.guards import is_mapping

__all__ = ["LaidOver"]


class LaidOver:
    """Keeps copies of the states of objects, and puts them back where they have changed.

    Args:
        objects: by name; each has `state_dict` and `load_state_dict`.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = dict(objects)
        self._states = {name: _copied(_state(value)) for name, value in objects.items()}

    def lay(self) -> list[str]:
        """Gives each object that has changed the state that was kept; returns their names."""
        changed: list[str] = []
        for name, value in self._objects.items():
            kept = self._states[name]
            if not _same(_state(value), kept):
                changed.append(name)
                _load(value, _copied(kept))
        return changed


def _state(value: Any) -> Any:
    if not isinstance(value, Optimizer):
        return value.state_dict()
    # By parameter: what is put back must not be cast, as `load_state_dict` does.
    groups = [
        {key: item for key, item in group.items() if key != "params"}
        for group in value.param_groups
    ]
    return {"groups": groups, "state": [dict(value.state[p]) for p in _parameters(value)]}


def _parameters(optimizer: Optimizer) -> list[Any]:
    found = [p for group in optimizer.param_groups for p in group["params"]]
    return [p for p in found if p in optimizer.state]


def _load(value: Any, state: Any) -> None:
    if not isinstance(value, Optimizer):
        value.load_state_dict(state)
        return
    known = [p for group in value.param_groups for p in group["params"]]
    for group, kept in zip(value.param_groups, state["groups"], strict=False):
        group.update(kept)
    held = _parameters(value)
    for parameter in known:
        value.state.pop(parameter, None)
    for parameter, kept in zip(held, state["state"], strict=False):
        value.state[parameter] = kept


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.device == other.device
            and torch.equal(one, other)
        )
    if is_mapping(one):
        return (
            is_mapping(other)
            and list(one) == list(other)
            and all(_same(item, other[key]) for key, item in one.items())
        )
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, (list, tuple))
            and len(one) == len(other)
            and all(map(_same, one, other))
        )
    return type(one) is type(other) and bool(one == other)
