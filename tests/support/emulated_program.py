"""Programs on the emulated device, each in a process of its own: torch never gives a device up."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from ignite.handlers import ProgressBar
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import BackendError, BackendUnavailable, get
from crosstrain.backends.accelerator import AcceleratorBackend, MpsBackend
from crosstrain.backends.cpu import CpuBackend
from crosstrain.backends.placement import map_tensors
from crosstrain.ci import emulated
from crosstrain.ci.conformance import check_backend
from crosstrain.engine import (
    Events,
    StepEvents,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

ROWS = 20


def rows(number: int) -> DataLoader[Any]:
    """Rows of two classes."""
    data = torch.randn(number, 6, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), 4, shuffle=True)


def steep(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A loss whose fp16 gradients overflow with the first scales."""
    return torch.nn.functional.cross_entropy(found, wanted) * 8


def network(drawn: bool) -> torch.nn.Module:
    """A small model; with dropout, it draws on its device."""
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3 if drawn else 0.0),
        torch.nn.Linear(8, 2),
    )


def trained(
    spec: str,
    loss_fn: Any = torch.nn.functional.cross_entropy,
    *,
    drawn: bool = True,
    fused: bool = True,
    **options: Any,
) -> tuple[Any, torch.nn.Module, torch.optim.Optimizer]:
    """Returns a trainer, its model and its optimizer, always of the same weights."""
    manual_seed(3)
    model = network(drawn)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    options = {"backend": spec, "deterministic": True, **options}
    return create_supervised_trainer(model, optimizer, loss_fn, **options), model, optimizer


def run(spec: str, folder: Path, *, drawn: bool = True) -> dict[str, Any]:
    """Trains two epochs, going on from a folder's checkpoint; returns what came of it."""
    options = {"max_norm": 1.0, "gradient_accumulation_steps": 3}
    trainer, model, optimizer = trained(spec, steep, drawn=drawn, **options)
    objects = {"model": model, "optimizer": optimizer}
    resume_or_start(trainer, objects, folder, every=1, n_saved=None, overlap=True)
    trainer.run(rows(ROWS), max_epochs=2)
    state: Any = trainer.state
    weights = [value.double().cpu().flatten() for value in model.state_dict().values()]
    assert all(bool(value.isfinite().all()) for value in weights)
    return {
        "device": next(model.parameters()).device.type,
        "iteration": state.iteration,
        "skipped": state.skipped_steps,
        "weights": torch.cat(weights).tolist(),
    }


def run_from(spec: str, place: Path, at: int, folder: Path, drawn: bool = True) -> dict[str, Any]:
    """Goes on from an iteration of the run of another folder, in a new one."""
    folder.mkdir()
    name = f"checkpoint_{at}.pt"
    shutil.copy(place / name, folder / name)
    return run(spec, folder, drawn=drawn)


def resumes(folder: Path) -> dict[str, Any]:
    """Goes on from each iteration of a run, from files that were written in the background."""
    told: dict[str, Any] = {}
    for spec in ("emulated", "emulated:bf16", "emulated:fp16"):
        place = folder / spec.replace(":", "-")
        straight = run(spec, place)
        points = range(1, straight["iteration"])
        wrong = [n for n in points if run_from(spec, place, n, Path(f"{place}-{n}")) != straight]
        told[spec] = {**straight, "wrong": wrong, "pending": emulated.pending()}
    return told


def ports(folder: Path) -> dict[str, Any]:
    """Moves a run that draws nothing from the CPU to the device and back."""
    straight = run("cpu", folder / "cpu", drawn=False)
    there = run_from("emulated", folder / "cpu", 4, folder / "there", drawn=False)
    back = run_from("cpu", folder / "there", 7, folder / "back", drawn=False)
    return {"straight": straight, "there": there, "back": back}


def _shared(spec: str, shards: int | None) -> list[float]:
    """Trains a model of which the processes of this world each have a part of every batch."""
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "shards": shards}
    trainer, model, _ = trained(spec, drawn=shards is not None, **options)
    trainer.run(rows(24), max_epochs=1)
    assert next(model.parameters()).device.type == spec.partition(":")[0]
    found: list[Any] = [parameter.detach() for parameter in model.parameters()]
    whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in found]
    return torch.cat([one.double().cpu().flatten() for one in whole]).tolist()


def ranks(folder: Path) -> dict[str, Any]:
    """Trains in as many processes as torchrun has started."""
    del folder
    return {
        "DDP": _shared("emulated", None),
        "DDP on the CPU": _shared("cpu", None),
        "FSDP": _shared("emulated:fsdp", None),
        "FSDP on the CPU": _shared("cpu:fsdp", None),
        "shards": _shared("emulated:bf16", 2),
    }


def reads(spec: str, *, fused: bool = True, scheduler: bool = False, bar: int | None = None) -> Any:
    """Counts what 30 steady steps read; with a bar, one that shows the loss each `bar` steps."""
    options = {"max_norm": 1.0, "gradient_accumulation_steps": 2}
    trainer, _, optimizer = trained(spec, fused=fused, **options)
    if scheduler:
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
        trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: schedule.step())
    if bar is not None:
        shown = {"output_transform": lambda loss: {"loss": loss}} if bar else {}
        when = Events.ITERATION_COMPLETED(every=bar or 1)
        ProgressBar(file=io.StringIO()).attach(trainer, event_name=when, **shown)
    with emulated.host_reads() as counted:
        seen: list[int] = []
        for at in (20, 50):
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED(once=at), lambda: seen.append(sum(counted.values()))
            )
        trainer.run(rows(200), max_epochs=1)
    return seen[1] - seen[0]


def steady(folder: Path) -> dict[str, Any]:
    """Counts what the host reads in steady steps: the table of docs/emulated.md, row by row."""
    del folder
    table: dict[str, dict[str, Any]] = {
        "bar": {"bar": 0},
        "scheduler": {"scheduler": True, "bar": 0},
        "not fused": {"fused": False},
        "loss shown": {"bar": 1},
        "loss shown at times": {"bar": 30},
    }
    specs = ("emulated", "emulated:bf16", "emulated:fp16")
    return {row: [reads(spec, **options) for spec in specs] for row, options in table.items()}


class _Forgetful:
    """A step that leaves a tensor on the host: neither parameter nor buffer, it is not moved."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(6, 2)
        self.weights = torch.ones(2)

    def train(self, spec: str) -> str:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

        def loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(found, wanted, self.weights)

        trainer = create_supervised_trainer(self.model, optimizer, loss, backend=spec)
        try:
            trainer.run(rows(8), max_epochs=1)
        except RuntimeError as error:
            return str(error)
        return ""


def _keeping(kind: Any) -> Any:
    """Returns a backend whose state holds a tensor of its device."""

    class Keeping(kind):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            return {"steps": torch.zeros(1, device=self.device)}

        def load_state_dict(self, state: Any) -> None:
            del state

    return Keeping


def _unwaiting(kind: Any) -> Any:
    """Returns a backend that copies a batch on a stream, and has nobody wait for it."""

    class Unwaiting(kind):  # type: ignore[misc]
        def put(self, batch: Any) -> Any:
            if self.device.type == "cpu":
                return super().put(batch)
            with torch.Stream(device=self.device):
                return map_tensors(batch, lambda one: one.pin_memory().to(self.device))

    return Unwaiting


def faults(folder: Path) -> dict[str, Any]:
    """Plants faults that a run on the CPU does not show."""
    del folder
    told: dict[str, Any] = {}
    for spec, kind in (("cpu", CpuBackend), ("emulated", emulated.EmulatedBackend)):
        told[spec] = {
            "on the host": _Forgetful().train(spec),
            "in a checkpoint": _problems(_keeping(kind), "portable_state"),
            "not waited for": _problems(_unwaiting(kind), "put_is_exact"),
        }
    return told


def _problems(kind: Any, check: str) -> list[str]:
    return [finding.problem for finding in check_backend(kind, checks=[check])]


class _Double:
    """A batch of a type that a device cannot hold, as Apple's cannot hold fp64."""

    def to(self, device: torch.device, **_: Any) -> Any:
        raise TypeError(f"Cannot convert a tensor of {device} to float64")


def _of_ranks() -> dict[str, str]:
    """Opens the accelerator that torch finds as ranks that there are devices for, and none."""
    told: dict[str, str] = {}
    for rank, size in ((1, 2), (5, 6)):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ.update(place)
        backend = AcceleratorBackend()
        try:
            backend.open()
        except BackendError as error:
            told[f"rank {rank}"] = f"{backend.device}: {error}"
        for name in place:
            del os.environ[name]
    return told


def refusals(folder: Path) -> dict[str, Any]:
    """What the device lacks, or is told to lack, is refused with the reason."""
    del folder
    told: dict[str, Any] = {"accelerator": str(AcceleratorBackend().open().device)}
    module: Any = torch.get_device_module("emulated")
    module.get_amp_supported_dtype = list
    for name, make in (
        ("bf16", lambda: AcceleratorBackend("bf16")),
        ("mps", lambda: MpsBackend("fp32")),
        ("second", lambda: get("emulated", index=1).open()),
        ("third", lambda: get("emulated", index=2).open()),
    ):
        try:
            make()
        except BackendUnavailable as error:
            told[name] = error.reason
        except BackendError as error:
            told[name] = str(error)
    told |= _of_ranks()
    try:
        get("emulated").open().put(_Double())
    except BackendError as error:
        told["double"] = str(error)
    # A device that tells nobody its random state.
    kept = type(module).get_rng_state
    del type(module).get_rng_state
    try:
        get("emulated").open().rng_state()
    except BackendError as error:
        told["state"] = str(error)
    type(module).get_rng_state = kept
    with emulated.out_of_memory(after=2):
        made = [torch.ones(3, device="emulated"), torch.ones(3, device="emulated:1")]
        try:
            made[0] + made[0]
        except torch.OutOfMemoryError as error:
            told["memory"] = str(error)
    try:
        made[0] + made[1]
    except RuntimeError as error:
        told["mixed"] = str(error)
    return told


def surfaces(folder: Path) -> dict[str, Any]:
    """Uses the device as a program does that knows nothing of it."""
    del folder
    here: Any = "emulated"
    ones = torch.ones(3, device=here)
    made = {
        "tensor": torch.tensor([1, 2], device=here),
        "as_tensor": torch.as_tensor([1.0], device=here),
        "asarray": torch.asarray([1.0], device=here),
        "new_tensor": ones.new_tensor([1.0]),
        "copied": torch.tensor(ones),
        "cast": torch.tensor([1.5], device=here, dtype=torch.bfloat16),
        "leaf": torch.tensor([1.0], device=here, requires_grad=True),
    }
    with torch.device(here):
        made |= {"by default": torch.empty(2), "layer": torch.nn.Linear(2, 2).weight}
    told: dict[str, Any] = {name: str(one.device) for name, one in made.items()}
    told["values"] = [made["tensor"].tolist(), made["cast"].tolist(), made["leaf"].is_leaf]
    ones.data = torch.full((3,), 2.0, device=here)
    told["data"] = ones.tolist()
    pinned = torch.ones(2).pin_memory()
    told["pinned"] = [pinned.is_pinned(), torch.ones(2).is_pinned(), pinned.clone().is_pinned()]
    side = torch.Stream(device=here)
    with side:
        early = (ones + 1).sum()
    reading = early + 0
    told["too early"] = reading.isnan().item()
    torch.accelerator.current_stream().wait_stream(side)
    told["in time"] = early.item()
    return told


def main(name: str, folder: Path) -> None:
    """Writes what one of the programs came to."""
    warnings.simplefilter("ignore")
    # Before the first backward pass, also one on the CPU: torch counts the devices then.
    emulated.register()
    told = globals()[name](folder)
    (folder / f"told{os.environ.get('RANK', '')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
