"""TPUs by TorchTPU (`torch_tpu`), the successor of torch_xla. No TPU has run this yet."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError, BackendUnavailable, Missing
from .precision import DTYPES, Precision
from .protocol import Availability
from .torch_backend import TorchBackend, random_state_of
from .tpu_host import hardware_absence, tpu_chips, versions_of

# The versions of torch that torch_tpu 0.2 is made for: from, and up to.
_TORCH = ((2, 11), (2, 15))


class TpuBackend(TorchBackend):
    """Trains on the TPU core of this process, in torch's eager mode. `bf16` autocasts.

    `fp32` asks for products of full precision, which a TPU otherwise computes from bf16.

    Operations run as they are called; there is no graph to cut, so `sync` has nothing to do.
    Before it is opened its `device` is the CPU: torch knows no device `tpu` until torch_tpu has
    started.

    Args:
        option: `fp32` or `bf16`.
        scaler: refused, since no option is fp16.
    """

    options = ("fp32", "bf16")
    name = "tpu"
    # Whoever starts the processes calls torch.tpu.distributed.set_tpu_launch_env() before it.
    transport = "tpu_dist"

    def __init__(self, option: str | None = None, scaler: GradScaler | None = None) -> None:
        self._probed(option)
        super().__init__(option, scaler)

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells what is missing, without importing torch_tpu.

        An import of torch_tpu without libtpu aborts the process, and its first use without a TPU
        hangs in look-ups of the cloud's metadata: so nothing of it is touched here.
        """
        chips = tpu_chips()
        versions = versions_of("torch-tpu", "libtpu")
        missing = _package_absence() or hardware_absence(chips)
        if missing is not None:
            return Availability(False, *missing, versions, chips)
        return Availability(True, "", "", versions, chips)

    def _start(self, stack: ExitStack) -> None:
        importlib.import_module("torch_tpu")
        if not torch.accelerator.is_available():
            raise BackendUnavailable(
                f"{self.name}:{self.option}",
                "There is a TPU and torch_tpu, but torch finds no accelerator.",
                "Look at the messages of torch_tpu; another process may hold the TPU.",
            )
        # A process is bound to one core, which cannot be changed.
        self.device = torch.device("tpu", torch.accelerator.current_device_index())
        self.precision = Precision("tpu", DTYPES[self.option])
        if self.option == "fp32":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")

    def _generator(self) -> torch.Generator:
        module: Any = getattr(torch, "tpu", None)
        generators: Any = getattr(module, "default_generators", ())
        index = self.device.index
        if self.device.type != "tpu" or index >= len(generators):
            raise BackendError(
                f"torch_tpu offers no generator of random numbers for '{self.device}'. Open the "
                "backend first; with an older torch_tpu, update it."
            )
        generator: torch.Generator = generators[index]
        return generator

    def seed(self, seed: int) -> None:
        """Seeds the TPU's generator."""
        self._generator().manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        """Returns the state of the TPU's generator, a tensor on the CPU."""
        return {"tpu": self._generator().get_state().cpu()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned."""
        self._generator().set_state(random_state_of("tpu", state, "a TPU").cpu())


def _package_absence() -> Missing | None:
    if find_spec("torch_tpu") is None:
        return Missing(
            "torch_tpu (TorchTPU) is not installed.",
            "On a TPU VM, run pip install torch-tpu libtpu: without libtpu, import torch aborts.",
        )
    found = str(torch.__version__)
    major, minor = found.split(".")[:2]
    if not _TORCH[0] <= (int(major), int(minor)) <= _TORCH[1]:
        low, high = (".".join(map(str, bound)) for bound in _TORCH)
        return Missing(
            f"torch_tpu is made for torch {low} to {high}, and torch {found} is installed.",
            f"Install a torch from {low} to {high}.",
        )
    return None
