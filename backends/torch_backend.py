"""TorchBackend: the protocol over torch's own devices, for backends to derive from."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch.amp.grad_scaler import GradScaler

from . import fsdp
from .errors import BackendError, BackendUnavailable, Missing, UnknownBackend
from .fsdp import Sharding
from .placement import map_tensors
from .precision import DTYPES, Precision
from .preparation import place, sort_objects
from .process_group import join, replicate, without_reduction
from .protocol import Availability, StepResult, World


class TorchBackend:
    """Implements the step protocol where torch runs the device itself.

    A subclass sets `name`, `options` and `device`, and overrides what differs on its device.

    Args:
        option: one of `options`; None: the first.
        scaler: a loss scaler to use in place of the default one.
        sharding: how the options `fsdp` and `fsdp-...` shard models; None: the defaults.
    """

    options: ClassVar[tuple[str, ...]] = ("fp32",)
    name: str = ""
    device = torch.device("cpu")
    #: What the processes of a world talk over, as torch names it.
    transport: str = "gloo"
    #: Whether `prepare` can leave it to its caller to add up gradients over processes.
    adds_up: ClassVar[bool] = False

    def __init__(
        self,
        option: str | None = None,
        scaler: GradScaler | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self.option = self.options[0] if option is None else option
        if self.option not in self.options:
            raise UnknownBackend(
                f"Backend '{self.name}' has no option '{self.option}'. Options: "
                f"{', '.join(self.options)}."
            )
        #: The option without its sharding, such as `bf16` of `fsdp-bf16`.
        self.arithmetic = fsdp.arithmetic_of(self.option, self.options)
        dtype = DTYPES.get(self.arithmetic)
        if scaler is not None and dtype is not torch.float16:
            raise BackendError(
                f"A loss scaler was given to '{self.name}:{self.option}', but only fp16 gradients "
                "are scaled. Leave it out, or choose an option with fp16."
            )
        self.world = World()
        self._opened: ExitStack | None = None
        self._mesh: Any = None
        self._cast = dtype
        self._sharding = self._checked_sharding(sharding)
        if self._sharding is not None:
            # FSDP casts parameters and inputs itself; what is left is the loss scale.
            if dtype is torch.float16 and scaler is None:
                scaler = GradScaler(self.device.type)
            dtype = None
        self.precision = Precision(self.device.type, dtype, scaler)
        scales, shards = self.precision.scales, self.adds_up and self._sharding is None
        words = {"loss_scaling": scales, "logical_shards": shards}
        self.capabilities = frozenset(word for word, applies in words.items() if applies)

    def _checked_sharding(self, sharding: Sharding | None) -> Sharding | None:
        if fsdp.is_sharded(self.option):
            return sharding or Sharding()
        if sharding is not None:
            raise BackendError(
                f"sharding= was given to '{self.name}:{self.option}', which does not shard. Leave "
                f"it out, or choose one of: {', '.join(filter(fsdp.is_sharded, self.options))}."
            )
        return None

    def _probed(self, option: str | None) -> Availability:
        """Returns what the probe says; refuses a backend that cannot run here."""
        found = self.probe(option)
        if not found.ok and option in (None, *self.options):
            spec = f"{self.name}:{option or self.options[0]}"
            raise BackendUnavailable(spec, found.reason, found.remedy)
        return found

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells the version of torch; a subclass adds what its device needs."""
        return Availability(True, versions={"torch": str(torch.__version__)})

    def open(self) -> Self:
        """Reads the world, starts the device and joins the process group, if there is one.

        Raises:
            BackendError: if torchrun's variables are wrong, or the process group does not come
                together.
            BackendUnavailable: if the device does not start.
        """
        if self._opened is not None:
            return self
        self.world = World.from_environment()
        with ExitStack() as stack:
            self._start(stack)
            self._join(stack)
            if self._sharding is not None:
                self._mesh = fsdp.open_mesh(self.world, self.device, self.transport, stack)
            self._opened = stack.pop_all()
        return self

    def _join(self, stack: ExitStack) -> None:
        """Joins the process group; what is pushed to the stack is undone by `close`."""
        join(self.world, self.transport, stack)

    def _start(self, stack: ExitStack) -> None:
        """Starts the device; what is pushed to the stack is undone by `close`."""

    def close(self) -> None:
        """Restores what `open` set; closing twice changes nothing."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            opened.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, *objects: Any, replicated: bool = True) -> tuple[Any, ...]:
        """Places models on the device, in place, and has optimizers follow their parameters.

        In a world of several processes, models that come with optimizers are returned wrapped in
        DistributedDataParallel, if they have anything to train. The options `fsdp` and `fsdp-...`
        shard them in place instead, also where there is one process.

        Args:
            *objects: models and optimizers.
            replicated: False leaves the models as they are in several processes, for somebody who
                adds their gradients up (the capability `logical_shards`).

        Raises:
            TypeError: if an object is neither a model nor an optimizer.
            BackendError: if an optimizer holds a parameter that is not on the device after it, or
                the processes' models differ.
        """
        models, optimizers = sort_objects(objects)
        if self._sharding is not None:
            fsdp.check_filled(models)
        place(models, optimizers, self.device)
        if not optimizers:
            return objects
        if self._sharding is None:
            return self._shared(objects) if replicated else objects
        if self._mesh is None:
            raise BackendError(
                f"'{self.name}:{self.option}' has to be opened before it shards a model: use `with "
                "get(...) as backend`, or call open()."
            )
        trained = [model for model in models if _is_trained(model)]
        fsdp.shard(trained, optimizers, self._mesh, self._cast, self._sharding)
        return objects

    def _shared(self, objects: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the objects with each model that is trained wrapped to share its gradients."""
        if self.world.size == 1:
            return objects
        return tuple(replicate(one, self.device) if _is_trained(one) else one for one in objects)

    def put(self, batch: Any) -> Any:
        """Returns the batch with every tensor in it on the device, its structure unchanged."""
        return map_tensors(batch, self._to_device)

    def _to_device(self, tensor: Any) -> Any:
        # A copy to the CPU that does not block would be read before it has arrived.
        return tensor.to(self.device, non_blocking=self.device.type != "cpu")

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Iterates over the data as it is."""
        return iter(data)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass and the loss run."""
        return self.precision.autocast()

    def accumulating(self, model: Any) -> AbstractContextManager[Any]:
        """Returns a context of passes whose gradients are not shared; empty in one process.

        The forward pass belongs inside: DistributedDataParallel decides there what is shared.
        """
        if self._sharding is not None:
            return fsdp.unreduced(model) if self._sharding.no_sync else nullcontext()
        if self.world.size == 1:
            return nullcontext()
        return without_reduction(model)

    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        """Runs the backward pass of a loss of one element, scaled where the precision asks for it.

        `optimizer` is the one whose gradients this makes, several of them, or None.
        """
        self.precision.backward(loss, optimizer)

    def unscale(self, optimizer: Any) -> None:
        """Takes the loss scale out of the gradients before `step`, to read or change them.

        Raises:
            BackendError: if no parameter of the optimizer has a gradient.
        """
        self.precision.unscale(optimizer)

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        """Unscales, clips to a total norm of `max_norm`, and steps or skips.

        Raises:
            BackendError: if no parameter of the optimizer has a gradient.
        """
        return self.precision.step(optimizer, max_norm)

    def graphs(self, optimizers: Iterable[torch.optim.Optimizer]) -> Any:
        """Raises why nothing records a step as a graph here; see `AcceleratorBackend`."""
        del optimizers
        raise self._no_graphs(self._graphless)

    @property
    def _graphless(self) -> Missing:
        """Why a step cannot be recorded as a graph."""
        return Missing(
            f"torch runs each operation on '{self.device.type}' when it is called, and has no "
            "graphs there",
            "Leave capture out.",
        )

    def _no_graphs(self, missing: Missing) -> BackendError:
        return BackendError(
            f"'{self.name}:{self.option}' cannot record a step as a graph: {missing.reason}. "
            f"{missing.remedy}"
        )

    def sync(self) -> None:
        """Adapts the loss scale to the iteration's steps.

        Raises:
            BackendError: if only some of the optimizers that share the loss scale were stepped.
        """
        self.precision.adapt_scale()

    @contextlib.contextmanager
    def deterministic(self, warn_only: bool = False) -> Generator[None, None, None]:
        """Makes arithmetic repeat bit for bit inside, and restores torch's flags after.

        Args:
            warn_only: an operation that has no deterministic kernel warns instead of raising.
        """
        enabled = torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warned)

    def seed(self, seed: int) -> None:
        """Seeds the device's generators; the CPU's is the host's, and the caller's to seed."""

    def rng_state(self) -> dict[str, Any]:
        """Returns the states of the device's generators; the CPU has none besides the host's."""
        return {}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the loss scale and its growth tracker; empty without loss scaling."""
        return self.precision.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            BackendError: if only one side scales the loss.
        """
        self.precision.load_state_dict(state)


def random_state_of(kind: str, state: Mapping[str, Any], device: str) -> Any:
    """Returns the random state of a kind of device, and refuses that of another."""
    if kind not in state:
        raise BackendError(
            f"The random state is that of {sorted(state) or 'a device without one'}, not of "
            f"{device}: random numbers on the device cannot go on as they were. Call seed() "
            "instead."
        )
    return state[kind]


def _is_trained(thing: Any) -> bool:
    """Tells whether a thing is a model that has parameters to train and does not share them yet."""
    return (
        isinstance(thing, torch.nn.Module)
        and not isinstance(thing, torch.nn.parallel.DistributedDataParallel)
        and any(parameter.requires_grad for parameter in thing.parameters())
    )
