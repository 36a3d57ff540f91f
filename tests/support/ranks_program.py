"""A program for torchrun: trains a small model in several processes and tells what came of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from crosstrain.backends import get


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Makes a model, different in each process until it is prepared, and its optimizer."""
    torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model.double()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def main(folder: Path) -> None:
    """Trains on parts of the same batches, with a window of two, and writes the weights."""
    with get("cpu") as backend:
        rank, size = backend.world.rank, backend.world.size
        model, optimizer = make()
        wrapped, optimizer = backend.prepare(model, optimizer)
        generator, kept = torch.Generator().manual_seed(1), list[float]()
        for iteration in range(6):
            batch = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            part = batch[rank * 8 // size : (rank + 1) * 8 // size]
            if iteration % 2 == 0:
                with backend.accumulating(wrapped):
                    backend.backward(wrapped(part).square().mean() / 2, optimizer)
                kept = [parameter.grad.sum().item() for parameter in wrapped.parameters()]
                continue
            backend.backward(wrapped(part).square().mean() / 2, optimizer)
            backend.step(optimizer)
            optimizer.zero_grad()
            backend.sync()
        weights = [value.flatten().tolist() for value in model.state_dict().values()]
        told: dict[str, Any] = {"rank": rank, "size": size, "wrapped": type(wrapped).__name__}
        told |= {"weights": weights, "kept": kept}
        (folder / f"{rank}-of-{size}.json").write_text(json.dumps(told))
    assert not distributed.is_initialized(), "close() leaves the process group"
    for _ in range(3):
        with get("cpu") as again:
            ones: Any = torch.ones(())
            if again.world.size > 1:
                group: Any = distributed
                group.all_reduce(ones)
            assert ones.item() == again.world.size, "a group that was left can be joined again"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
