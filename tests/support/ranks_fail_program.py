"""A program for torchrun: one rank leaves a training that shares gradients, and how."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from crosstrain.engine import PerRank, create_supervised_trainer
from crosstrain.engine.ranks.world import this_rank


class Batches:
    """Batches of which rank 1 has three; then it raises, or has no more."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(200):
            if number == 3 and this_rank() == 1:
                if self.raises:
                    raise ValueError("no such batch")
                return
            yield torch.ones(4, 3), torch.zeros(4, 2)


def main(how: str) -> None:
    """Trains until rank 1 leaves."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)
    trainer.run(PerRank(Batches(how == "raise")), max_epochs=1)
    # Its connections stay open, so the other rank does not notice by itself.
    time.sleep(100)


if __name__ == "__main__":
    main(sys.argv[1])
