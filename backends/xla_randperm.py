"""`torch.randperm` on an XLA device, which cannot be repeated: refused where bits must be."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import BackendError

__all__ = ["refuse_randperm"]

_WHY = (
    "torch.randperm on an XLA device draws from a state of the process that can be neither read "
    "nor set, so it cannot be repeated"
)


@contextmanager
def refuse_randperm(warn_only: bool) -> Generator[None, None, None]:
    """Makes `torch.randperm` on an XLA device an error, inside.

    Args:
        warn_only: it warns instead, and is drawn from the CPU's generator, which can be repeated.
    """
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # torch warns that the operation has a kernel already: that is the point.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl("randperm", _warn if warn_only else _refuse, "XLA")
    try:
        yield
    finally:
        # Brings back the kernel that was there before.
        library._destroy()


def _refuse(*_: Any, **__: Any) -> torch.Tensor:
    raise BackendError(
        f"{_WHY}. In deterministic mode draw it on the CPU: torch.randperm(n).to(device)."
    )


def _warn(size: int, *, device: torch.device, **options: Any) -> torch.Tensor:
    warnings.warn(f"{_WHY}: it is drawn on the CPU.", stacklevel=2)
    options.pop("pin_memory", None)
    return torch.randperm(size, **options).to(device)
