"""Trainings whose step is replayed as a graph, each program in a process of its own."""

from __future__ import annotations

import gc
import json
import random
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import BackendError, get
from crosstrain.ci import emulated
from crosstrain.engine import (
    Captured,
    DeterministicEngine,
    Events,
    StepEvents,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

Change = Callable[[Any, torch.nn.Module, torch.optim.Optimizer], None]

# What is trained on, as the program's caller says: the specs of a device, by precision.
DEVICE = sys.argv[3] if len(sys.argv) > 3 else "emulated"
SPECS = {
    "emulated": {"fp32": "emulated", "bf16": "emulated:bf16", "fp16": "emulated:fp16"},
    "cuda": {"fp32": "cuda", "bf16": "cuda-amp:bf16", "fp16": "cuda-amp"},
}[DEVICE]


def rows(number: int) -> DataLoader[Any]:
    """Rows of two classes, in batches of 4, the last of which may be smaller."""
    data = torch.randn(number, 6, generator=torch.Generator().manual_seed(5))
    return DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), 4, shuffle=True)


def steep(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """A loss whose fp16 gradients overflow with the first scales."""
    return torch.nn.functional.cross_entropy(found, wanted) * 30


def network() -> torch.nn.Module:
    """A small model with buffers, which draws on its device."""
    parts = [torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
    return torch.nn.Sequential(*parts, torch.nn.Dropout(0.3), torch.nn.Linear(8, 2))


def make(precision: str, capture: bool, **options: Any) -> tuple[Any, Any, Any]:
    """Makes a trainer, its model and its optimizer."""
    manual_seed(3)
    model = options.pop("model", None) or network()
    kind = options.pop("kind", torch.optim.AdamW)
    told = options.pop("told", {"fused": True, "capturable": True})
    optimizer = kind(model.parameters(), lr=0.01, **told)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        options.pop("loss", steep),
        backend=SPECS.get(precision, precision),
        deterministic=True,
        max_norm=1.0,
        capture=capture,
        **options,
    )
    if not capture:
        # As in a graph: rates are tensors there.
        for group in optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=trainer.backend.device)
    return trainer, model, optimizer


def ended(trainer: Any, model: torch.nn.Module) -> dict[str, Any]:
    """Returns what a run came to."""
    weights = [value.double().cpu().flatten() for value in model.state_dict().values()]
    assert all(bool(value.isfinite().all()) for value in weights)
    state = trainer.state
    return {
        "weights": torch.cat(weights).tolist(),
        "steps": [state.iteration, state.optim_steps, state.applied_steps],
        "draws": trainer.backend.rng_state()[DEVICE].tolist()[:40],
    }


def both(
    precision: str, change: Change | None = None, number: int = 14, **options: Any
) -> list[Any]:
    """Trains with a graph and without, and returns what each came to, with all losses."""
    found: list[Any] = []
    for capture in (True, False):
        trainer, model, optimizer = make(precision, capture, **dict(options))
        if change is not None:
            change(trainer, model, optimizer)
        losses: list[float] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda e, told=losses: told.append(e.state.output)
        )
        trainer.run(rows(number), max_epochs=2)
        found.append({**ended(trainer, model), "losses": losses})
    return found


def bits(folder: Path) -> dict[str, Any]:
    """Compares graphs with the same step called each time."""
    del folder
    told: dict[str, Any] = {}
    for precision in SPECS:
        for window in (1, 3):
            found = both(precision, gradient_accumulation_steps=window)
            told[f"{precision}, windows of {window}"] = found
    sgd = {"kind": torch.optim.SGD, "told": {"fused": True, "momentum": 0.9}}
    told["SGD"] = both("fp32", **sgd)
    told["AdamW, not fused"] = both("fp32", told={"foreach": True, "capturable": True})
    return told


def _frozen(trainer: Any, model: Any, optimizer: Any) -> None:
    del optimizer

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def freeze() -> None:
        model[0].requires_grad_(False)


def _loaded(trainer: Any, model: Any, optimizer: Any) -> None:
    del model
    kept: list[Any] = []

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def keep() -> None:
        kept.append({k: v.clone() for k, v in optimizer.state[parameter()].items()})

    @trainer.on(Events.ITERATION_COMPLETED(once=6))
    def load() -> None:
        state = optimizer.state_dict()
        state["state"][0] = {k: v.clone() for k, v in kept[0].items()}
        optimizer.load_state_dict(state)
        if isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(DEVICE)

    def parameter() -> Any:
        return optimizer.param_groups[0]["params"][0]


def _moved(trainer: Any, model: Any, optimizer: Any) -> None:
    del optimizer

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def move() -> None:
        model[0].weight.data = model[0].weight.data * 0.5


def _exchanged(trainer: Any, model: Any, optimizer: Any) -> None:
    @trainer.on(Events.EPOCH_COMPLETED(once=1))
    def exchange() -> None:
        model[2] = torch.nn.Tanh()
        model[1].running_mean = torch.ones(8, device=DEVICE)
        optimizer.zero_grad()


def _scheduled(trainer: Any, model: Any, optimizer: Any) -> None:
    del model
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())


def _evaluated(trainer: Any, model: Any, optimizer: Any) -> None:
    del optimizer
    evaluator = create_supervised_evaluator(model, backend=trainer.backend)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda: evaluator.run(rows(4)))


def changes(folder: Path) -> dict[str, Any]:
    """Changes what a graph holds in the middle of a run."""
    del folder
    made = (_frozen, _loaded, _moved, _exchanged, _scheduled, _evaluated)
    return {change.__name__: both("fp32", change) for change in made}


def resumed(precision: str, folder: Path, at: int | None = None) -> dict[str, Any]:
    """Trains with a graph, from the beginning or from an iteration of the run in that folder."""
    place = folder / precision
    if at is not None:
        source, place = place, Path(f"{place}-{at}")
        place.mkdir()
        shutil.copy(source / f"checkpoint_{at}.pt", place)
    trainer, model, optimizer = make(precision, True, gradient_accumulation_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    resume_or_start(trainer, objects, place, every=1, n_saved=None, overlap=True)
    trainer.run(rows(18), max_epochs=2)
    return ended(trainer, model)


def resumes(folder: Path) -> dict[str, Any]:
    """Goes on from each iteration, in windows, with a smaller last batch, over skipped steps."""
    told: dict[str, Any] = {}
    for precision, points in (("fp32", (1, 2)), ("fp16", (1, 2, 4, 5, 7))):
        straight = resumed(precision, folder)
        wrong = [at for at in points if resumed(precision, folder, at) != straight]
        told[precision] = {"steps": straight["steps"], "wrong": wrong}
    return told


def _trained(as_graph: bool) -> dict[str, Any]:
    manual_seed(3)
    backend = get(SPECS["bf16"]).open()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.1), fused=True)
    backend.prepare(model, optimizer)
    optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device=backend.device)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    # A user's own hook: not in rehearsals, and after each replay.
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))

    def work(batch: dict[str, torch.Tensor]) -> Any:
        optimizer.zero_grad()
        with backend.autocast():
            loss = steep(model(batch["x"]), batch["y"])
        backend.backward(loss, optimizer)
        result = backend.step(optimizer, 1.0)
        backend.sync()
        return {"loss": loss, "result": result}

    step: Any = Captured(work, backend, model, optimizer) if as_graph else work

    def iterate(engine: Any, batch: Any) -> Any:
        del engine
        return step({"x": backend.put(batch[0]), "y": backend.put(batch[1])})

    engine = DeterministicEngine(iterate, backend)
    norms: list[float] = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda e: norms.append(float(e.state.output["result"].grad_norm)),
    )
    engine.run(rows(20), max_epochs=2)
    return {"model": _weights(model), "averaged": _weights(averaged), "norms": norms}


def own(folder: Path) -> dict[str, Any]:
    """Trains with a step of the user's own: as a graph, and called."""
    del folder
    return {"graph": _trained(True), "called": _trained(False)}


def freed(folder: Path) -> dict[str, Any]:
    """Drops trainers, and records a step in which Python's collector would drop others."""
    del folder

    def held(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return steep(found, wanted)

    kept = weakref.ref(held)
    trainer, _, _ = make("fp32", True, loss=held)
    trainer.run(rows(8), max_epochs=2)
    gc.disable()
    del trainer, held
    gone = kept() is None
    gc.enable()
    old: list[Any] = []
    for _ in range(12):
        trainer, _, _ = make("fp32", True)
        trainer.run(rows(8), max_epochs=2)
        old.append(trainer)
    del trainer
    calls: list[int] = []

    def collecting(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        calls.append(len(old))
        # What is young is collected soon.
        cycle: list[Any] = [old.pop()]
        cycle.append(cycle)
        del cycle
        filled = [[number] for number in range(5000)]
        return steep(found, wanted) + 0 * len(filled)

    trainer, _, _ = make("fp32", True, loss=collecting)
    trainer.run(rows(8), max_epochs=8)
    assert gc.isenabled()
    return {"calls": calls, "steps": trainer.state.iteration, "gone": gone}


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    return {name: value.double().cpu().tolist() for name, value in model.state_dict().items()}


@contextmanager
def _host_reads() -> Iterator[Callable[[], int]]:
    """Counts where the host waits for the device."""
    if DEVICE == "emulated":
        with emulated.host_reads() as counted:
            yield lambda: sum(counted.values())
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: len(told)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def reads(folder: Path) -> dict[str, Any]:
    """Counts what 100 steady steps read, and what of the model's Python code runs in them."""
    del folder
    told: dict[str, Any] = {}
    for precision in ("fp32", "fp16"):
        trainer, model, _ = make(precision, True, gradient_accumulation_steps=2)
        calls: list[Any] = []
        model[4].register_forward_hook(lambda *_, calls=calls: calls.append(0))
        with _host_reads() as count:
            seen: list[Any] = []
            for at in (20, 120):
                trainer.add_event_handler(
                    Events.ITERATION_COMPLETED(once=at),
                    lambda _, seen=seen, calls=calls, count=count: seen.append(
                        (count(), len(calls))
                    ),
                )
            trainer.run(rows(484), max_epochs=1)
        told[precision] = [after - before for before, after in zip(*seen, strict=True)]
    return told


class _Counting(torch.optim.SGD):
    """An optimizer that counts its steps on the host, and tells nobody."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                values = self.state[parameter]
                values["count"] = values.get("count", 0) + 1
        return super().step(closure)


class _Chance(torch.nn.Module):
    """A layer that is left out at random, by the host's random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if random.random() < 0.5 else x * 2


def _reading(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    loss = steep(found, wanted)
    return loss if loss.item() < 1e9 else loss * 0


def _cycled(trainer: Any, optimizer: Any) -> None:
    def cycle(engine: Any) -> None:
        optimizer.param_groups[0]["betas"] = (0.9 - engine.state.iteration / 100, 0.999)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, cycle)


def _outgrown(sizes: int) -> list[Any]:
    data = [torch.randn(2 + size, 6) for size in range(sizes)]
    return [(one, (one[:, 0] > 0).long()) for one in data]


def refusals(folder: Path) -> dict[str, Any]:
    """Asks for graphs of what cannot be one; nothing of the step is done then."""
    del folder
    told: dict[str, Any] = {}
    backend = get(SPECS["fp32"])

    def on_host(batch: Any, device: Any, non_blocking: bool) -> Any:
        del device, non_blocking
        return [part.cpu() for part in batch]

    def listen(trainer: Any, optimizer: Any) -> None:
        del optimizer
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: None)

    sgd = {"kind": torch.optim.SGD}
    fused = {"fused": True}
    cases: dict[str, tuple[str, dict[str, Any], Any]] = {
        "cpu": ("cpu", {}, None),
        "reads": ("fp32", {"loss": _reading}, None),
        "draws": ("fp32", {"model": torch.nn.Sequential(_Chance(), network())}, None),
        "capturable": ("fp32", {"told": {"fused": True}}, None),
        "scaler": ("fp16", {"told": {"foreach": True, "capturable": True}}, None),
        "rate": ("fp32", {**sgd, "told": {}}, None),
        "counts": ("fp32", {"kind": _Counting, "told": fused}, None),
        "listens": ("fp32", {}, listen),
        "cycles": ("fp32", {}, _cycled),
        "shards": ("fp32", {"shards": 2}, None),
        "host": ("fp32", {"prepare_batch": on_host}, None),
    }
    for name, (precision, options, change) in cases.items():
        try:
            trainer, model, optimizer = make(precision, True, **options)
            if change is not None:
                change(trainer, optimizer)
            before = _weights(model)
            trainer.run(rows(28), max_epochs=1)
        except (BackendError, ValueError) as error:
            told[name] = str(error)
            if name in ("reads", "draws", "host", "listens"):
                made = name == "reads"  # Its first step is called, since it makes states.
                assert (_weights(model) == before) is not made
    try:
        make(backend, True)[0].run(_outgrown(20), max_epochs=1)  # type: ignore[arg-type]
    except BackendError as error:
        told["sizes"] = str(error)
    return told


def main(name: str, folder: Path) -> None:
    """Writes what one of the programs came to."""
    warnings.simplefilter("ignore")
    if DEVICE == "emulated":
        emulated.register()
    (folder / "told.json").write_text(json.dumps(globals()[name](folder)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
