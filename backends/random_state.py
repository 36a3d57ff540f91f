"""Random states of the host: Python's, NumPy's and torch's global generators, as plain values."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy
import torch


def seed(value: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (on every device that torch knows).

    Args:
        value: the seed, from 0 to 2**63 - 1. NumPy takes its lower 32 bits.

    Raises:
        ValueError: if it is out of range.
    """
    if not 0 <= value < 2**63:
        raise ValueError(f"A seed is an integer from 0 to 2**63 - 1, got {value}.")
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """Returns the states of the three generators as tensors and plain types.

    They load with `torch.load(weights_only=True)`, which refuses NumPy's arrays.
    """
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": without_arrays(_numpy_state()),
        "torch": torch.get_rng_state(),
    }


def restore(state: Mapping[str, Any]) -> None:
    """Sets the three generators to what `capture` returned."""
    missing = [name for name in ("python", "numpy", "torch") if name not in state]
    if missing:
        raise ValueError(
            f"The random state lacks {missing}; it has {list(state)}. Was it made by capture()?"
        )
    present = _numpy_state()
    kind, wanted = present["bit_generator"], state["numpy"]["bit_generator"]
    if kind != wanted:
        raise ValueError(
            f"NumPy's global generator is a {kind} here, and the state is that of a {wanted}. "
            f"Call numpy.random.set_bit_generator(numpy.random.{wanted}()) first."
        )
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    numpy.random.set_state(with_arrays(state["numpy"], present))
    torch.set_rng_state(state["torch"].cpu())


@contextmanager
def preserved() -> Generator[None, None, None]:
    """Leaves the three generators after the block as they were before it, whatever it draws."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def _numpy_state() -> dict[str, Any]:
    return numpy.random.get_state(legacy=False)


def without_arrays(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nest of mappings with NumPy's arrays as tensors, which load without pickle."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain[key] = without_arrays(cast("Mapping[str, Any]", value))
        elif isinstance(value, numpy.ndarray):
            # As signed 64-bit integers: torch lacks most operations on unsigned ones. The cast
            # wraps around, so 64-bit words keep their bits.
            words = cast("Any", value).astype(numpy.int64)
            plain[key] = torch.from_numpy(words)
        else:
            plain[key] = value
    return plain


def with_arrays(values: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `without_arrays`; `present` is a state of the same kind, with the dtypes wanted."""
    arrays: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            arrays[key] = with_arrays(cast("Mapping[str, Any]", value), present[key])
        elif isinstance(value, torch.Tensor):
            arrays[key] = value.cpu().numpy().astype(present[key].dtype)
        else:
            arrays[key] = value
    return arrays
