"""Placement: moves every tensor in a nest of containers, and leaves the containers as they were."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

# What is returned as it is, before anything else is asked about it.
_PLAIN = (str, bytes, int, float, bool, complex, type(None))


def map_tensors(value: Any, move: Callable[[Any], Any]) -> Any:
    """Returns a nest of containers with `move` applied to every tensor in it.

    Goes into tuples, named tuples, lists, mappings and dataclasses, which keep their types and are
    never changed themselves; takes other objects that have a method `to` (packed sequences, the
    batches of other libraries) as tensors; returns everything else as it is.
    """
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, _PLAIN):
        return value
    untyped: Any = value  # as what it is, not as what a check of its type makes of it
    if type(value) is dict:
        return {key: map_tensors(item, move) for key, item in untyped.items()}
    # A type is no batch, though it may have every method of one.
    if not isinstance(value, type) and callable(getattr(value, "to", None)):
        return move(value)
    if isinstance(value, (tuple, list)):
        return _map_sequence(untyped, move)
    if isinstance(value, Mapping):
        return _map_mapping(untyped, move)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(untyped, move)
    return untyped


def _map_sequence(value: Any, move: Callable[[Any], Any]) -> Any:
    kind: Any = value.__class__
    moved = [map_tensors(item, move) for item in value]
    if kind is list:
        return moved
    # A named tuple takes its items one by one; other subclasses take them as a whole.
    return kind(*moved) if hasattr(value, "_fields") else kind(moved)


def _map_mapping(value: Mapping[Any, Any], move: Callable[[Any], Any]) -> Any:
    moved = {key: map_tensors(item, move) for key, item in value.items()}
    if isinstance(value, MappingProxyType):
        return MappingProxyType(moved)
    if isinstance(value, (dict, UserDict)):
        # A copy keeps what a subclass has besides its items, such as a default factory.
        copied: Any = copy.copy(value)
        copied.update(moved)
        return copied
    # Setting items on a shallow copy could reach the original through what the two share.
    make: Any = type(value)
    try:
        return make(moved)
    except TypeError as error:
        raise TypeError(
            f"A batch holds a {type(value).__name__}, which is a mapping but cannot be made from "
            f"a dict ({error}). Use a dict, or give the class a method `to(device)`."
        ) from error


def _map_dataclass(value: Any, move: Callable[[Any], Any]) -> Any:
    moved = copy.copy(value)
    for field in dataclasses.fields(value):
        # object.__setattr__, because the dataclass may be frozen.
        object.__setattr__(moved, field.name, map_tensors(getattr(value, field.name), move))
    return moved
