"""Tests of what a value is, after which a type checker takes its contents for anything at all."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, TypeGuard, cast

import torch
from torch.nn.parameter import is_lazy

# Those that write down what others have done.
_LOGGERS: Final = frozenset(
    {"aim", "clearml", "comet_ml", "loguru", "matplotlib", "mlflow", "neptune", "rich", "structlog"}
    | {"tensorboard", "tensorboardX", "tqdm", "visdom", "wandb"}
)
#: Objects of these packages are not looked into: what they keep is theirs.
OTHER_PACKAGES: Final = _LOGGERS | {"crosstrain", "ignite", "numpy", "torch", "torchdata"}


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Tells whether a value is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_a(value: object, *kinds: type[Any]) -> bool:
    """Tells whether a value is of one of these classes: its type, and not what it says it is.

    To ask the value, as `isinstance` does in the end, may raise anything.
    """
    return issubclass(type(value), kinds)


def is_dense(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor is numbers in memory: not sparse, nested, quantized or of no data."""
    odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
    return tensor.layout is torch.strided and not odd


def has_memory(tensor: torch.Tensor) -> bool:
    """Tells whether the numbers of a tensor lie in memory of its own, and not of others in it.

    A class that carries out torch's operations itself may have none, nor has a lazy parameter, and
    that of others may have been given back.
    """
    kind, usual = cast("Any", type(tensor)), cast("Any", torch.Tensor)
    if kind.__torch_dispatch__ != usual.__torch_dispatch__ or is_lazy(tensor):
        return False
    if tensor.layout is not torch.strided or tensor.is_nested:
        return True
    return not tensor.is_meta and (tensor.untyped_storage().nbytes() > 0 or tensor.numel() == 0)


def is_users_object(value: object) -> bool:
    """Tells whether a value is an object with attributes, of a class of the user's."""
    return not is_others(type(value)) and own_attributes(value) is not None


def is_others(thing: Any) -> bool:
    """Tells whether a function or a class is no user's: of a known package, or of Python's own."""
    # A wrapper says that it is of the module of what it wraps.
    namespace = getattr(thing, "__globals__", None)
    module = namespace.get("__name__") if isinstance(namespace, dict) else None
    root = (module or module_of(thing)).partition(".")[0]
    return root in OTHER_PACKAGES or root in sys.stdlib_module_names


def module_of(thing: object) -> str:
    """Returns the name of the module that a class or a function says it is of; "" if of none."""
    module = getattr(thing, "__module__", None)
    # The class of functions has an attribute of that name that is none.
    return module if isinstance(module, str) else ""


def own_attributes(value: object) -> dict[str, Any] | None:
    """Returns the dictionary of an object's attributes; None if it has none, or does not give it.

    What the object answers itself, as a proxy or a mock does, is not asked.
    """
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # noqa: BLE001  a property of the user's of that name may raise anything
        return None
    return found if isinstance(found, dict) else None
