"""A program for torchrun: one rank leaves a training that shares gradients, and how."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from crosstrain.engine import PerRank, create_supervised_trainer
from crosstrain.engine.ranks.world import this_rank


class Batches:
    """Batches of which rank 1 has three; then it raises, is killed, or has no more."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(200):
            if number == 3 and this_rank() == 1:
                if self.how == "raise":
                    raise ValueError("no such batch")
                if self.how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                return
            yield torch.ones(4, 3), torch.zeros(4, 2)


def main(how: str) -> None:
    """Trains until rank 1 leaves."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.functional.mse_loss
    trainer = create_supervised_trainer(model, optimizer, loss, backend="cpu", deterministic=True)
    if how == "stay":
        # A pool of threads that idles on both ranks; it keeps their processes alive.
        threading.Thread(target=time.sleep, args=(100,), name="idle pool").start()
    trainer.run(PerRank(Batches(how)), max_epochs=1)
    # Its connections stay open, so the other rank does not notice by itself.
    time.sleep(100)


if __name__ == "__main__":
    main(sys.argv[1])
