"""CUDA's flags: contexts that set what decides the bits of its arithmetic, and restore it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

# With these, cuBLAS has one workspace a stream and repeats its results.
_REPEATABLE = (":4096:8", ":16:8")


@contextmanager
def tensor_float_32(allowed: bool) -> Generator[None, None, None]:
    """Allows or forbids fp32 products to be rounded to TF32 (10 bits of mantissa), inside.

    torch's default is mixed: convolutions round, matrix products do not.
    """
    # The flags are set by their old names and restored by their new ones: torch raises where it
    # reads an old name, as its compiler does, after the new one was set to something else.
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    parts = (matmul, cudnn.conv, cudnn.rnn)
    before: list[str] = [part.fp32_precision for part in parts]
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before[0] == "tf32"
        cudnn.allow_tf32 = before[1] == "tf32"
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


@contextmanager
def deterministic_kernels() -> Generator[None, None, None]:
    """Has cuDNN and cuBLAS use kernels that repeat their results bit for bit, inside.

    cuBLAS reads its variable when its first product is computed: enter this before.
    """
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark)
    workspace = os.environ.get(_WORKSPACE)
    if workspace not in _REPEATABLE:
        os.environ[_WORKSPACE] = _REPEATABLE[0]
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
        else:
            os.environ[_WORKSPACE] = workspace
