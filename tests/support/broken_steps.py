"""Backends that each break one promise about the step, randomness or state: see broken_backends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from broken_backends import broken
from torch.amp.grad_scaler import GradScaler

from crosstrain.backends import StepResult
from crosstrain.backends.cpu import CpuBackend


@broken("step_result")
class StepSaysNothing(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> Any:
        super().step(optimizer, max_norm)


@broken("step_result")
class StepForgetsNorm(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        super().step(optimizer, max_norm)
        return StepResult(True)


@broken("agreement")
class LosesGradients(CpuBackend):
    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        super().backward(loss * 0.8, optimizer)


@broken("agreement", "bf16")
class RoundsItsInput(CpuBackend):
    def put(self, batch: Any) -> Any:
        moved = super().put(batch)
        if isinstance(moved, tuple):
            return tuple(torch.round(tensor) for tensor in moved)
        return moved


@broken("accumulation")
class ForgetsFirstPass(CpuBackend):
    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        optimizer.zero_grad()
        super().backward(loss, optimizer)


@broken("clipping", "fp16")
class ClipsScaledGradients(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        norm = None
        if max_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        result = super().step(optimizer)
        return StepResult(result.applied, norm, result.loss_scale)


@broken("missing_gradient")
class StepsOnNothing(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        optimizer.step()
        return StepResult(True, None if max_norm is None else torch.zeros(()))


@broken("two_optimizers")
class KnowsOneOptimizer(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.mine: Any = None

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        self.mine = self.mine or optimizer
        return super().step(self.mine, max_norm)


@broken("overflow", "fp16")
class SaysApplied(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        result = super().step(optimizer, max_norm)
        return StepResult(True, result.grad_norm, result.loss_scale)


@broken("overflow", "fp16")
class NeverSkips(CpuBackend):
    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        result = super().step(optimizer, max_norm)
        if not result.applied:
            optimizer.step()
        return result


@broken("overflow", "fp16")
class NeverAdapts(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option, GradScaler("cpu", backoff_factor=0.999999999))


@broken("deterministic_flags")
class DoesNotRestore(CpuBackend):
    @contextmanager
    def deterministic(self, warn_only: bool = False) -> Iterator[None]:  # type: ignore[override]
        torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
        yield


@broken("deterministic_flags")
class DoesNotRestoreAfterError(CpuBackend):
    @contextmanager
    def deterministic(self, warn_only: bool = False) -> Iterator[None]:  # type: ignore[override]
        os.environ["SOME_DEVICE"] = "1"
        yield
        del os.environ["SOME_DEVICE"]


@broken("deterministic_flags")
class SetsFlagsAtOnce(CpuBackend):
    def deterministic(self, warn_only: bool = False) -> Any:
        torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled())
        return nullcontext()


@broken("deterministic_results")
class TrainsAtRandom(CpuBackend):
    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        noise = int.from_bytes(os.urandom(2), "big") / 2**16
        super().backward(loss * (1 + noise / 100), optimizer)


class OwnStream(CpuBackend):
    """Draws noise for the loss from a generator of its own, and keeps it properly."""

    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.generator = torch.Generator()

    def put(self, batch: Any) -> Any:
        moved = super().put(batch)
        if isinstance(moved, torch.Tensor) and moved.shape == (64,):
            return moved + torch.rand(64, generator=self.generator)
        if isinstance(moved, tuple):
            x, y = moved
            return x + 0.01 * torch.rand(x.shape, generator=self.generator), y
        return moved

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        return {"state": self.generator.get_state()}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        self.generator.set_state(state["state"])


@broken("random_states")
class ForgetsItsStream(OwnStream):
    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        pass


@broken("resume")
class ForgetsItsStreamInResume(ForgetsItsStream):
    pass


@broken("random_states")
class ReadingMovesTheStream(OwnStream):
    def rng_state(self) -> dict[str, Any]:
        torch.rand(1, generator=self.generator)
        return super().rng_state()


@broken("random_states")
class IgnoresItsSeed(OwnStream):
    def seed(self, seed: int) -> None:
        self.generator.seed()


@broken("host_streams")
class DrawsFromTheHost(CpuBackend):
    def batches(self, data: Any) -> Iterator[Any]:
        torch.rand(1)
        return super().batches(data)


@broken("portable_state")
class StateIsNotPlain(CpuBackend):
    def state_dict(self) -> dict[str, Any]:
        return {"backend": CpuBackend}


@broken("portable_state", "fp16")
class StateIsNotLoaded(CpuBackend):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "at": id(self)}


@broken("checkpoint")
class StateIsNoFile(CpuBackend):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "lock": object()}


@broken("resume", "fp16")
class ForgetsTheScale(CpuBackend):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.precision.load_state_dict({**state, "scale": 3.0})


@broken("scale_is_not_dropped", "fp16")
class TakesAnyState(CpuBackend):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            super().load_state_dict(state)
