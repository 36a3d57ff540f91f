"""XLA's CPU device, for the tests that run there too: whether it is here, and why not."""

from __future__ import annotations

import os

import pytest

from crosstrain import backends

_FOUND = backends.probe("xla")
_OTHER = "PJRT_DEVICE is not CPU, and these tests are about XLA's CPU device."

HERE = _FOUND.ok and os.environ.get("PJRT_DEVICE") == "CPU"

needs_xla = pytest.mark.skipif(not HERE, reason=_FOUND.reason or _OTHER)

# What a fork server imports for XLA. An import starts no device: forked children start their own.
PRELOAD = (
    ("torch_xla.core.xla_model", "torch_xla.distributed.spmd", "torch_xla.debug.metrics")
    if HERE
    else ()
)
