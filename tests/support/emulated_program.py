"""A program on the emulated device: trains, counts what is read, goes on from a state."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import emulated_device
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.backends import BackendUnavailable
from crosstrain.backends.accelerator import AcceleratorBackend, MpsBackend
from crosstrain.backends.cpu import CpuBackend
from crosstrain.engine import Events, create_supervised_trainer, manual_seed


def host(state: Any) -> Any:
    """Returns a nest with its tensors on the CPU, as a checkpoint has them."""
    return pytree.tree_map(lambda one: one.cpu() if isinstance(one, torch.Tensor) else one, state)


def train(backend: Any, start: Any = None, stop: int = 0) -> tuple[dict[str, Any], Any]:
    """Trains two epochs, or to an iteration; returns what came of it, and the states there."""
    manual_seed(3 if start is None else 99)
    data = torch.randn(240, 6, generator=torch.Generator().manual_seed(5))
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = torch.nn.functional.cross_entropy
    trainer = create_supervised_trainer(
        model, optimizer, loss, backend=backend, deterministic=True, max_norm=1.0
    )
    if start is not None:
        for thing, state in zip((model, optimizer, trainer), start, strict=True):
            thing.load_state_dict(state)
    counted: list[int] = []
    kept: Any = None

    @trainer.on(Events.ITERATION_COMPLETED)
    def count() -> None:
        nonlocal kept
        counted.append(sum(emulated_device.READS.values()))
        if trainer.state.iteration == stop:
            kept = host([model.state_dict(), optimizer.state_dict(), trainer.state_dict()])

    rows = DataLoader(TensorDataset(data, (data[:, 0] > 0).long()), 4, shuffle=True)
    trainer.run(rows, max_epochs=2)
    told = {
        "device": str(next(model.parameters()).device),
        "iteration": trainer.state.iteration,
        "weights": [parameter.detach().cpu().tolist() for parameter in model.parameters()],
        "reads": counted[-1] - counted[-101] if len(counted) > 101 else None,
    }
    return told, kept


def refusal(kind: Any, option: str) -> str:
    """Returns why a backend refuses an option."""
    try:
        kind(option)
    except BackendUnavailable as error:
        return error.reason
    return "nothing"


def main(folder: Path) -> None:
    """Writes what the runs came to."""
    straight, _ = train(AcceleratorBackend())
    again, kept = train(AcceleratorBackend(), stop=33)
    resumed, _ = train(AcceleratorBackend(), kept)
    host_run, on_host = train(CpuBackend(), stop=33)
    told = {
        "straight": straight,
        "again": again,
        "resumed": resumed,
        "cpu": host_run,
        "generators": [len(state[2]["rng_states"]["device"]) for state in (kept, on_host)],
        "bf16": refusal(AcceleratorBackend, "bf16"),
        "fsdp": refusal(AcceleratorBackend, "fsdp"),
        "mps": refusal(MpsBackend, "fp32"),
    }
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
