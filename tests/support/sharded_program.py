"""A program for torchrun: trains, saves and loads in a world of processes, and tells what came.

Each task is `SPEC,FROM,TO,SAVER`: the backend, the checkpoint to go on from or `-`, the iteration
to train to, and `sharded`, `background` or `whole`. It saves at each third iteration.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from crosstrain.backends import get
from crosstrain.engine import Checkpoint, DiskSaver, Engine, Events


def build(backend: Any) -> dict[str, Any]:
    """Makes what is trained, the same in every process."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(
        torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 3)
    ).double()
    decay = {"params": model[0].parameters(), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([decay, {"params": model[3].parameters()}], lr=0.05)
    model, optimizer = backend.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def trainer(backend: Any, objects: dict[str, Any]) -> Engine:
    """Makes an engine whose batch is a function of the iteration, shared out over the processes."""
    model, optimizer = objects["model"], objects["optimizer"]
    rank, size = backend.world.rank, backend.world.size
    # Its statistics would be of each process's part of the batch.
    getattr(model, "module", model)[2].eval()

    def update(engine: Engine, _: Any) -> float:
        generator = torch.Generator().manual_seed(engine.state.iteration)
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        loss = model(x[rank * 8 // size : (rank + 1) * 8 // size]).square().mean()
        backend.backward(loss, optimizer)
        backend.step(optimizer, 1.0)
        optimizer.zero_grad()
        objects["scheduler"].step()
        return float(loss.detach())

    return Engine(update)


def part(value: Any) -> bytes:
    """Returns the bytes that this process holds of a tensor."""
    local = value.to_local() if hasattr(value, "to_local") else value
    data: bytes = local.detach().contiguous().view(-1).numpy().tobytes()
    return data


def whole(value: Any) -> Any:
    """Returns a tensor in one piece, as a list."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).flatten().tolist()


def run(folder: Path, task: str) -> dict[str, Any]:
    """Does a task; returns the weights, a digest of this process's parts, and what was saved."""
    spec, begin, end, kind = task.split(",")
    with get(spec) as backend:
        objects = build(backend)
        engine = trainer(backend, objects)
        to_save = {**objects, "trainer": engine}
        if begin != "-":
            Checkpoint.load_objects(to_save, folder / begin)
        world = f"{spec.replace(':', '-')}-{backend.world.size}"
        saver: Any
        if kind == "whole":
            saver = DiskSaver(folder / f"{world}-{kind}", require_empty=False)
        else:
            saver = DiskSaver(
                folder / f"{world}-{kind}",
                require_empty=False,
                background=kind == "background",
                parts=True,
            )
        handler = Checkpoint(to_save, saver, n_saved=2)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)
        engine.run([None] * int(end), max_epochs=1)
        handler.wait()
        saver.close()
        names = sorted(p.name for p in saver.dirname.iterdir() if not p.name.startswith(".cross"))
        states = [*objects["model"].state_dict().values()]
        for values in objects["optimizer"].state_dict()["state"].values():
            states += [value for value in values.values() if isinstance(value, torch.Tensor)]
        digest = hashlib.sha256(b"".join(map(part, states))).hexdigest()
        told: dict[str, Any] = {
            "task": task,
            "size": backend.world.size,
            "weights": [whole(value) for value in states],
            "digest": digest,
            "saved": names,
            "iteration": engine.state.iteration,
        }
        if kind != "whole":
            latest = Checkpoint.latest(saver.dirname)
            told["latest"] = None if latest.path is None else latest.path.name
        return told


def main(folder: Path, tasks: list[str]) -> None:
    """Does all tasks in one process group."""
    with get("cpu") as outer:
        rank = outer.world.rank
        told = [run(folder, task) for task in tasks]
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
