"""A training of digits in a process of its own, which goes on from its last checkpoint.

Arguments: a spec and a folder. Prints a line an iteration, and JSON at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from step_runs import digits

from crosstrain import backends
from crosstrain.backends import random_state
from crosstrain.backends.placement import map_tensors

ITERATIONS = 16
EVERY = 4


def main(spec: str, folder: Path) -> None:
    """Trains to the end, saving every few iterations."""
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    backend = backends.get(spec).open()
    random_state.seed(5)
    model: Any = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(288, 10),
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = backend.prepare(model, optimizer)
    backend.sync()
    backend.seed(5)
    path = folder / "checkpoint.pt"
    first = load(path, backend, model, optimizer) if path.exists() else 1
    losses = []
    with backend.deterministic():
        for iteration in range(first, ITERATIONS + 1):
            x, y = backend.put(digits()[iteration])
            optimizer.zero_grad()
            with backend.autocast():
                loss = torch.nn.functional.cross_entropy(model(x), y)
            backend.backward(loss, optimizer)
            backend.step(optimizer, 1.0)
            backend.sync()
            losses.append(loss.item())
            if iteration % EVERY == 0:
                save(path, backend, model, optimizer, iteration)
            print("iteration", iteration, "done", flush=True)
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    found = {
        "first": first,
        "losses": losses,
        "weights": hashlib.sha256(weights).hexdigest(),
        "random": backend.rng_state()["xla"],
    }
    print(json.dumps(found))


def save(path: Path, backend: Any, model: Any, optimizer: Any, iteration: int) -> None:
    """Writes a checkpoint beside the last one and puts it in its place."""
    objects = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state = {
        **map_tensors(objects, lambda tensor: tensor.cpu()),
        "backend": backend.state_dict(),
        "host": random_state.capture(),
        "device": backend.rng_state(),
        "iteration": iteration,
    }
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)


def load(path: Path, backend: Any, model: Any, optimizer: Any) -> int:
    """Restores a checkpoint, random states last, and returns the next iteration."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    backend.load_state_dict(state["backend"])
    backend.sync()
    random_state.restore(state["host"])
    backend.set_rng_state(state["device"])
    return int(state["iteration"]) + 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
