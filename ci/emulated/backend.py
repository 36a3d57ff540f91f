"""The backend `emulated`: the code of every accelerator, on the device in Python."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from crosstrain.backends import Availability
from crosstrain.backends.accelerator import AcceleratorBackend
from crosstrain.backends.errors import BackendError, Missing

from .device import COUNT, NAME, register, why_not


class EmulatedBackend(AcceleratorBackend):
    """Trains on a device in Python, for tests: it is slower than the CPU and as strict as a GPU.

    Nothing but its name is its own: it takes and runs what `accelerator`, `mps`, `xpu` and `cuda`
    do.
    """

    name = kind = NAME
    adds_up = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if why_not() is None:
            register()
        super().__init__(*args, **kwargs)

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells whether torch can have a device in Python here; registers none."""
        versions = {"torch": str(torch.__version__)}
        missing = cls._absence()
        if missing is not None:
            return Availability(False, *missing, versions)
        return Availability(True, "", "", versions, [f"{COUNT} in Python, for tests: no hardware"])

    def _check_device(self, index: int) -> None:
        if index > 0:
            raise BackendError(
                f"torch {torch.__version__} runs backward passes on one device that is written in "
                f"Python, {NAME}:0, and not on {NAME}:{index}. Tensors can be there, and no "
                "training: leave index= out, and start one process."
            )

    def _start(self, stack: ExitStack) -> None:
        if self._index is None:
            # Each process has devices of its own, and the first is the one that trains.
            self._index = 0
        super()._start(stack)
        try:
            torch.autograd.backward(torch.ones((), device=self.device, requires_grad=True) * 1)
        except RuntimeError as error:
            raise BackendError(
                "This process ran a backward pass before it knew of the device. torch counts the "
                f"devices at the first one, so none can reach '{NAME}' any more. Call "
                f"crosstrain.ci.{NAME}.register() before, or train there in a process of its own."
            ) from error

    @classmethod
    def _absence(cls) -> Missing | None:
        return why_not()
