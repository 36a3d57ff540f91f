"""What a rehearsal of a step changes, kept before it and put back after it.

A step that is to be recorded as a graph has to be run a few times before, so that libraries are
started and buffers exist. Those runs must leave no trace: weights, buffers, gradients, the states
of optimizers and of the loss scale, and random numbers are as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosstrain.backends import BackendError
from crosstrain.engine.digest import digest

if TYPE_CHECKING:
    from crosstrain.backends import Backend


class Kept:
    """What models, optimizers and a backend are before a rehearsal."""

    def __init__(
        self,
        models: Iterable[torch.nn.Module],
        parameters: Sequence[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        backend: Backend,
    ) -> None:
        self._optimizers, self._backend = optimizers, backend
        self._states = [
            {parameter: dict(values) for parameter, values in optimizer.state.items()}
            for optimizer in optimizers
        ]
        buffers = [buffer for model in models for buffer in model.buffers()]
        tensors = {id(one): one for one in (*parameters, *buffers, *self._state_tensors())}
        self._tensors = list(tensors.values())
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._grads = [
            (parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone())
            for parameter in parameters
        ]
        self._of_backend = backend.state_dict()
        self._host = digest(self._host_values())

    def _state_tensors(self) -> list[Tensor]:
        return [
            value
            for state in self._states
            for values in state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]

    def _host_values(self) -> list[Any]:
        """Returns what the optimizers keep on the host: plain values, and tensors there."""
        device = self._backend.device.type
        return [
            [
                sorted(
                    (str(name), value)
                    for name, value in optimizer.state.get(parameter, {}).items()
                    if not (isinstance(value, Tensor) and value.device.type == device)
                )
                for parameter in state
            ]
            for optimizer, state in zip(self._optimizers, self._states, strict=True)
        ]

    def has_made_state(self) -> bool:
        """Tells whether a step has made states of the optimizers, or put others in their places."""
        for optimizer, before in zip(self._optimizers, self._states, strict=True):
            if len(optimizer.state) != len(before):
                return True
            for parameter, values in optimizer.state.items():
                then = before.get(parameter)
                if then is None or then.keys() != values.keys():
                    return True
                for name, value in values.items():
                    if isinstance(value, Tensor) and value is not then[name]:
                        return True
        return False

    def check_host(self) -> None:
        """Refuses optimizers that keep on the host what a step changes."""
        if digest(self._host_values()) != self._host:
            names = sorted({type(one).__name__ for one in self._optimizers})
            raise BackendError(
                f"The step cannot be recorded as a graph: {', '.join(names)} changes on the host "
                "what belongs to its state, such as a count of its steps, and a graph changes the "
                "device's memory only. Use an optimizer with capturable=True, or leave capture out."
            )

    def restore(self) -> None:
        """Puts everything back, each tensor in the memory that it had."""
        with torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.copy_(copy)
            for parameter, gradient, value in self._grads:
                if gradient is not None and value is not None:
                    gradient.copy_(value)
                parameter.grad = gradient
        for optimizer, before in zip(self._optimizers, self._states, strict=True):
            optimizer.state.clear()
            optimizer.state.update({key: dict(values) for key, values in before.items()})
        self._backend.load_state_dict(self._of_backend)
