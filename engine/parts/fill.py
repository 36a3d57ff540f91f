"""The spread tensors of a checkpoint in parts, put where they belong in states and objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from crosstrain.engine.spread import at_path, is_spread, object_at
from crosstrain.engine.storage.errors import CheckpointCorrupt, CheckpointMismatch

from .index import Entry
from .read import Parts, Place


def filled(
    found: Parts, states: Any, places: Sequence[Place], objects: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads the spread tensors into the objects' own parts, or, where there are none, whole.

    Args:
        found: the checkpoint.
        states: its states without spread tensors; these are put in.
        places: where these belong.
        objects: the objects that the states are for; empty for none.
    """
    # torch takes half a second to import it, and most runs never need it.
    from .torch_parts import read_parts

    index = found.index()
    targets: dict[str, torch.Tensor] = {}
    for path, name in places:
        if name not in index:
            raise CheckpointCorrupt(f"{found.path} is not a good checkpoint: no part of {name!r}")
        value, rest = object_at(objects, path) if objects else (None, path)
        if objects and value is None:
            continue  # left out of to_load
        targets[name] = _target(value, rest, index[name])
        container, key = at_path(states, path)
        container[key] = targets[name]
    read_parts(found, index, targets)
    found.check_same()
    return dict(states)


def _target(value: Any, rest: tuple[Any, ...], entry: Entry) -> torch.Tensor:
    like: Any = None
    if isinstance(value, torch.nn.Module) and len(rest) == 1:
        like = value.state_dict().get(rest[0])
        if is_spread(like) and like.shape == entry.size and like.dtype == entry.dtype:
            return like  # type: ignore[no-any-return]
    elif isinstance(value, torch.optim.Optimizer) and len(rest) == 3 and rest[0] == "state":
        parameters = [p for group in value.param_groups for p in group["params"]]
        if isinstance(rest[1], int) and rest[1] < len(parameters):
            like = parameters[rest[1]]
    if is_spread(like) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.dtype)


def reordered(
    states: Any, places: list[Place], where: tuple[Any, ...], then: list[str], now: list[str]
) -> list[Place]:
    """Puts an optimizer's states into the order in which its parameters are now.

    Args:
        states: the states; changed.
        places: where spread tensors belong in them; those in the new order are returned.
        where: the optimizer's path.
        then: the names of its parameters when it was saved.
        now: their names now.
    """
    container, key = at_path(states, where)
    state = container[key]
    if len(state["param_groups"]) > 1:
        raise CheckpointMismatch(
            f"The optimizer at {'.'.join(map(str, where))} has several groups, and its parameters "
            "are in another order than in the checkpoint: whose settings are whose cannot be told. "
            "Make the optimizer with its parameters in the order of then"
        )
    to = {then.index(name): now.index(name) for name in now}
    moved = {to.get(place, place): values for place, values in state["state"].items()}
    container[key] = {**state, "state": moved}
    at = len(where)
    return [
        ((*path[: at + 1], to.get(path[at + 1], path[at + 1]), *path[at + 2 :]), name)
        if path[:at] == where and len(path) > at + 1 and path[at] == "state"
        else (path, name)
        for path, name in places
    ]
