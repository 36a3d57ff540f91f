"""CUDA with torch's automatic mixed precision: fp16 with a loss scaler, or bf16."""

from __future__ import annotations

from .cuda import CudaBackend


class CudaAmpBackend(CudaBackend):
    """Trains on one NVIDIA GPU under autocast. `fp16` scales the loss and skips overflows.

    `bf16` is refused on GPUs that only emulate it, those below compute capability 8.0. What is not
    cast stays fp32, without TF32. With a fused optimizer (`fused=True`) a step of `fp16` reads
    nothing back from the GPU; other optimizers wait once a step to learn of an overflow.
    """

    options = ("fp16", "bf16", "fsdp", "fsdp-bf16")
    name = "cuda-amp"
