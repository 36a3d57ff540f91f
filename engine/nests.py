"""Nests of named objects: mappings and sequences whose leaves are models, optimizers and the like.

What an object has is asked of its type: metrics, mocks and proxies answer every name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .guards import is_collection, is_mapping

Path = tuple[Any, ...]


def has(value: object, name: str) -> bool:
    """Tells whether an object, or its class, really has an attribute; nothing of it is run."""
    return inspect.getattr_static(value, name, None) is not None


def is_module(value: object) -> bool:
    """Tells whether an object is a module by its type, not by what it says of itself."""
    return issubclass(type(value), torch.nn.Module)


def is_branch(value: Any) -> bool:
    """Tells whether a value is a part of a nest, and no object with a state of its own."""
    return is_collection(value, (Mapping, list, tuple)) and not has(value, "state_dict")


def map_objects(visit: Callable[[Any, Path], Any], value: Any, path: Path = ()) -> Any:
    """Returns a nest of what a function returns for each object."""
    if not is_branch(value):
        return visit(value, path)
    if is_mapping(value):
        return {key: map_objects(visit, item, (*path, key)) for key, item in value.items()}
    return [map_objects(visit, item, (*path, index)) for index, item in enumerate(value)]


def walk_objects(objects: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields every object of a nest with its name, such as `models[0]`."""
    return ((name_of(path), value) for path, value in objects_by_path(objects))


def objects_by_path(objects: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """Returns every object of a nest with its path."""
    found: list[tuple[Path, Any]] = []
    map_objects(lambda value, path: found.append((path, value)), objects)
    return found


def name_of(path: Path) -> str:
    """Returns a path in words, such as `models[0]`."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "itself"


def unwrap(value: Any) -> Any:
    """Returns the module inside what `DistributedDataParallel` or `torch.compile` made of it."""
    inner = _inside(value)
    return value if inner is None else unwrap(inner)


def _inside(value: Any) -> Any:
    if not is_module(value):
        return None
    wrappers = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    # torch.compile's wrapper names the module that it holds so, and torch itself relies on it.
    name = "module" if isinstance(value, wrappers) else "_orig_mod"
    return dict(value.named_children()).get(name)
