"""The snapshot: what a deterministic engine's state holds besides its counters, and its checks."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy
import torch

from crosstrain.backends import spec_of
from crosstrain.engine.errors import ResumeWarning, warn_user

if TYPE_CHECKING:
    from crosstrain.backends import Backend

FORMAT: Final = 1
KEYS: Final = frozenset(
    {
        "format",
        "seed",
        "streams",
        "progress",
        "position",
        "rng_states",
        "backend",
        "step",
        "environment",
        "exact",
    }
)
#: What newer versions write besides, which a state need not have, with what is not checked of a
#: resume from a state that does not have it.
OPTIONAL_KEYS: Final[Mapping[str, str]] = {
    "epoch_rng_states": "the random states of the epoch's beginning, for handlers of EPOCH_STARTED",
    "shown": "the last output and metrics, for handlers that read them before the first batch",
    "made": "what the run had made for itself, which is made again",
    "structure": "the structure of what is trained: what wants gradients, parameter groups",
}


def environment(backend: Backend | None) -> dict[str, Any]:
    """Returns what decides the bits of a run besides its state: threads, device, versions."""
    found = None if backend is None else backend.probe()
    return {
        "backend": spec_of(backend),
        "devices": "" if found is None else ", ".join(found.devices),
        "world size": 1 if backend is None else backend.world.size,
        "cores": _cores(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "numpy": numpy.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        **({} if found is None else found.versions),
        **settings(),
    }


def settings() -> dict[str, Any]:
    """Returns those of an environment that a program may change at any time."""
    return {
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
    }


def _cores() -> int | None:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return os.cpu_count() if affinity is None else len(affinity(0))


def differences(
    then: Mapping[str, Any], now: Mapping[str, Any], but: Iterable[str] = ()
) -> list[str]:
    """Returns each condition that is not what it was when a state was written, as a phrase.

    Args:
        then: the conditions then.
        now: those of this process.
        but: names that are left out, and with them what only one of the two has.
    """
    but = set(but)
    return [
        f"{name} was {then[name]!r} and is {now.get(name)!r}"
        for name in then
        if then[name] != now.get(name) and not (but and (name in but or name not in now))
    ]


def report_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns of each condition that is not what it was when a state was written."""
    changed = differences(then, now)
    if changed:
        warn_user(
            "The run goes on under other conditions than those it was saved under, so its numbers "
            f"may differ in their last bits: {'; '.join(changed)}.",
            ResumeWarning,
        )


def step_state(step: Any) -> Any:
    """Returns the state of a process function; None if it offers none."""
    offers = getattr(step, "state_dict", None)
    return None if offers is None else offers()


def load_step(step: Any, state: Any) -> None:
    """Restores what `step_state` returned.

    Raises:
        ValueError: if there is a state, and the process function cannot load one.
    """
    if state is None:
        return
    load = getattr(step, "load_state_dict", None)
    if load is None:
        raise ValueError(
            "The state holds a state of the process function (such as the gradients of an "
            f"accumulation window), and {step} has no load_state_dict. Use the factory that made "
            "the trainer which wrote it."
        )
    load(state)


def check_keys(state: Mapping[str, Any], known: set[str]) -> bool:
    """Tells whether a state is a full snapshot (true) or of pytorch-ignite's form (false).

    Raises:
        ValueError: if a key is missing or unexpected, or the snapshot's format is another one.
    """
    full = "format" in state
    wanted = KEYS if full else frozenset({"rng_states"})
    missing = sorted(wanted - set(state))
    unexpected = sorted(set(state) - wanted - known - set(OPTIONAL_KEYS))
    if missing or unexpected:
        raise ValueError(
            "The state of a deterministic engine "
            + (f"lacks {missing}" if missing else "")
            + (" and " if missing and unexpected else "")
            + (f"has the unexpected keys {unexpected}" if unexpected else "")
            + f"; it has {sorted(state)}. States come from DeterministicEngine.state_dict() with "
            "the same state_dict_user_keys, or hold 'rng_states' (None, or pytorch-ignite's)."
        )
    if full and state["format"] != FORMAT:
        raise ValueError(
            f"The state has format {state['format']!r}; this version of crosstrain reads {FORMAT}. "
            "Load it with the version that wrote it."
        )
    return full
