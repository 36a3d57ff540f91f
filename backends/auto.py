"""The choice of `auto`: the best backend that the hardware here really supports, and why."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from .errors import BackendUnavailable
from .protocol import Availability

_log = logging.getLogger("crosstrain.backends")

# From the best to the one that is always there. The CPU computes in fp32: few of them have hardware
# for less, and the others emulate it.
_CANDIDATES: tuple[tuple[str, str], ...] = (
    ("cuda-amp:bf16", "the GPU computes in bf16"),
    ("cuda-amp:fp16", "the GPU has fp16 but no bf16"),
    ("cuda:fp32", "the GPU has no fast fp16 and no bf16"),
    ("tpu:bf16", "there is a TPU, with torch_tpu"),
    ("xla:bf16", "there is a TPU, with torch_xla"),
    ("cpu:fp32", "no other device can be used"),
)


class Choice(NamedTuple):
    """What `auto` chose, why that and none before it, as a sentence, and what its probe says."""

    spec: str
    why: str
    found: Availability


def choose(probe: Callable[[str], Availability]) -> Choice:
    """Returns the first candidate that can run here, and logs it."""
    refused: list[str] = []
    found = Availability(False)
    for spec, reason in _CANDIDATES:
        found = probe(spec)
        if found.ok and spec.startswith("xla:") and os.environ.get("PJRT_DEVICE") != "TPU":
            found = Availability(False, "XLA would run on the CPU.", "Ask for xla itself.")
        if found.ok:
            why = f"{reason[0].upper()}{reason[1:]}."
            _log.info("auto chose %s. %s Not: %s", spec, why, " ".join(refused) or "any other.")
            return Choice(spec, why, found)
        refused.append(f"{spec} ({found.reason})")
    # Not even the CPU, which is last: what keeps it back keeps back all.
    raise BackendUnavailable("auto", found.reason, found.remedy)
