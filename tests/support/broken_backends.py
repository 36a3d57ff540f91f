"""Backends that each break one promise of the protocol, for the conformance checks to catch.

These break one about themselves, their data or their models; those of `broken_steps`, one about
arithmetic, randomness or state.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from crosstrain.backends import Availability
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


class WithMasters(CpuBackend):
    """Keeps its promises: optimizers step copies of the weights, as those of apex's O2 do."""

    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.capabilities |= {"master_weights"}
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        prepared = super().prepare(*objects)
        groups = [
            group
            for thing in prepared
            if isinstance(thing, torch.optim.Optimizer)
            for group in thing.param_groups
        ]
        known = {id(master) for _, master in self.pairs}
        for group in groups:
            if not any(id(one) in known for one in group["params"]):
                pairs = [(one, one.detach().clone()) for one in group["params"]]
                group["params"] = [master for _, master in pairs]
                self.pairs += pairs
        return prepared

    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        super().backward(loss, optimizer)
        for weight, master in self.pairs:
            if weight.grad is not None:
                master.grad = weight.grad if master.grad is None else master.grad + weight.grad
                weight.grad = None

    def step(self, optimizer: Any, max_norm: float | None = None) -> Any:
        result = super().step(optimizer, max_norm)
        with torch.no_grad():
            for weight, master in self.pairs:
                weight.copy_(master)
        return result


@broken("prepare")
class MastersStayAlone(WithMasters):
    step = CpuBackend.step


@broken("prepare")
class MastersUntold(WithMasters):
    def __init__(self, option: str | None = None) -> None:
        super().__init__(option)
        self.capabilities -= {"master_weights"}


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
