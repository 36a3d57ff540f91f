"""The null backend: records each call of the protocol and does nothing else."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Self

import torch

from .errors import UnknownBackend
from .protocol import Availability, StepResult, World


class NullBackend:
    """Shows how the protocol is driven: `calls` lists each call's name, in order.

    It runs no backward pass and steps no optimizer. A context appends its name where it begins and
    `end NAME` where it ends.

    Args:
        option: `record`, the only one.
    """

    options: ClassVar[tuple[str, ...]] = ("record",)
    name = "null"
    device = torch.device("cpu")

    def __init__(self, option: str | None = None) -> None:
        self.option = self.options[0] if option is None else option
        if self.option not in self.options:
            raise UnknownBackend(
                f"Backend 'null' has no option '{self.option}'. Options: {', '.join(self.options)}."
            )
        self.world = World()
        self.capabilities = frozenset({"null"})
        self.calls: list[str] = []
        self._loaded: dict[str, Any] = {}

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells that it can run anywhere."""
        return Availability(True, versions={"torch": str(torch.__version__)}, devices=["none"])

    def open(self) -> Self:
        """Records the call."""
        self.calls.append("open")
        return self

    def close(self) -> None:
        """Records the call."""
        self.calls.append("close")

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        """Records the call and returns what it was given."""
        self.calls.append("prepare")
        return objects

    def put(self, batch: Any) -> Any:
        """Records the call and returns the batch."""
        self.calls.append("put")
        return batch

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Records the call and iterates over the data."""
        self.calls.append("batches")
        return iter(data)

    def autocast(self) -> AbstractContextManager[Any]:
        """Records where the context begins and ends."""
        return self._recorded("autocast")

    def accumulating(self, model: Any) -> AbstractContextManager[Any]:
        """Records where the context begins and ends."""
        return self._recorded("accumulating")

    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        """Records the call."""
        self.calls.append("backward")

    def unscale(self, optimizer: Any) -> None:
        """Records the call."""
        self.calls.append("unscale")

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        """Records the call."""
        self.calls.append("step" if max_norm is None else f"step max_norm={max_norm}")
        return StepResult(True, None if max_norm is None else torch.zeros(()))

    def sync(self) -> None:
        """Records the call."""
        self.calls.append("sync")

    def deterministic(self, warn_only: bool = False) -> AbstractContextManager[Any]:
        """Records where the context begins and ends."""
        return self._recorded("deterministic")

    def seed(self, seed: int) -> None:
        """Records the call."""
        self.calls.append(f"seed {seed}")

    def rng_state(self) -> dict[str, Any]:
        """Records the call and returns no state."""
        self.calls.append("rng_state")
        return {}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Records the call."""
        self.calls.append("set_rng_state")

    def state_dict(self) -> dict[str, Any]:
        """Records the call and returns what was loaded last."""
        self.calls.append("state_dict")
        return dict(self._loaded)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Records the call and keeps the state."""
        self.calls.append("load_state_dict")
        self._loaded = dict(state)

    @contextmanager
    def _recorded(self, name: str) -> Generator[None, None, None]:
        self.calls.append(name)
        try:
            yield
        finally:
            self.calls.append(f"end {name}")
