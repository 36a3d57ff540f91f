"""Autocast for the device: what is cast down, and what up, as on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Products, which autocast runs in its type.
_LOWER = """mm bmm addmm addmv addbmm baddbmm mv matmul linear chain_matmul prelu convolution
conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input
scaled_dot_product_attention _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell
rnn_tanh_cell rnn_relu_cell"""
# What needs the range or the digits of fp32.
_FULL = """log_softmax.int softmax.int layer_norm group_norm nll_loss nll_loss_nd cross_entropy_loss
mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits
cosine_embedding_loss poisson_nll_loss soft_margin_loss triplet_margin_loss exp log log10 log2 log1p
expm1 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus rsqrt reciprocal prod cumsum cumprod
sum sum.dim_IntList norm.Scalar norm.ScalarOpt_dim cosine_similarity dist cdist"""


def libraries(name: str) -> list[Any]:
    """Registers what autocast does on a type of device; lasts as long as what is returned."""
    make: Any = torch.library.Library
    made, rest = make("aten", "IMPL"), make("_", "IMPL")
    for words, full in ((_LOWER, False), (_FULL, True)):
        for word in words.split():
            packet, _, overload = word.partition(".")
            operation: Any = getattr(getattr(torch.ops.aten, packet), overload or "default")
            made.impl(word, _casting(name, operation, full), "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return [made, rest]


def _casting(name: str, operation: Any, full: bool) -> Callable[..., Any]:
    keys: Any = torch._C

    def cast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if full else torch.get_autocast_dtype(name)

        def one(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.device.type != name:
                return value
            fits = value.is_floating_point() and value.dtype is not torch.float64
            return value.to(dtype) if fits and value.dtype is not dtype else value

        without = keys.DispatchKeySet(keys.DispatchKey.AutocastPrivateUse1)
        with keys._ExcludeDispatchKeyGuard(without):
            args, kwargs = pytree.tree_map(one, (args, kwargs))
            return operation(*args, **kwargs)

    return cast
