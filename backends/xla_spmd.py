"""XLA on several devices in one process: torch_xla's SPMD, each batch divided among the devices."""

from __future__ import annotations

import importlib
import os
from contextlib import ExitStack
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError, Missing
from .protocol import Availability
from .xla import XlaBackend
from .xla_world import refuse_processes

_COUNT = "CPU_NUM_DEVICES"


class XlaSpmdBackend(XlaBackend):
    """Trains on all XLA devices of the machine from one process. `bf16` autocasts.

    The method is GSPMD (Xu et al., 2021): the program is that of one device, and XLA's partitioner
    divides it. The devices form a mesh with one axis, `data`. The tensors of a batch are divided
    along it in their first dimension, parameters and the rest are on every device, so the loss is
    that of the whole batch. A tensor whose first dimension the devices do not divide is on every
    device instead, whole: the numbers are right, and each device computes all of it.

    Results repeat bit for bit on the same number of devices, and differ in their last bits on
    another. SPMD is for the whole process and cannot be left: `close` leaves it on.

    Args:
        option: `fp32` or `bf16`.
        scaler: refused, since no option is fp16.
    """

    name = "xla-spmd"

    def __init__(self, option: str | None = None, scaler: GradScaler | None = None) -> None:
        super().__init__(option, scaler)
        #: torch_xla's mesh of all devices, with the one axis `data`, once it is open.
        self.mesh: Any = None
        self._spmd: Any = None
        # From a number of dimensions to how such a tensor is divided.
        self._shardings: dict[int, Any] = {}

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells whether torch_xla fits and would find several devices, without importing it."""
        found = super().probe(option)
        if not found.ok or os.environ.get("PJRT_DEVICE") != "CPU":
            return found
        count = os.environ.get(_COUNT, "1")
        missing = _count_absence(count)
        if missing is not None:
            return Availability(False, *missing, found.versions)
        devices = [f"{count} devices of XLA on the CPU, which is not a TPU"]
        return Availability(True, "", "", found.versions, devices)

    def _start(self, stack: ExitStack) -> None:
        refuse_processes(self.world)
        xla: Any = importlib.import_module("torch_xla")
        runtime: Any = importlib.import_module("torch_xla.runtime")
        if not runtime.is_spmd():
            # There is no public name for it.
            if xla._XLAC._xla_get_spmd_config_is_locked():
                raise BackendError(
                    "This process has used an XLA device already, and SPMD has to be chosen before "
                    "that. Open the backend 'xla-spmd' first, or in a process of its own."
                )
            runtime.use_spmd()
        super()._start(stack)
        self._spmd = importlib.import_module("torch_xla.distributed.spmd")
        count = int(runtime.global_runtime_device_count())
        self.mesh = self._spmd.Mesh(list(range(count)), (count,), ("data",))
        self._shardings.clear()

    def _check_mode(self) -> None:
        """SPMD is what this backend is for."""

    def _to_device(self, tensor: Any) -> Any:
        if type(tensor) is not torch.Tensor or not tensor.is_cpu:
            return super()._to_device(tensor)
        self._opened_xla()
        dimensions = tensor.dim()
        if dimensions == 0 or not len(tensor) or len(tensor) % self.mesh.size():
            return super()._to_device(tensor)
        if dimensions not in self._shardings:
            divided = ("data", *(None,) * (dimensions - 1))
            self._shardings[dimensions] = self._spmd.ShardingSpec(self.mesh, divided)
        return self._model.send_cpu_data_to_device(
            [tensor], self.device, self._shardings[dimensions]
        )[0]


def _count_absence(count: str) -> Missing | None:
    if count.isdecimal() and int(count) > 1:
        return None
    said = f"is {count!r}" if _COUNT in os.environ else "is not set"
    return Missing(
        f"{_COUNT} {said}, so XLA on the CPU has one device; SPMD divides a batch among several.",
        f"Set {_COUNT}=2 or more before torch_xla starts, or use the backend 'xla'.",
    )
