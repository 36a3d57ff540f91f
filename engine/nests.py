"""Nests of named objects: mappings and sequences whose leaves are models, optimizers and the like.

What an object has is asked of its type: metrics, mocks and proxies answer every name.
"""

from __future__ import annotations

import collections
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import torch

from .guards import is_a

Path = tuple[Any, ...]

#: What has no identity of its own: equal ones may be one object, whoever holds them.
SCALARS: Final = (bool, int, float, complex, str, bytes, type(None))
_SCALAR_TYPES: Final = frozenset(SCALARS)
#: What holds other things, of Python's own.
NESTS: Final = (dict, list, tuple, set, frozenset, collections.deque)


def has(value: object, name: str) -> bool:
    """Tells whether an object, or its class, really has an attribute; nothing of it is run."""
    return inspect.getattr_static(value, name, None) is not None


def is_module(value: object) -> bool:
    """Tells whether an object is a module by its type, not by what it says of itself."""
    return is_a(value, torch.nn.Module)


def is_branch(value: Any) -> bool:
    """Tells whether a value is a part of a nest, and no object with a state of its own."""
    return isinstance(value, (Mapping, list, tuple)) and not has(value, "state_dict")


def is_plain_row(value: Any, first: int | None = None) -> bool:
    """Tells whether a list, tuple or dictionary holds numbers and words, and nothing else.

    The rows of a history or a table are many: what looks for objects passes over them fast.

    Args:
        value: what may be a row.
        first: how many of its items are looked at; None: all.
    """
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list and type(value) is not tuple:
        return False
    return _SCALAR_TYPES.issuperset(map(type, islice(value, first)))


def map_objects(visit: Callable[[Any, Path], Any], value: Any, path: Path = ()) -> Any:
    """Returns a nest of what a function returns for each object."""
    if not is_branch(value):
        return visit(value, path)
    if isinstance(value, Mapping):
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
