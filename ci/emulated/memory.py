"""Host memory that counts as pinned: a flag, kept as long as the memory is."""

from __future__ import annotations

import weakref
from typing import Any

import numpy
import torch

__all__ = ["install", "is_pinned"]

# Where pinned memory begins.
_PINNED: set[int] = set()
_LIBRARIES: list[Any] = []


def is_pinned(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor of the CPU lies in pinned memory."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def _pinned_bytes(nbytes: int) -> torch.Tensor:
    buffer = numpy.empty(max(nbytes, 1), numpy.uint8)
    address = int(buffer.ctypes.data)
    _PINNED.add(address)
    weakref.finalize(buffer, _PINNED.discard, address)
    return torch.from_numpy(buffer)[:nbytes]


def _pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    raw = _pinned_bytes(tensor.numel() * tensor.element_size())
    return raw.view(tensor.dtype).view(tensor.size()).copy_(tensor)


def install() -> None:
    """Has torch know pinned memory, though no hooks in Python can tell it how to make some."""
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
    library.impl("is_pinned", lambda tensor, device=None: is_pinned(tensor), "CPU")
    library.impl("_pin_memory", _pin, "CPU")
    _LIBRARIES.append(library)
    places: Any = torch
    plain: Any = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made: torch.Tensor = plain(*size, **options)
        return made.pin_memory() if pin_memory else made

    places.empty = empty
