"""ModelPart: saves and loads a part of a model, such as its adapters, and leaves the rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from crosstrain.engine.nests import is_module, unwrap
from crosstrain.engine.spread import spread


class ModelPart:
    """A part of a model, to stand in `to_save` in the model's place.

    For a large model of which little is trained, as with LoRA: `{"adapters": ModelPart(model)}`.
    What is left out is not saved, so the script has to make it the same each time, from the same
    pretrained weights. The state has the model's own names, so that
    `model.load_state_dict(state, strict=False)` takes it, too.

    Args:
        model: the model.
        keep: called with each name of the model's `state_dict`; says whether it is saved. By
            default what is trained is: the parameters that require a gradient, and the buffers
            beside them in the same modules.

    Raises:
        TypeError: if the model is no `torch.nn.Module`.
    """

    def __init__(self, model: Any, keep: Callable[[str], bool] | None = None) -> None:
        if not is_module(model):
            raise TypeError(f"ModelPart takes a torch.nn.Module, got {type(model)}.")
        self.model: Any = model
        self._keep = keep

    def state_dict(self) -> OrderedDict[str, Any]:
        """Returns the part's tensors, by their names in the model.

        Raises:
            ValueError: if the part is empty.
        """
        model = unwrap(self.model)
        keep = self._keep or _trained(model)
        state: Mapping[str, Any] = model.state_dict()
        part = OrderedDict((name, value) for name, value in state.items() if keep(name))
        if not part:
            raise ValueError(
                f"The part of {type(model).__name__} that is to be saved is empty: keep() accepts "
                "none of its names, or no parameter requires a gradient."
            )
        return part

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the part; all of its names have to be there, and no others.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: if names are missing or too many: the part was chosen in another way then.
        """
        model = unwrap(self.model)
        own = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        unexpected = [name for name in state_dict if name not in own]
        if missing or unexpected:
            raise ValueError(
                "the part of the model is another one than was saved: missing "
                f"{missing[:6] or 'nothing'}, too many {unexpected[:6] or 'none'}. Freeze and wrap "
                "the model as then, or choose the part by keep="
            )
        model.load_state_dict(spread(model, state_dict), strict=False)


def _trained(model: torch.nn.Module) -> Callable[[str], bool]:
    names: set[str] = set()
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        wanted = [name for name, parameter in own.items() if parameter.requires_grad]
        if wanted:
            wanted += [name for name, _ in module.named_buffers(recurse=False)]
        names.update(f"{prefix}.{name}" if prefix else name for name in wanted)
    return names.__contains__
