"""Random states of the host: Python's, NumPy's and torch's global generators, as plain values."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch

__all__ = ["capture", "preserved", "restore", "seed"]


def seed(value: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (torch's on every device that it knows).

    Args:
        value: the seed, of at least 0. NumPy takes its lower 32 bits.

    Raises:
        ValueError: if it is negative.
    """
    if value < 0:
        raise ValueError(f"A seed is an integer of at least 0, got {value}.")
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """Returns the states of the three generators as tensors and plain types.

    They load with `torch.load(weights_only=True)`, which refuses NumPy's arrays.
    """
    version, words, gauss = random.getstate()
    state: Any = numpy.random.get_state(legacy=False)
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": _without_arrays(state),
        "torch": torch.get_rng_state(),
    }


def restore(state: Mapping[str, Any]) -> None:
    """Sets the three generators to what `capture` returned.

    Raises:
        ValueError: if one of them is missing.
    """
    missing = [name for name in ("python", "numpy", "torch") if name not in state]
    if missing:
        raise ValueError(
            f"The random state lacks {missing}; it has {list(state)}. Was it made by capture()?"
        )
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    numpy.random.set_state(_with_arrays(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())


@contextmanager
def preserved() -> Iterator[None]:
    """Leaves the three generators after the block as they were before it, whatever it draws."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def _without_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, numpy.ndarray):
        # As 64-bit integers: torch lacks most operations on uint32, which NumPy's keys are.
        return torch.from_numpy(value.astype(numpy.int64))
    return value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_arrays(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.numpy().astype(numpy.uint32)
    return value
