"""What a training has of its own that may hold state: what `verify` names as a usual cause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy
import torch

from crosstrain.engine import Events

from .target import Training

# Packages whose handlers, samplers and modules are known to keep nothing that is lost.
_KNOWN: Final = ("crosstrain", "torch", "torchdata")
# How many of a kind are named.
_MOST: Final = 3


def traits_of(training: Training) -> dict[str, list[str]]:
    """Returns the names of what is a user's own, by kind; at most three of each.

    Returns:
        `epoch handlers`: functions that run when an epoch begins; `samplers`: samplers of a class
        of theirs; `attributes`: attributes of their modules that no state_dict has.
    """
    found = {
        "epoch handlers": _epoch_handlers(training.trainer),
        "samplers": _samplers(training.data),
        "attributes": _attributes(training),
    }
    return {kind: list(dict.fromkeys(names))[:_MOST] for kind, names in found.items()}


def _is_own(thing: Any) -> bool:
    return getattr(thing, "__module__", "").partition(".")[0] not in _KNOWN


def _epoch_handlers(trainer: Any) -> Iterator[str]:
    for handler in trainer.slot(Events.EPOCH_STARTED).bound():
        while hasattr(handler, "func"):
            handler = handler.func
        name = getattr(handler, "__qualname__", type(handler).__qualname__)
        if _is_own(handler):
            yield name.rpartition("<locals>.")[2]


def _samplers(data: Any) -> Iterator[str]:
    batches = getattr(data, "batch_sampler", None)
    for sampler in (getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)):
        if sampler is not None and _is_own(type(sampler)):
            yield type(sampler).__name__


def _attributes(training: Training) -> Iterator[str]:
    kinds = (int, float, list, torch.Tensor, torch.Generator, numpy.ndarray, numpy.random.Generator)
    for thing in training.to_save.values():
        if not isinstance(thing, torch.nn.Module):
            continue
        for module in thing.modules():
            if _is_own(type(module)):
                for name, value in vars(module).items():
                    own = not name.startswith("_") and name != "training"
                    if own and isinstance(value, kinds):
                        yield f"{type(module).__name__}.{name}"
