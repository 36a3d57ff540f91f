"""Any accelerator that torch knows, by its one interface to all of them: `torch.accelerator`."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import distributed
from torch.amp.autocast_mode import is_autocast_available
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError, BackendUnavailable, Missing
from .fsdp import Sharding, arithmetic_of, is_sharded
from .graphs import DeviceGraphs, graph_class, why_not_captured
from .placement import map_tensors
from .precision import DTYPES
from .preparation import sort_objects
from .process_group import join
from .protocol import Availability
from .torch_backend import TorchBackend, random_state_of

# Packages outside of torch that bring a type of device: torch loads them when it is imported.
_PACKAGES = {"npu": "torch_npu", "hpu": "habana_frameworks"}
_MAKERS = {
    "mps": "an Apple GPU",
    "xpu": "an Intel GPU",
    "npu": "an Ascend NPU of Huawei",
    "hpu": "a Gaudi of Intel",
}


class AcceleratorBackend(TorchBackend):
    """Trains on one accelerator, whichever torch has: Apple's, Intel's, AMD's, Huawei's, any other.

    The device is the one of torchrun's LOCAL_RANK, or the first. Where it has streams, a batch is
    copied from pinned memory on a stream of its own, beside the computation of the step before;
    nothing is read ahead of what the training asks for, so a checkpoint's position is exact.

    Args:
        option: one of `options`; bf16 and fp16 where torch has autocast on the device.
        scaler: a loss scaler to use in place of the default one, with fp16.
        index: the device to use instead.
        sharding: see `TorchBackend`.
    """

    options: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16", "fsdp", "fsdp-bf16", "fsdp-fp16")
    name = "accelerator"
    #: The type of device, as torch names it; None: that of the accelerator that torch finds.
    kind: ClassVar[str | None] = None
    #: What the device module's `graph` is told besides.
    graph_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        option: str | None = None,
        scaler: GradScaler | None = None,
        index: int | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        found = self._probed(option)
        if found.ok:
            self.device = torch.device(self._type())
        super().__init__(option, scaler, sharding)
        made = self.precision.scaler
        if scaler is None and made is not None and not made.is_enabled():
            raise BackendUnavailable(
                f"{self.name}:{self.option}",
                f"torch {torch.__version__} has no GradScaler that works on '{self.device.type}', "
                "and fp16 gradients underflow without one.",
                f"Use {self.name}:bf16, which needs none, or {self.name}.",
            )
        if found.ok and self._sharding is None and graph_class(self.device.type) is not None:
            self.capabilities |= {"graphs"}
        self._index = index
        self._stream: torch.Stream | None = None

    @classmethod
    def _type(cls) -> str:
        if cls.kind is not None:
            return cls.kind
        present = torch.accelerator.current_accelerator()
        return "" if present is None else present.type

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells the device and its number, without starting one."""
        versions = {"torch": str(torch.__version__)}
        missing = cls._absence()
        if missing is not None:
            return Availability(False, *missing, versions)
        kind = cls._type()
        module: Any = torch.get_device_module(kind)
        lacking = _lacking(kind, option or "", cls.options)
        count = int(module.device_count())
        devices = [f"{count} of type '{kind}'"]
        if lacking is not None:
            return Availability(False, *lacking, versions, devices)
        return Availability(True, "", "", versions, devices)

    @classmethod
    def _absence(cls) -> Missing | None:
        """Returns why there is no such device here, and what to do; None if there is one."""
        return absence(cls.kind)

    def _start(self, stack: ExitStack) -> None:
        kind = self._type()
        module: Any = torch.get_device_module(kind)
        count = int(module.device_count())
        index = self.world.local_rank if self._index is None else self._index
        if not 0 <= index < count:
            source = "LOCAL_RANK" if self._index is None else "index"
            raise BackendError(
                f"{source}={index}, but this process sees {count} devices of type '{kind}', 0 to "
                f"{count - 1}. Start one process a device{self._hidden()}."
            )
        self._check_device(index)
        self.device = torch.device(kind, index)
        stack.enter_context(torch.accelerator.device_index(index))
        try:
            self.transport = distributed.get_default_backend_for_device(self.device)
        except ValueError:
            # Told where processes are to share something.
            self.transport = ""
        try:
            stream = torch.Stream(self.device)
            torch.empty(1).pin_memory()
            self._stream = stream
        except RuntimeError:
            # A type of device without streams, or without pinned memory: each copy is waited for.
            self._stream = None

    def _hidden(self) -> str:
        """Returns where to look if there are fewer devices than the machine has."""
        return ""

    def _check_device(self, index: int) -> None:
        """Raises if the device cannot do what the option asks for, where its type can."""

    def _join(self, stack: ExitStack) -> None:
        if self.world.size == 1:
            return
        if not self.transport:
            raise BackendUnavailable(
                f"{self.name}:{self.option}",
                f"torch {torch.__version__} knows no process groups for '{self.device.type}', "
                f"and WORLD_SIZE={self.world.size}.",
                "Run one process, or import the package that brings them first.",
            )
        on_device = None if self.transport == "gloo" else self.device
        join(self.world, self.transport, stack, on_device)

    def prepare(self, *objects: Any, replicated: bool = True) -> tuple[Any, ...]:
        """Does what `TorchBackend.prepare` does, on a device that may not hold every type."""
        # Its own TypeError, for objects of another kind, is told as it is.
        sort_objects(objects)
        try:
            return super().prepare(*objects, replicated=replicated)
        except TypeError as error:
            raise self._cannot_hold(error) from error

    def _cannot_hold(self, error: TypeError) -> BackendError:
        return BackendError(
            f"'{self.device}' cannot hold a tensor: {error}. Cast it first, a model by "
            "model.float(), a batch in prepare_batch or in the dataset."
        )

    def _to_device(self, tensor: Any) -> Any:
        try:
            # Not without waiting: not every type of device keeps what it copies from.
            return tensor.to(self.device)
        except TypeError as error:
            raise self._cannot_hold(error) from error

    def put(self, batch: Any) -> Any:
        """Returns the batch with every tensor on the device, copied on a stream of its own."""
        if self._stream is None:
            return super().put(batch)
        stream, present = self._stream, torch.accelerator.current_stream(self.device)

        def copy(value: Any) -> Any:
            plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
            if not plain or value.device.type != "cpu":
                # An object that moves itself, or comes from a device, does so on the step's stream.
                return self._to_device(value)
            # Only from pinned memory does a copy run beside the computation.
            source = value if value.is_pinned() else value.pin_memory()
            with stream:
                copied = source.to(self.device, non_blocking=True)
            # Keeps the memory until the step's own stream is done with it.
            copied.record_stream(present)
            return copied

        moved = map_tensors(batch, copy)
        present.wait_stream(stream)
        return moved

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Iterates over the data, each batch on the device, copied while the last step runs."""
        return map(self.put, data)

    def graphs(self, optimizers: Iterable[torch.optim.Optimizer]) -> DeviceGraphs:
        """Returns what records graphs of steps that step these optimizers."""
        missing = self._unrecorded() or why_not_captured(optimizers, scales=self.precision.scales)
        if missing is not None:
            raise self._no_graphs(missing)
        return DeviceGraphs(self.device, **self.graph_options)

    def _unrecorded(self) -> Missing | None:
        if "graphs" not in self.capabilities:
            if graph_class(self.device.type) is None:
                return Missing(
                    f"torch {torch.__version__} has no graphs on '{self.device.type}'",
                    "Leave capture out.",
                )
            return Missing(
                f"'{self.name}:{self.option}' asks the host, or other processes, within a step",
                "Leave capture out, or use an option that neither shards nor belongs to apex.",
            )
        if self.world.size > 1:
            return Missing(
                f"WORLD_SIZE={self.world.size}, and DistributedDataParallel shares gradients "
                "in a way that is recorded only with a preparation of its own",
                "Leave capture out, or train in one process.",
            )
        return None

    def seed(self, seed: int) -> None:
        """Seeds the device's generator."""
        module: Any = torch.get_device_module(self.device)
        with torch.accelerator.device_index(self.device.index):
            module.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        """Returns the state of the device's generator, a tensor of bytes on the CPU."""
        module: Any = torch.get_device_module(self.device)
        read = getattr(module, "get_rng_state", None)
        if read is None:
            raise BackendError(
                f"torch {torch.__version__} cannot read the random state of '{self.device}', so a "
                "run there cannot be saved to go on exactly. Install a newer package for the "
                "device, or train on another backend."
            )
        # Apple's has one generator, and takes no device.
        state: torch.Tensor = read() if self.device.type == "mps" else read(self.device)
        return {self.device.type: state.cpu()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned."""
        kind = self.device.type
        own = random_state_of(kind, state, f"'{kind}'")
        module: Any = torch.get_device_module(self.device)
        place = () if kind == "mps" else (self.device,)
        module.set_rng_state(own.cpu(), *place)


class MpsBackend(AcceleratorBackend):
    """Trains on the GPU of a Mac."""

    name = kind = "mps"


class XpuBackend(AcceleratorBackend):
    """Trains on one GPU of Intel's."""

    name = kind = "xpu"


class NpuBackend(AcceleratorBackend):
    """Trains on one Ascend NPU of Huawei's, with the package torch_npu."""

    name = kind = "npu"


class HpuBackend(AcceleratorBackend):
    """Trains on one Gaudi of Intel's, with the package habana_frameworks."""

    name = kind = "hpu"


def absence(kind: str | None) -> Missing | None:
    """Returns why there is no device of a type here, and what to do; None if there is one."""
    version = torch.__version__
    built = torch.accelerator.current_accelerator()
    # Asked of the type's own module: torch.accelerator itself would start CUDA to find out.
    module: Any = None if built is None else torch.get_device_module(built)
    present = built if module is not None and module.device_count() > 0 else None
    if present is not None and kind in (None, present.type):
        return None
    if present is not None:
        return Missing(
            f"The accelerator that torch {version} has here is '{present.type}', not '{kind}'.",
            f"Use '{present.type}', or install a torch for '{kind}'.",
        )
    if kind is None:
        if built is None:
            return Missing(
                f"torch {version} is built without any accelerator.",
                "Install a torch that is built for yours: https://pytorch.org/get-started/locally/",
            )
        return Missing(
            f"torch {version} is built for '{built.type}', and finds no such device.",
            f"Run on a machine that has one; see '{built.type}' in `crosstrain doctor`.",
        )
    maker = _MAKERS.get(kind, "a device of that type")
    package = _PACKAGES.get(kind)
    if package is not None and find_spec(package) is None:
        return Missing(
            f"The package {package}, which brings '{kind}' to torch, is not installed.",
            f"On a machine with {maker}, install the {package} for torch {version}.",
        )
    if kind == "mps" and platform.system() != "Darwin":
        return Missing(
            f"'mps' is the GPU of a Mac, and this is {platform.system()}.",
            "Run on a Mac; here, use another backend.",
        )
    if built is None or built.type != kind:
        return Missing(
            f"torch {version} is built without '{kind}'.",
            f"On a machine with {maker}, install a torch that is built for it: "
            "https://pytorch.org/get-started/locally/",
        )
    return Missing(
        f"torch {version} is built for '{kind}', but does not find {maker}.",
        "Run on a machine that has one, with its driver, and pass it on to the container.",
    )


def _lacking(kind: str, option: str, options: tuple[str, ...]) -> Missing | None:
    """Returns why an option is not to be had on a type of device that is there."""
    dtype = DTYPES.get(arithmetic_of(option, options))
    if dtype is not None:
        if not is_autocast_available(kind):
            return Missing(
                f"torch {torch.__version__} has no autocast on '{kind}', so {dtype} cannot be used "
                "there.",
                "Use the option fp32.",
            )
        known: Any = getattr(torch.get_device_module(kind), "get_amp_supported_dtype", None)
        if known is not None and dtype not in known():
            has = ", ".join(map(str, known())) or "no types"
            return Missing(
                f"Autocast on '{kind}' has {has}, and not {dtype}.", "Use another option."
            )
    if is_sharded(option):
        try:
            distributed.get_default_backend_for_device(kind)
        except (ValueError, RuntimeError):
            return Missing(
                f"torch {torch.__version__} knows no process groups for '{kind}', over which a "
                "model could be sharded.",
                "Use an option without fsdp.",
            )
    return None
