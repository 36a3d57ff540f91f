"""Placement: moves every tensor in a nest of containers, and leaves the containers as they were."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["map_tensors"]


def map_tensors(value: Any, move: Callable[[Any], Any]) -> Any:
    """Returns a nest of containers with `move` applied to every tensor in it.

    Goes into tuples, named tuples, lists, mappings and dataclasses, which keep their types; takes
    other objects that have a method `to` (packed sequences, sparse formats of other libraries) as
    tensors; returns everything else as it is.

    Args:
        value: the nest.
        move: called with each tensor, returns what takes its place.
    """
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, (str, bytes, int, float, bool)) or value is None:
        return value
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            if hasattr(value, "to"):
                return move(value)
            return type(value)(*(map_tensors(item, move) for item in value))
        moved = tuple(map_tensors(item, move) for item in value)
        return moved if type(value) is tuple else type(value)(moved)
    if isinstance(value, list):
        items = [map_tensors(item, move) for item in value]
        return items if type(value) is list else type(value)(items)
    if isinstance(value, dict) and type(value) is dict:
        return {key: map_tensors(item, move) for key, item in value.items()}
    return _map_objects(value, move)


def _map_objects(value: Any, move: Callable[[Any], Any]) -> Any:
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        return move(value)
    if isinstance(value, Mapping):
        moved = copy.copy(value)
        for key in value:
            moved[key] = map_tensors(value[key], move)  # type: ignore[index]
        return moved
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        moved = copy.copy(value)
        for field in dataclasses.fields(value):
            # object.__setattr__, because the dataclass may be frozen.
            object.__setattr__(moved, field.name, map_tensors(getattr(value, field.name), move))
        return moved
    return value
