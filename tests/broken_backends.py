"""Backends that each break one promise of the protocol, for the conformance checks to catch."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from crosstrain.backends import Availability, StepResult
from crosstrain.backends.cpu import CpuBackend
from crosstrain.backends.placement import map_tensors

# The check that has to catch it, the class, and the option to make it with.
BROKEN: list[tuple[str, type[Any], str]] = []


def broken(check: str, option: str = "fp32") -> Any:
    def add(kind: type[Any]) -> type[Any]:
        BROKEN.append((check, kind, option))
        return kind

    return add


@broken("declaration")
class NoName(CpuBackend):
    name = ""


@broken("declaration")
class NoDevice(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.device = "cpu"  # type: ignore[assignment]


@broken("declaration")
class MissingMethod(CpuBackend):
    rng_state = None  # type: ignore[assignment]


@broken("declaration")
class ListOfCapabilities(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.capabilities = []  # type: ignore[assignment]


@broken("options")
class TakesAnything(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__()
        self.option = option or "fp32"


@broken("options")
class OtherDefault(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option or "bf16")


@broken("probe")
class ProbeRaises(CpuBackend):
    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        raise RuntimeError("no driver")


@broken("probe")
class ProbeIsBool(CpuBackend):
    @classmethod
    def probe(cls, option: str | None = None) -> Any:
        return True


@broken("probe")
class ProbeSetsVariable(CpuBackend):
    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        os.environ["SOME_DEVICE"] = "1"
        return super().probe(option)


@broken("probe")
class ProbeHasNoRemedy(CpuBackend):
    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        return Availability(False, "It is not here.")


@broken("opening")
class OpenReturnsNothing(CpuBackend):
    def open(self) -> Any:
        super().open()


@broken("opening")
class OpenLeavesFlags(CpuBackend):
    def open(self) -> Any:
        torch.backends.cudnn.benchmark = True
        return super().open()


@broken("mistaken_world")
class IgnoresWorld(CpuBackend):
    def open(self) -> Any:
        return self


@broken("put")
class PutLosesStructure(CpuBackend):
    def put(self, batch: Any) -> Any:
        moved = super().put(batch)
        if isinstance(moved, dict):
            moved["pair"] = tuple(moved["pair"]) if "pair" in moved else None
        return moved


@broken("put")
class PutForgetsLists(CpuBackend):
    def put(self, batch: Any) -> Any:
        if isinstance(batch, dict):
            return {key: item for key, item in batch.items() if not isinstance(item, list)}
        return super().put(batch)


@broken("put_is_exact")
class PutCasts(CpuBackend):
    def put(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t.float() if t.is_floating_point() else t)


@broken("put_is_exact")
class PutLosesDenormals(CpuBackend):
    def put(self, batch: Any) -> Any:
        def flush(tensor: Any) -> Any:
            if tensor.dtype is not torch.float32:
                return tensor
            return torch.where(tensor.abs() < 1e-38, 0, tensor)

        return map_tensors(batch, flush)


@broken("batches")
class DropsLastBatch(CpuBackend):
    def batches(self, data: Any) -> Iterator[Any]:
        kept: list[Any] = []
        for batch in data:
            kept.append(batch)
            if len(kept) > 1:
                yield kept.pop(0)


@broken("batches")
class ReusesBuffer(CpuBackend):
    def batches(self, data: Any) -> Iterator[Any]:
        buffer: dict[str, torch.Tensor] = {}
        for batch in data:
            if isinstance(batch, dict):
                buffer.setdefault("x", torch.empty_like(batch["x"])).copy_(batch["x"])
                yield {"x": buffer["x"], "n": batch["n"]}
            else:
                yield batch


@broken("batches")
class ReadsEverything(CpuBackend):
    def batches(self, data: Any) -> Iterator[Any]:
        return iter([batch for batch, _ in zip(data, range(1000), strict=False)])


@broken("batches")
class HidesErrors(CpuBackend):
    def batches(self, data: Any) -> Iterator[Any]:
        try:
            yield from data
        except KeyError:
            return


@broken("prepare")
class CopiesModel(CpuBackend):
    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return tuple(
            copy.deepcopy(thing) if isinstance(thing, torch.nn.Module) else thing
            for thing in objects
        )


@broken("prepare")
class WrapsModelAgain(CpuBackend):
    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return tuple(
            torch.nn.Sequential(thing) if isinstance(thing, torch.nn.Module) else thing
            for thing in objects
        )


@broken("autocast")
class AutocastLeaks(CpuBackend):
    @contextmanager
    def autocast(self) -> Iterator[None]:  # type: ignore[override]
        torch.set_autocast_enabled("cpu", True)
        yield
        torch.set_autocast_enabled("cpu", False)


@broken("autocast", "bf16")
class AutocastOnce(CpuBackend):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.context = super().autocast()

    def autocast(self) -> Any:
        return self.context


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


@broken("resume", "fp16")
class ForgetsTheScale(CpuBackend):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.precision.load_state_dict({**state, "scale": 3.0})


@broken("scale_is_not_dropped", "fp16")
class TakesAnyState(CpuBackend):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            super().load_state_dict(state)
