"""A program for torchrun: a sharded run that is resumable, killed once where it is asked to be."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from crosstrain.backends import get
from crosstrain.engine import Events, create_supervised_trainer, resume_or_start


def main(folder: Path, kill_at: int) -> None:
    """Trains for 12 iterations with windows of two; kills itself at one of them, the first time."""
    with get("cpu:fsdp") as backend:
        torch.manual_seed(0)
        model: Any = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU())
        model.append(torch.nn.Linear(16, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = create_supervised_trainer(
            model,
            optimizer,
            torch.nn.functional.mse_loss,
            backend=backend,
            gradient_accumulation_steps=2,
            deterministic=True,
        )
        run = resume_or_start(
            trainer, {"model": model, "optimizer": optimizer}, folder / "run", every=3
        )
        mark = folder / "killed"

        @trainer.on(Events.ITERATION_STARTED)
        def kill() -> None:
            first = backend.world.rank == 1 and not mark.exists()
            if trainer.state.iteration == kill_at and first:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        generator = torch.Generator().manual_seed(1)
        x = torch.randn(48, 4, generator=generator)
        data = torch.utils.data.TensorDataset(x, x[:, :2])
        loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        trainer.run(loader, max_epochs=2)
        parts = [value.to_local().numpy().tobytes() for value in model.state_dict().values()]
        told = {
            "digest": hashlib.sha256(b"".join(parts)).hexdigest(),
            "from": None if run.resumed_from is None else run.resumed_from.name,
            "iteration": trainer.state.iteration,
            "saved": sorted(path.name for path in (folder / "run").glob("*.sharded")),
        }
        (folder / f"told-{backend.world.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
