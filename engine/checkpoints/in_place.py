"""Which objects copy what they are given, so that it may lie in a file's memory meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from crosstrain.engine.nests import is_module

from .model_part import ModelPart

_HOOKS_OF_OPTIMIZERS = (
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def copies_its_state(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether a module copies all that it is given into tensors that it has already.

    Where somebody else's code sees the state, the answer is no: it might keep a part of it.
    """
    if isinstance(target, ModelPart):
        return type(target) is ModelPart and copies_its_state(target.model, {})
    if not is_module(target) or kwargs.get("assign", False):
        return False
    if torch.__future__.get_swap_module_params_on_conversion():
        return False
    whole = type(target).load_state_dict is torch.nn.Module.load_state_dict
    return whole and all(_copies(module) for module in target.modules())


def _copies(module: torch.nn.Module) -> bool:
    kind = type(module)
    # Of torch's own modules batch norm has one, which adds what old states lack.
    loads: Any = kind._load_from_state_dict
    if loads.__module__.partition(".")[0] != "torch" or vars(module).keys() & {
        "load_state_dict",
        "_load_from_state_dict",
    }:
        return False
    if kind.set_extra_state is not torch.nn.Module.set_extra_state:
        return False
    if vars(module).get("_load_state_dict_pre_hooks"):
        return False
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in own)


def keeps_in_its_state(target: Any) -> bool:
    """Tells whether what an optimizer keeps of its state is in its `state` and `param_groups`."""
    if not isinstance(target, torch.optim.Optimizer):
        return False
    own: Any = vars(target)
    parameters = (one for group in target.param_groups for one in group["params"])
    return (
        type(target).load_state_dict is torch.optim.Optimizer.load_state_dict
        and type(target).__setstate__.__module__.partition(".")[0] == "torch"
        and "load_state_dict" not in own
        and not any(own.get(name, True) for name in _HOOKS_OF_OPTIMIZERS)
        and all(type(tensor) in _PLAIN for tensor in parameters)
    )
