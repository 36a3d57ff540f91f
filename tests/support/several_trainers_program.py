"""A script with several trainers, one after the other, that never looks at an exit code.

`python several_trainers_program.py FOLDER KIND STOP`: after STOP iterations, of whichever trainer,
it is sent SIGTERM. What it ends with, if it comes to its end, is in FOLDER/end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.engine import (
    Checks,
    Engine,
    Events,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)
from crosstrain.engine.digest import digest

_X = torch.arange(48.0).reshape(12, 4) / 48


class Script:
    """What all kinds are made of."""

    def __init__(self, folder: Path, stop: int) -> None:
        self._folder, self._left = folder, stop
        self.loader = DataLoader(TensorDataset(_X, _X.sum(1, keepdim=True)), 3, shuffle=True)

    def trainer(self, name: str, model: nn.Module) -> tuple[Engine, Any]:
        """Returns a trainer that saves, and its optimizer."""
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        loss_fn = nn.functional.mse_loss
        trainer = create_supervised_trainer(model, optimizer, loss_fn, deterministic=True)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        # What stops it counts, and is no part of the training.
        checks = Checks(unnamed="off")
        to_save = {"model": model, "optimizer": optimizer}
        resume_or_start(trainer, to_save, self._folder / name, 3, checks=checks)
        return trainer, optimizer

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def fine_tune(self) -> str:
        """Trains a second model on what the first has learned."""
        body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))
        first, _ = self.trainer("first", nn.Sequential(body, nn.Linear(4, 1)))
        first.run(self.loader, max_epochs=2)
        model = nn.Sequential(body, nn.Linear(4, 1))
        second, optimizer = self.trainer("second", model)
        second.run(self.loader, max_epochs=2)
        return digest([model.state_dict(), optimizer.state_dict()])

    def _fold(self, number: int) -> Any:
        model = nn.Linear(4, 1)
        trainer, _ = self.trainer(f"fold {number}", model)
        trainer.run(self.loader, max_epochs=2)
        return model.state_dict()

    def start_again(self) -> str:
        """Starts each run as often as it is stopped, in the same process."""
        found = [self._fold(0) for _ in range(2)][-1]
        return digest([found, self._fold(1)])

    def take_turns(self) -> str:
        """Trains two models, an epoch each, in turns."""
        models = [nn.Linear(4, 1), nn.Linear(4, 1)]
        trainers = [self.trainer(f"model {n}", one)[0] for n, one in enumerate(models)]
        for epoch in range(3):
            for trainer in trainers:
                trainer.run(self.loader, max_epochs=epoch + 1)
        return digest([one.state_dict() for one in models])


def main() -> None:
    """Runs the script."""
    folder, kind, stop = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    manual_seed(7)
    found = getattr(Script(folder, stop), kind)()
    (folder / "end").write_text(found)


if __name__ == "__main__":
    main()
