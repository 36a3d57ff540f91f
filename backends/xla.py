"""XLA by torch_xla: a lazy device, on a TPU or, to test without one, on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError, Missing
from .protocol import Availability, StepResult
from .torch_backend import TorchBackend, random_state_of
from .tpu_host import hardware_absence, installed_version, tpu_chips, versions_of
from .xla_world import join_on_tpu, refuse_processes, refuse_randperm

_VARIABLE = "PJRT_DEVICE"


class XlaBackend(TorchBackend):
    """Trains on one XLA device by torch_xla. `bf16` autocasts.

    Operations are recorded, and compiled and run together at `sync`, the step's boundary. Which
    device it is, PJRT_DEVICE says: TPU or CPU. XLA on the CPU has the numbers and the rules of XLA,
    not the speed of a TPU. `fp32` asks for products of full precision, which a TPU otherwise
    computes from bf16.

    The device's random state is one number. torch_xla moves it at each boundary; here it moves only
    where the iteration drew from it or trained nothing else, so that an evaluation or a save in
    between leaves the training's random numbers as they are.

    Args:
        option: `fp32` or `bf16`.
        scaler: refused, since no option is fp16.
        index: which of the process's XLA devices to use; the first by default.
    """

    options = ("fp32", "bf16")
    name = "xla"
    device = torch.device("xla")

    def __init__(
        self, option: str | None = None, scaler: GradScaler | None = None, index: int | None = None
    ) -> None:
        self._probed(option)
        super().__init__(option, scaler)
        self._index = index
        self._xla: Any = None
        self._model: Any = None
        self._boundary_state = 0
        # Optimizers whose gradients are the mean of all processes already.
        self._reduced: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells whether torch_xla fits and which device it would use, without importing it."""
        versions = versions_of("torch_xla", "libtpu")
        missing = _package_absence() or _device_absence()
        if missing is not None:
            return Availability(False, *missing, versions)
        on_tpu = os.environ[_VARIABLE] == "TPU"
        devices = tpu_chips() if on_tpu else ["XLA on the CPU, which is not a TPU"]
        return Availability(True, "", "", versions, devices)

    def _start(self, stack: ExitStack) -> None:
        if os.environ.get(_VARIABLE) == "CPU":
            refuse_processes(self.world)
        join_on_tpu(self.world, stack)
        self._check_mode()
        self._xla = importlib.import_module("torch_xla")
        self._model = importlib.import_module("torch_xla.core.xla_model")
        self.device = self._xla.device(self._index)
        if self.option == "fp32":
            stack.callback(_set_precision, _set_precision("highest"))
        # Starts the device, which in SPMD mode the line above does not.
        importlib.import_module("torch_xla.runtime").global_runtime_device_count()
        _check_autograd(self.device)
        self._boundary_state = self._read_state()

    @property
    def _graphless(self) -> Missing:
        return Missing(
            "XLA records and compiles each step without being asked", "Leave capture out."
        )

    def _check_mode(self) -> None:
        if importlib.import_module("torch_xla.runtime").is_spmd():
            raise BackendError(
                "This process is in torch_xla's SPMD mode, where each device would compute all of "
                "it. Use the backend 'xla-spmd', or a process of its own."
            )

    def _join(self, stack: ExitStack) -> None:
        """Does nothing: the group was joined before the device was started."""

    def _shared(self, objects: tuple[Any, ...]) -> tuple[Any, ...]:
        """Gives all processes rank 0's parameters and buffers; `step` reduces their gradients."""
        if self.world.size > 1:
            state = self._read_state()
            for thing in objects:
                if isinstance(thing, torch.nn.Module):
                    self._model.broadcast_master_param(thing)
            self._write_state(state)
        return objects

    def unscale(self, optimizer: Any) -> None:
        """Reduces the gradients of all processes to their mean, which `step` then does not."""
        super().unscale(optimizer)
        if self.world.size > 1 and optimizer not in self._reduced:
            self._model.reduce_gradients(optimizer)
            self._reduced.add(optimizer)

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        """Reduces the gradients of all processes to their mean, clips, and steps."""
        if self.world.size > 1 and optimizer not in self._reduced:
            self._model.reduce_gradients(optimizer)
        self._reduced.discard(optimizer)
        return super().step(optimizer, max_norm)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Iterates over the data, each batch on the device, sent while the last step still runs.

        torch_xla's own parallel loader ends a step with each batch, which moves the random state,
        and reads ahead of the training, which loses its position.
        """
        return map(self.put, data)

    def sync(self) -> None:
        """Compiles and runs what was recorded, and begins the next step.

        The device's random state moves on, unless nothing was drawn from it since the last time.
        """
        super().sync()
        drawn = self._read_state() != self._boundary_state
        self._opened_xla().sync()
        if drawn:
            self._boundary_state = self._read_state()
        else:
            self._write_state(self._boundary_state)

    @contextlib.contextmanager
    def deterministic(self, warn_only: bool = False) -> Generator[None, None, None]:
        """Makes arithmetic repeat bit for bit inside, and restores torch's flags after.

        A `torch.randperm` on the device is an error inside: it draws from a state of torch_xla
        that cannot be saved.

        Args:
            warn_only: it, or an operation that has no deterministic kernel, warns instead.
        """
        with refuse_randperm(warn_only), super().deterministic(warn_only):
            yield

    def seed(self, seed: int) -> None:
        """Seeds the device's generator; `torch.manual_seed` does not reach it."""
        self._write_state(seed)

    def rng_state(self) -> dict[str, Any]:
        """Returns the device's random state, an integer of 64 bits without sign.

        It is exact at a step's boundary, right after `sync`.
        """
        return {"xla": self._read_state()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned."""
        self._write_state(int(random_state_of("xla", state, "an XLA device")))

    def counts(self) -> dict[str, int]:
        """Returns how often, in this process so far, XLA did what costs time; waits for the device.

        Returns:
            `compilations`; `executions` of compiled graphs; `reads`, in which the host waited for a
            value of the device; `fallbacks`, operations that XLA does not know and the CPU ran. In
            a steady training only the executions grow, by one a step.
        """
        metrics = importlib.import_module("torch_xla.debug.metrics")
        # A graph is run, and counted, beside this thread.
        self._opened_xla()
        self._model.wait_device_ops()

        def times(name: str) -> int:
            found = metrics.metric_data(name)
            return 0 if found is None else int(found[0])

        fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
        return {
            "compilations": times("CompileTime"),
            # On one device, and on several by SPMD.
            "executions": times("ExecuteTime") + times("ExecuteReplicatedTime"),
            "reads": times("TransferFromDeviceTime"),
            "fallbacks": sum(int(metrics.counter_value(name)) for name in fallbacks),
        }

    def _read_state(self) -> int:
        self._opened_xla()
        return int(self._model.get_rng_state(str(self.device)))

    def _write_state(self, state: int) -> None:
        self._opened_xla()
        self._model.set_rng_state(state, str(self.device))
        self._boundary_state = state

    def _opened_xla(self) -> Any:
        if self._xla is None:
            raise BackendError(f"The backend '{self.name}' is not open: call open() first.")
        return self._xla


def _check_autograd(device: torch.device) -> None:
    """Refuses a process whose backward passes cannot reach the device."""
    value = torch.ones((), device=device, requires_grad=True)
    try:
        # Recorded only: nothing is compiled or run.
        torch.autograd.backward(value * 1)
    except RuntimeError as error:
        raise BackendError(
            "This process ran a backward pass before its XLA device was started. torch counts the "
            "devices at the first one, so none can reach this device any more. Open the backend "
            "'xla' before the first backward pass, or in a process of its own."
        ) from error


def _set_precision(wanted: str) -> str:
    """Sets the precision of fp32 products and returns the one before."""
    settings = importlib.import_module("torch_xla.backends")
    before: str = settings.get_mat_mul_precision()
    # torch_xla warns each time that it should not be set twice; here it is set and restored.
    log = logging.getLogger(settings.__name__)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        settings.set_mat_mul_precision(wanted)
    finally:
        log.setLevel(level)
    return before


def _package_absence() -> Missing | None:
    if find_spec("torch_xla") is None:
        return Missing(
            "torch_xla is not installed.",
            "Run pip install torch==2.9.1 torch_xla==2.9.0; on a TPU VM, 'torch_xla[tpu]==2.9.0'.",
        )
    ours = installed_version("torch_xla") or "of no version"
    torch_version = str(torch.__version__)
    if ours.split(".")[:2] != torch_version.split(".")[:2]:
        return Missing(
            f"torch_xla {ours} does not fit torch {torch_version}: both have to be of one minor "
            "version.",
            f"Run pip install 'torch=={'.'.join(ours.split('.')[:2])}.*', or another torch_xla.",
        )
    return None


def _device_absence() -> Missing | None:
    wanted = os.environ.get(_VARIABLE)
    if wanted == "CPU":
        return None
    if wanted == "TPU":
        return hardware_absence(tpu_chips())
    said = "is not set" if wanted is None else f"is {wanted!r}"
    return Missing(
        f"{_VARIABLE} {said}, and torch_xla would choose a device by itself.",
        f"Set {_VARIABLE}=TPU, or {_VARIABLE}=CPU for XLA on the CPU.",
    )
