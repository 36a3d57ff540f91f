"""An accelerator in Python, `emu`: tensors of its own, a generator of its own, counted host reads.

torch 2.13 lets a type of device be written in Python. A tensor of `emu:0` holds a CPU tensor, which
nobody else sees: an operation that mixes devices raises, as on a real one. It has no pinned memory,
and its streams keep no order. Importing this registers the device, once a process.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "emu"
#: How often each operation has read something of the device on the host.
READS: Counter[str] = Counter()
_READERS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Module(_DummyBackendModule):
    """What is known as `torch.emu`."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def manual_seed(self, seed: int) -> None:
        """Seeds the device's generator; the same seed gives other numbers than on the CPU."""
        self.state = torch.Generator().manual_seed(seed + 7919).get_state()

    def manual_seed_all(self, seed: int) -> None:
        """As `torch.manual_seed` asks for."""
        self.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        """Returns the generator's state."""
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        """Sets the generator's state."""
        self.state = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Autocast has no kernels here."""
        return []

    def device_count(self) -> int:
        """One device."""
        return 1


MODULE = Module()
_setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)


class Emulated(torch.Tensor):
    """A tensor of the device.

    Args:
        raw: what it holds.
    """

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Any:
        """Makes a tensor that says that it is on the device."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    flat = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    ours = [one for one in flat if isinstance(one, Emulated)]
    copies = name in ("copy_", "_to_copy", "_copy_from")
    strangers = [one for one in flat if not isinstance(one, Emulated) and one.dim() > 0]
    if ours and strangers and not copies:
        raise RuntimeError(f"{func} mixes devices: {sorted({str(one.device) for one in flat})}")
    target = kwargs.get("device")
    to_host = target is not None and torch.device(target).type == "cpu"
    from_device = copies and bool(ours) and (to_host or not isinstance(args[0], Emulated))
    if name in _READERS or from_device:
        READS[name] += 1
    plain = pytree.tree_map(_bare, (args, kwargs))
    out = _drawn(func, *plain) if torch.Tag.nondeterministic_seeded in func.tags else None
    out = func(*plain[0], **plain[1]) if out is None else out
    if to_host:
        return out
    known = {id(one.raw): one for one in ours} if func._schema.is_mutable else {}
    if name == "copy_" and not isinstance(args[0], Emulated):
        return out

    def wrapped(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return known[id(one)] if id(one) in known else Emulated(one)

    return pytree.tree_map(wrapped, out)


def _drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an operation that draws, from the device's generator."""
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(MODULE.state)
    try:
        return func(*args, **kwargs)
    finally:
        MODULE.state = torch.default_generator.get_state()
        torch.default_generator.set_state(kept)


def _bare(one: Any) -> Any:
    if isinstance(one, Emulated):
        return one.raw
    return torch.device("cpu") if isinstance(one, torch.device) and one.type == NAME else one


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
