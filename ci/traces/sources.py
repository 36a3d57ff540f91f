"""What a trace records of an engine: parameters, settings and random streams, in their order."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from crosstrain.engine import Engine, StepEvents
from crosstrain.engine.nests import unwrap, walk_objects

from .digest import tensors_of, text_digest
from .file import Thing

__all__ = ["Sources"]


class Sources:
    """Where the things are that are recorded, and in which place of a record each of them is.

    Args:
        trainer: the engine.
        objects: what it trains, by name.
    """

    def __init__(self, trainer: Engine, objects: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self._modules: dict[str, torch.nn.Module] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.settings: dict[str, Callable[[], Any]] = {}
        for label, value in walk_objects(objects):
            thing = unwrap(value)
            if isinstance(thing, torch.nn.Module):
                self._modules[label] = thing
            elif isinstance(thing, torch.optim.Optimizer):
                self.settings.update(_settings_of(label, thing))
        seen: set[int] = set()
        for label, module in self._modules.items():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    self.parameters[f"{label}.{name}"] = parameter
        self._buffer_names = list(self.buffers())
        self.streams = _streams(trainer)
        self.has_backward_event = StepEvents.BACKWARD_COMPLETED.name in trainer.state.event_to_attr
        self.things: list[Thing] = []
        self.place_of: dict[str, int] = {}
        for kind, names in (
            ("batch", [""]),
            ("random", self.streams),
            ("setting", self.settings),
            ("loss", [""]),
            ("gradient", self.parameters),
            ("parameter", self.parameters),
            ("buffer", self._buffer_names),
            ("random after", self.streams),
        ):
            self.place_of[kind] = len(self.things)
            self.things.extend(Thing(kind, name) for name in names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Returns the buffers: looked up each time, since assigning one makes it another tensor."""
        return {
            f"{label}.{name}": buffer
            for label, module in self._modules.items()
            for name, buffer in module.named_buffers()
        }


def _settings_of(label: str, optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    """Returns what reads each setting of an optimizer that is a number, or a tuple of them."""
    found: dict[str, Callable[[], Any]] = {}
    groups: list[dict[str, Any]] = optimizer.param_groups
    for index, group in enumerate(groups):
        where = f"of {label}" + (f", group {index}" if len(groups) > 1 else "")
        for key, value in group.items():
            number = isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
            # The first learning rate is kept by schedulers and does not change.
            if (number or isinstance(value, torch.Tensor)) and key != "initial_lr":
                found[f"'{key}' {where}"] = _getter(optimizer, index, key)
    return found


def _getter(optimizer: torch.optim.Optimizer, index: int, key: str) -> Callable[[], Any]:
    # By way of the optimizer: loading its state puts other groups in the place of these.
    return lambda: optimizer.param_groups[index].get(key)


def _streams(trainer: Engine) -> dict[str, Callable[[], int]]:
    """Returns what reads the digest of each random state of host and device."""
    found: dict[str, Callable[[], int]] = {
        "python": _python,
        "numpy": _numpy,
        "torch": lambda: text_digest(torch.get_rng_state().numpy().tobytes()),
    }
    backend = trainer.backend
    if backend is not None and backend.rng_state():
        found["device"] = lambda: _host_digest(backend.rng_state())
    return found


def _python() -> int:
    version, words, gauss = random.getstate()
    return text_digest(array("I", words).tobytes() + f"{version}{gauss!r}".encode())


def _numpy() -> int:
    state: Any = numpy.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return _host_digest(state)
    # The usual one, without taking a nest apart at each iteration.
    rest = f"{state['state']['pos']}{state['has_gauss']}{state['gauss']!r}"
    return text_digest(state["state"]["key"].tobytes() + rest.encode())


def _host_digest(state: Any) -> int:
    """Returns the digest of a nest that lies on the host."""
    tensors, rest = tensors_of(state)
    for tensor in tensors:
        content: Any = tensor.cpu().contiguous().numpy()
        rest = text_digest(rest.to_bytes(8, "little") + content.tobytes())
    return rest
