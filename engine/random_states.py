"""Random states of a run: those of the host's global generators and of the backend's device."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import torch

from crosstrain.backends import random_state

if TYPE_CHECKING:
    from crosstrain.backends import Backend


def random_states(backend: Backend | None) -> dict[str, Any]:
    """Returns the random states of the host and of the backend's device."""
    return {**random_state.capture(), "device": {} if backend is None else backend.rng_state()}


def restore_random_states(state: Any, backend: Backend | None) -> None:
    """Restores what `random_states` returned, or the list that pytorch-ignite's engine saves."""
    if isinstance(state, Mapping):
        random_state.restore(state)
        if backend is not None and state.get("device"):
            backend.set_rng_state(state["device"])
        return
    python, torch_state, *rest = state
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(torch_state.cpu())
    if rest:
        numpy.random.set_state(rest[0])


def is_just_seeded() -> bool:
    """Tells whether torch's generator of the host has drawn nothing since it was seeded."""
    fresh = torch.Generator().manual_seed(torch.initial_seed())
    return torch.equal(fresh.get_state(), torch.get_rng_state())


@contextmanager
def random_states_kept(backend: Backend | None) -> Generator[None, None, None]:
    """Leaves the random states of host and device after the block as they were before it."""
    device = {} if backend is None else backend.rng_state()
    try:
        with random_state.preserved():
            yield
    finally:
        if backend is not None and device:
            backend.set_rng_state(device)
