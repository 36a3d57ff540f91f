"""Nests of named objects: how their states are taken and given back, each by its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

from crosstrain.engine.engine import Engine
from crosstrain.engine.guards import is_collection, is_mapping, is_sequence
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.storage.errors import CheckpointMismatch
from crosstrain.engine.structure import named, rebuild_groups, recordable

__all__ = [
    "check_objects",
    "gather_states",
    "introduce",
    "restore_states",
    "unsaved_objects",
    "walk_objects",
]

# Objects by name, each a nest of mappings and sequences whose leaves are the objects.
Visit = Callable[[Any, tuple[Any, ...]], Any]


def _is_branch(value: Any) -> bool:
    # A module list has both: it is an object with a state, not a list of objects.
    return is_collection(value, (Mapping, list, tuple)) and not hasattr(value, "state_dict")


def _map(visit: Visit, value: Any, path: tuple[Any, ...] = ()) -> Any:
    if not _is_branch(value):
        return visit(value, path)
    if is_mapping(value):
        return {key: _map(visit, item, (*path, key)) for key, item in value.items()}
    return [_map(visit, item, (*path, index)) for index, item in enumerate(value)]


def walk_objects(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every object of a nest with its name, such as `models[0]`."""
    found: list[tuple[str, Any]] = []
    _map(lambda value, path: found.append((_name(path), value)), objects)
    yield from found


def _name(path: tuple[Any, ...]) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "itself"


def check_objects(objects: Any, method: str, argument: str) -> None:
    """Makes sure that every object of a nest has a method.

    Args:
        objects: the nest.
        method: `state_dict` or `load_state_dict`.
        argument: what the nest was passed as, for the message.

    Raises:
        TypeError: if the nest is no mapping, or an object in it lacks the method.
    """
    if not is_mapping(objects):
        raise TypeError(f"Argument `{argument}` should be a dictionary, but given {type(objects)}")
    for name, value in walk_objects(objects):
        if not hasattr(value, method):
            raise TypeError(
                f"Object {type(value)} should have `{method}` method: it is {name!r} in "
                f"`{argument}`"
            )


def unwrap(value: Any) -> Any:
    """Returns the module inside what `DistributedDataParallel` or `torch.compile` made of it."""
    inner = _inside(value)
    return value if inner is None else unwrap(inner)


def _inside(value: object) -> Any:
    if not isinstance(value, torch.nn.Module):
        return None
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    # torch.compile's wrapper names the module that it holds so, and torch itself relies on it.
    name = "module" if isinstance(value, wrappers) else "_orig_mod"
    return dict(value.named_children()).get(name)


def gather_states(objects: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Returns the states of a nest of objects, in a nest of the same form.

    Args:
        objects: the nest.
        rank: the process that saves; an optimizer that is spread over processes is gathered there.
    """
    return cast("dict[str, Any]", _map(lambda value, _: _state_of(unwrap(value), rank), objects))


def introduce(
    objects: Mapping[str, Any], states: Mapping[str, Any] | None = None
) -> list[tuple[Engine, str]]:
    """Tells each engine among objects what is saved beside it, or loaded.

    Args:
        objects: the objects by name.
        states: those that are about to be loaded: optimizers get the parameter groups that were
            added during the training.

    Returns:
        Each group that was added, as a phrase, with the engine that it was recorded with.
    """
    added: list[tuple[Engine, str]] = []
    for name, engine in objects.items():
        if not isinstance(engine, Engine):
            continue
        engine.saved_beside = recordable(dict(objects))
        state = None if states is None else states.get(name)
        if is_mapping(state) and engine.checks.structure != "off":
            known = named(engine.objects, engine.saved_beside)
            added += [(engine, what) for what in rebuild_groups(state.get("structure"), known)]
    return added


def _state_of(value: Any, rank: int) -> Any:
    # Only where somebody has imported it can there be one; importing it here would take a while.
    optim = sys.modules.get("torch.distributed.optim")
    spread = getattr(optim, "ZeroRedundancyOptimizer", None)
    if spread is not None and isinstance(value, spread):
        value.consolidate_state_dict(to=rank)
        if this_rank() != rank:
            return {}
    # An engine whose state is gathered from all ranks: on that which saves.
    state_on = getattr(value, "state_on", None)
    return value.state_dict() if state_on is None else state_on(rank)


def restore_states(
    objects: Mapping[str, Any],
    states: Mapping[str, Any],
    source: str,
    load: Callable[[str, Any, Any], None],
) -> None:
    """Gives each object of a nest its state; first makes sure that there is one for each.

    Args:
        objects: the nest.
        states: a nest of states, of the same form or with more in it.
        source: where the states come from, for messages.
        load: called with name, object and state.

    Raises:
        CheckpointMismatch: if an object has no state, or a list of them another length.
    """
    found: list[tuple[str, Any, Any]] = []
    try:
        _pair(objects, states, (), found)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{source}: {error}. Nothing was loaded") from None
    for name, value, state in found:
        load(name, value, state)


def _pair(value: Any, state: Any, path: tuple[Any, ...], found: list[tuple[str, Any, Any]]) -> None:
    if not _is_branch(value):
        found.append((_name(path), value, state))
        return
    if is_mapping(value):
        if not is_mapping(state):
            raise CheckpointMismatch(_other_form(path, "objects by name", state))
        missing = [key for key in value if key not in state]
        if missing:
            where = f" of {_name(path)!r}" if path else ""
            raise CheckpointMismatch(
                f"Key {', '.join(map(repr, missing))}{where} from to_load is not found in the "
                f"checkpoint, which holds {list(state)}. Leave it out of to_load, or load a "
                "checkpoint that was saved with it"
            )
        for key, item in value.items():
            _pair(item, state[key], (*path, key), found)
        return
    if not is_sequence(state):
        raise CheckpointMismatch(_other_form(path, "a list of objects", state))
    if len(state) != len(value):
        raise CheckpointMismatch(
            f"{_name(path)!r} is a list of {len(value)} objects and the checkpoint holds "
            f"{len(state)}"
        )
    for index, item in enumerate(value):
        _pair(item, state[index], (*path, index), found)


def _other_form(path: tuple[Any, ...], expected: str, state: Any) -> str:
    return (
        f"{_name(path)!r} should be {expected} and the checkpoint holds a {type(state).__name__} "
        "there"
    )


def unsaved_objects(trainer: Any, objects: Mapping[str, Any]) -> list[str]:
    """Names what a trainer trains and a nest of objects leaves out.

    Args:
        trainer: an engine; the factories' engines tell what they train by their `objects`.
        objects: what is to be saved or loaded.

    Returns:
        The names, as the trainer has them; empty if the trainer does not tell.
    """
    trained: Mapping[str, Any] = getattr(trainer, "objects", None) or {}
    known = {id(unwrap(value)) for _, value in walk_objects(objects)}
    return [name for name, value in trained.items() if id(unwrap(value)) not in known]
