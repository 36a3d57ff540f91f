"""Host memory that counts as pinned: a flag, kept as long as the memory is."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy
import torch
from torch.utils._device import _device_constructors

# Where pinned memory begins.
_PINNED: set[int] = set()
_LIBRARIES: list[Any] = []
_AS_TENSOR: Any = torch.as_tensor


def is_pinned(tensor: torch.Tensor) -> bool:
    """Tells whether a tensor of the CPU lies in pinned memory."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def _pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    nbytes = tensor.numel() * tensor.element_size()
    buffer = numpy.empty(max(nbytes, 1), numpy.uint8)
    address = int(buffer.ctypes.data)
    _PINNED.add(address)
    weakref.finalize(buffer, _PINNED.discard, address)
    raw = torch.from_numpy(buffer)[:nbytes]
    return raw.view(tensor.dtype).view(tensor.size()).copy_(tensor)


def _copying(make: Any, name: str) -> Any:
    """Returns a function of torch that makes a tensor of data, and can do so on the device.

    torch's own would look for a hook in C++ there.
    """

    @functools.wraps(make)
    def copied(data: Any, *args: Any, device: Any = None, **options: Any) -> Any:
        # A default device is in force in `empty`; torch's own way to ask for it ends here again.
        where = torch.empty(0).device if device is None else torch.device(device)
        if where.type != name:
            return make(data, *args, device=device, **options)
        wants = options.pop("requires_grad", False)
        if isinstance(data, torch.Tensor) and data.device.type == name:
            found = data.detach().to(where, options.get("dtype"), copy=make is not _AS_TENSOR)
        else:
            found = make(data, *args, device="cpu", **options).to(where)
        return found.requires_grad_(wants) if wants else found

    return copied


def install(name: str) -> None:
    """Has torch make tensors on the device and in pinned memory, where it asks for hooks in C++."""
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
    library.impl("is_pinned", lambda tensor, device=None: is_pinned(tensor), "CPU")
    library.impl("_pin_memory", _pin, "CPU")
    _LIBRARIES.append(library)
    places: Any = torch
    plain: Any = torch.empty
    # A default device is told to the functions that torch finds here: to its own, not to ours.
    _device_constructors()

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made: torch.Tensor = plain(*size, **options)
        return made.pin_memory() if pin_memory else made

    places.empty = empty
    places.tensor = _copying(places.tensor, name)
    places.as_tensor = _copying(_AS_TENSOR, name)
    places.asarray = _copying(places.asarray, name)
