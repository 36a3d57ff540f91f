"""The step protocol: what a backend is to the engine. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

from .errors import BackendError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class World:
    """Says which process of how many this is.

    Args:
        rank: this process among all, from 0.
        local_rank: this process among those of its machine, from 0.
        size: how many processes there are.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """Reads the world from torchrun's variables RANK, LOCAL_RANK and WORLD_SIZE.

        Args:
            environment: the variables; the process's own by default.

        Raises:
            BackendError: if some of the three are set and others are not, or one is no number or
                out of range.
        """
        values = os.environ if environment is None else environment
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        missing = [name for name in names if name not in values]
        alone = [values.get(name, default) for name, default in zip(names, "001", strict=True)]
        if len(missing) == len(names) or (alone == ["0", "0", "1"] and "WORLD_SIZE" in values):
            # Of one process alone, some launchers set WORLD_SIZE only.
            return cls()
        if missing:
            present = ", ".join(name for name in names if name in values)
            raise BackendError(
                f"{', '.join(missing)} is not set, but {present} is. torchrun sets all "
                "three; start with torchrun, or unset them to run in one process."
            )
        rank, local_rank, size = (_number(name, values[name]) for name in names)
        if size < 1 or rank >= size or local_rank > rank:
            raise BackendError(
                f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={size} contradict each "
                "other: 0 <= LOCAL_RANK <= RANK < WORLD_SIZE must hold. Start with torchrun."
            )
        return cls(rank, local_rank, size)


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise BackendError(
            f"{name}={text!r} is not a number of at least 0. torchrun sets it; do not set it by "
            "hand."
        )
    return int(text)


def _plain(word: object) -> str:
    if not isinstance(word, str):
        raise TypeError(
            f"versions and devices of an Availability are words; got {word!r}, a "
            f"{type(word).__name__}. Write str(...)."
        )
    # Of a subclass, whatever its __str__ says.
    return str.__str__(word)


@dataclass(frozen=True, slots=True)
class Availability:
    """What a probe found: whether a backend can run here, and if not, why and what to do.

    Args:
        ok: whether it can run here.
        reason: why not, as a sentence; empty if it can.
        remedy: what to do about it, as a sentence; empty if it can.
        versions: the versions of the libraries that it uses, by name.
        devices: the devices that it found, as people call them.
    """

    ok: bool
    reason: str = ""
    remedy: str = ""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    devices: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        """Makes plain words of what is a kind of str, such as `torch.__version__`.

        Versions and devices are written into every checkpoint, which is loaded safely: a class of
        another package in it would be refused there.
        """
        versions = {_plain(name): _plain(number) for name, number in self.versions.items()}
        object.__setattr__(self, "versions", versions)
        object.__setattr__(self, "devices", [_plain(device) for device in self.devices])


class StepResult:
    """What became of an optimizer step.

    Args:
        applied: whether the weights changed; a tensor of one element is read when somebody asks.
        grad_norm: the total norm of the gradients before clipping, a tensor of one element on the
            device, unread; None if no clipping was asked for.
        loss_scale: the scale that the loss was multiplied by; 1.0 without loss scaling; a tensor
            of one element is read when somebody asks.
    """

    __slots__ = ("_applied", "_loss_scale", "grad_norm")

    def __init__(
        self,
        applied: bool | torch.Tensor = True,
        grad_norm: torch.Tensor | None = None,
        loss_scale: float | torch.Tensor = 1.0,
    ) -> None:
        self._applied = applied
        self.grad_norm = grad_norm
        self._loss_scale = loss_scale

    @property
    def applied(self) -> bool:
        """Whether the optimizer stepped: false where an overflow of fp16 gradients skipped it."""
        self._applied = bool(self._applied)
        return self._applied

    @property
    def outcome(self) -> bool | torch.Tensor:
        """What `applied` reads: a tensor of one element where only the device knows it as yet."""
        return self._applied

    def copied(self) -> StepResult:
        """Returns the same result in memory of its own: a graph's next replay changes its own."""
        values: Any = (self._applied, self.grad_norm, self._loss_scale)
        return StepResult(*(one.clone() if hasattr(one, "clone") else one for one in values))

    @property
    def loss_scale(self) -> float:
        """What the loss was multiplied by; 1.0 without loss scaling."""
        self._loss_scale = float(self._loss_scale)
        return self._loss_scale

    def __repr__(self) -> str:
        return (
            f"StepResult(applied={self._applied!r}, grad_norm={self.grad_norm!r}, "
            f"loss_scale={self._loss_scale!r})"
        )


@runtime_checkable
class Backend(Protocol):
    """One kind of hardware at one precision: everything that differs between devices in a step.

    The engine calls these and nothing else. `options` are the words that may follow the name in a
    spec (`cpu:bf16`), the first being the default; `name` and `option` make the spec.
    `capabilities` are words that tests ask for, such as `loss_scaling`.
    """

    options: ClassVar[tuple[str, ...]]
    capabilities: frozenset[str]
    name: str
    option: str
    device: torch.device
    world: World

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells whether this backend can run here; never raises and starts nothing.

        With an option it tells whether the device can do that, too, as far as it is known without
        starting it.
        """
        ...

    def open(self) -> Self:
        """Picks the device and joins the process group; opening twice changes nothing."""
        ...

    def close(self) -> None:
        """Gives back what `open` took; closing twice changes nothing."""
        ...

    def __enter__(self) -> Self:
        """Opens the backend."""
        ...

    def __exit__(self, *exception: object) -> None:
        """Closes the backend."""
        ...

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        """Places, casts and wraps models and optimizers; returns as many, in the same order."""
        ...

    def put(self, batch: Any) -> Any:
        """Returns the batch with every tensor in it on the device, its structure unchanged."""
        ...

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Iterates over the data, fetching ahead where the device gains by it."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass and the loss run."""
        ...

    def accumulating(self, model: Any) -> AbstractContextManager[Any]:
        """Returns the context of a forward and backward pass after which no step follows."""
        ...

    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        """Runs the backward pass of a loss of one element, scaled where the precision asks for it.

        `optimizer` is the one whose gradients this makes, several of them, or None.
        """
        ...

    def unscale(self, optimizer: Any) -> None:
        """Makes the gradients those that `step` clips and applies: of all processes, unscaled.

        `step` does it where it was not called; between the two they can be read and changed.
        """
        ...

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        """Steps the optimizer: unscales, clips to `max_norm`, steps or skips, adapts the scale."""
        ...

    def sync(self) -> None:
        """Marks the end of an iteration's step."""
        ...

    def deterministic(self, warn_only: bool = False) -> AbstractContextManager[Any]:
        """Returns a context in which arithmetic repeats bit for bit; restores each flag it sets."""
        ...

    def seed(self, seed: int) -> None:
        """Seeds the generators of the device (the host's are the caller's)."""
        ...

    def rng_state(self) -> dict[str, Any]:
        """Returns the states of the device's generators; empty where the device has none."""
        ...

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `rng_state` returned."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what the backend carries from step to step, such as the loss scale."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        ...


def spec_of(backend: Backend | None) -> str | None:
    """Returns the spec of a backend, such as `cpu:bf16`; None where there is none."""
    return None if backend is None else f"{backend.name}:{backend.option}"
