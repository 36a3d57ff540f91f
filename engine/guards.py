"""Tests of what a value is, after which a type checker takes its contents for anything at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeGuard

import numpy as np
import torch

#: Objects of these packages are not looked into: what they keep is theirs.
OTHER_PACKAGES: Final = frozenset(
    {"crosstrain", "ignite", "numpy", "rich", "tensorboard", "torch", "torchdata", "tqdm", "wandb"}
)


def is_mapping(value: object) -> TypeGuard[Mapping[Any, Any]]:
    """Tells whether a value is a mapping."""
    return isinstance(value, Mapping)


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Tells whether a value is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_collection(value: object, kinds: tuple[type[Any], ...]) -> TypeGuard[Iterable[Any]]:
    """Tells whether a value is a collection of one of these types."""
    return isinstance(value, kinds)


def is_array(value: object) -> TypeGuard[np.ndarray[Any, Any]]:
    """Tells whether a value is a NumPy array."""
    return isinstance(value, np.ndarray)


def is_dense(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor is numbers in memory: not sparse, nested, quantized or of no data."""
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not odd


def is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    """Tells whether a value is a path, or text that may be one."""
    return isinstance(value, (str, os.PathLike))


def is_exact_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    """Tells whether a value is a tuple, and no instance of a subclass."""
    return type(value) is tuple


def is_exact_list(value: object) -> TypeGuard[list[Any]]:
    """Tells whether a value is a list, and no instance of a subclass."""
    return type(value) is list


def is_exact_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    """Tells whether a value is a dictionary, and no instance of a subclass."""
    return type(value) is dict


def is_users_object(value: object) -> bool:
    """Tells whether a value is an object with attributes, of a class of the user's."""
    kind: Any = type(value)
    root = kind.__module__.partition(".")[0]
    if root in OTHER_PACKAGES or root in sys.stdlib_module_names:
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def is_others(thing: Any) -> bool:
    """Tells whether a function or a class is no user's: of a known package, or of Python's own."""
    # A wrapper says that it is of the module of what it wraps.
    namespace = getattr(thing, "__globals__", None)
    module = namespace.get("__name__") if isinstance(namespace, dict) else None
    # The class of functions has attributes of these names that are neither.
    module = module or getattr(thing, "__module__", None)
    root = module.partition(".")[0] if isinstance(module, str) else ""
    return root in OTHER_PACKAGES or root in sys.stdlib_module_names
