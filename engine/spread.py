"""States whose tensors lie in several processes: taken apart, named, put together, spread again.

A tensor that is spread over processes is a DTensor. Everything else of a state, its containers,
numbers and ordinary tensors, is each process's own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .nests import Path, has, objects_by_path, unwrap, walk_objects


@dataclass
class Split:
    """A nest of states without its spread tensors, and these by name."""

    #: The nest; None where a spread tensor was.
    tree: Any
    shards: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    #: The paths at which they were, with their names.
    places: list[tuple[Path, str]] = field(default_factory=list[tuple[Path, str]])


def is_spread(value: Any) -> bool:
    """Tells whether a value is a tensor whose parts lie in several processes."""
    # Only where somebody has imported it can there be one; importing it here would take a while.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def keeps_gradients(model: torch.nn.Module) -> bool:
    """Tells whether FSDP keeps gradients of a model to itself, which it has not shared yet."""
    return any(
        its.unsharded_accumulated_grad is not None
        or getattr(getattr(its, "_unsharded_param", None), "grad", None) is not None
        for its in _sharded_by_fsdp(model)
    )


def lasting_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Returns a model's parameters and buffers, as they are between two passes.

    FSDP gives a module whole parameters for a pass, and its outermost one keeps them where no
    gradients are computed; the parts they are put together of stay what they are.
    """
    shards = {
        id(whole): its.sharded_param
        for its in _sharded_by_fsdp(model)
        if (whole := getattr(its, "_unsharded_param", None)) is not None
    }
    return [shards.get(id(one), one) for one in (*model.parameters(), *model.buffers())]


def _sharded_by_fsdp(model: torch.nn.Module) -> Iterator[Any]:
    """Yields what FSDP keeps of each parameter that it has sharded."""
    sharding: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = () if sharding is None else (sharding.FSDPModule,)
    modules: list[Any] = [one for one in model.modules() if isinstance(one, kinds)]
    for one in modules:
        group = one._get_fsdp_state()._fsdp_param_group
        yield from () if group is None else group.fsdp_params


def has_spread(states: Any) -> bool:
    """Tells whether there is a spread tensor in a nest of states."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    # Without recursion, each container once: nests are deep and shared as users make them.
    seen: dict[int, Any] = {}
    waiting = [states]
    while waiting:
        value = waiting.pop()
        if is_spread(value):
            return True
        items: Any = value.values() if isinstance(value, Mapping) else value
        if (items is not value or isinstance(value, (list, tuple))) and id(value) not in seen:
            seen[id(value)] = value
            waiting.extend(items)
    return False


def split(states: Any, names: Mapping[Path, Sequence[str]]) -> Split:
    """Takes the spread tensors out of a nest of states; the nest itself stays as it is."""
    found = Split(None)
    # Containers without spread tensors stay as they are; each is looked through once only.
    plain: dict[int, Any] = {}

    def take_out(value: Any, path: Path) -> Any:
        if id(value) in plain:
            return value
        if not has_spread(value):
            plain[id(value)] = value
            return value
        if is_spread(value):
            name = _key(path, names)
            if name in found.shards:
                name = f"{name}#{len(found.shards)}"
            found.shards[name] = value
            found.places.append((path, name))
            return None
        items: Any
        if isinstance(value, Mapping):
            items = value.items()
        elif type(value) is list or type(value) is tuple:
            items = enumerate(value)
        else:
            return value
        taken = [(key, item, take_out(item, (*path, key))) for key, item in items]
        changed = [(key, new) for key, old, new in taken if new is not old]
        if not changed:
            return value
        made: Any = list(value) if type(value) is tuple else copy.copy(value)
        for key, new in changed:
            made[key] = new
        return tuple(made) if type(value) is tuple else made

    found.tree = take_out(states, ())
    return found


def _key(path: Path, names: Mapping[Path, Sequence[str]]) -> str:
    """Joins a path to a name; an optimizer's states are named by the parameter, not its place."""
    for length in range(1, len(path) - 2):
        known = names.get(path[:length])
        if known is not None and path[length] == "state" and isinstance(path[length + 1], int):
            path = (*path[: length + 1], known[path[length + 1]], *path[length + 2 :])
            break
    return ".".join(map(str, path))


def parameter_names(objects: Mapping[str, Any]) -> dict[Path, list[str]]:
    """Names the parameters of each optimizer in a nest of objects, in the order of its groups.

    A parameter is named by the model that it is of, or, of no model, by its place.
    """
    known: dict[int, str] = {}
    leaves = objects_by_path(objects)
    for path, value in leaves:
        if isinstance(value, torch.nn.Module):
            for name, parameter in unwrap(value).named_parameters():
                known.setdefault(id(parameter), ".".join([*map(str, path), name]))
    return {
        path: [known.get(id(p), str(place)) for place, p in enumerate(parameters_of(value))]
        for path, value in leaves
        if isinstance(value, torch.optim.Optimizer)
    }


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the parameters that an optimizer steps, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def object_at(objects: Mapping[str, Any], path: Path) -> tuple[Any, Path]:
    """Finds the object of a nest, or None, in whose state a path leads, and the rest of it."""
    value: Any = objects
    for at, key in enumerate(path):
        if value is not objects and has(value, "state_dict"):
            return unwrap(value), path[at:]
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None, path[at:]
    return None, ()


def at_path(tree: Any, path: Path) -> tuple[Any, Any]:
    """Returns the container and the key that a path ends at."""
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


def spread(target: Any, state: Any) -> Any:
    """Returns a state of whole tensors as one of spread tensors, where the object's own are.

    Each process keeps its part of what it was given; nothing is sent.
    """
    if "torch.distributed.tensor" not in sys.modules or not isinstance(state, Mapping):
        return state
    if isinstance(target, torch.nn.Module):
        own: Mapping[str, Any] = target.state_dict()
        if not any(map(is_spread, own.values())):
            return state
        made: Any = copy.copy(state)
        for name, like in own.items():
            if name in state:
                made[name] = spread_like(state[name], like)
        return made
    if isinstance(target, torch.optim.Optimizer) and isinstance(state.get("state"), Mapping):
        parameters = parameters_of(target)
        if not any(map(is_spread, parameters)):
            return state
        states = {
            place: _spread_values(values, parameters, place)
            for place, values in state["state"].items()
        }
        return {**state, "state": states}
    return state


def _spread_values(values: Any, parameters: list[torch.Tensor], place: Any) -> Any:
    known = isinstance(place, int) and 0 <= place < len(parameters) and isinstance(values, Mapping)
    if not known:
        return values
    return {key: spread_like(value, parameters[place]) for key, value in values.items()}


def is_sharded(objects: Mapping[str, Any]) -> bool:
    """Tells whether a model among objects, or nests of them, has parameters that are spread."""
    return any(
        is_spread(parameter)
        for _, thing in walk_objects(objects)
        if isinstance(thing, torch.nn.Module)
        for parameter in thing.parameters()
    )


def spread_like(value: Any, like: Any) -> Any:
    """Returns this process's part of a whole tensor, where it is to lie as a spread one does."""
    whole = isinstance(value, torch.Tensor) and not is_spread(value) and is_spread(like)
    if not whole or value.shape != like.shape:
        return value
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
