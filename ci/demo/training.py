"""The demo's training, run in a child process: a small network on scikit-learn's digits.

It prints a line of JSON for each iteration, so that its parent can follow it and kill it, and goes
on from its last checkpoint when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from crosstrain.ci.trials.digests import digest
from crosstrain.ci.trials.digits import DigitsDataset, digits_network
from crosstrain.engine import (
    Events,
    StepEvents,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

__all__ = ["main", "train"]


def train(backend: str, epochs: int, workers: int, folder: Path, every: int) -> dict[str, Any]:
    """Trains, or goes on with the training that the folder holds.

    Args:
        backend: a spec.
        epochs: how many epochs in all.
        workers: worker processes of the loader.
        folder: where checkpoints are kept.
        every: iterations between two checkpoints.

    Returns:
        `accuracy` on the test images, `iterations`, `resumed_from` (an iteration, or None) and
        `digests` of the weights, the optimizer and the random states.
    """
    # The network is too small for several threads, and their number would change its bits.
    torch.set_num_threads(1)
    manual_seed(2026)
    loader = DataLoader(DigitsDataset(True), batch_size=48, shuffle=True, num_workers=workers)
    model = digits_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend=backend, deterministic=True
    )
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())

    @trainer.on(Events.ITERATION_COMPLETED)
    def report() -> None:  # pyright: ignore[reportUnusedFunction]
        state = trainer.state
        line = {
            "iteration": state.iteration,
            "epoch": state.epoch,
            "loss": state.output.hex(),
            "batch": digest(state.batch),
        }
        print(json.dumps(line), flush=True)

    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    run = resume_or_start(trainer, to_save, folder, every=every)
    resumed_from = trainer.state.iteration if run.resumed_from else None
    print(json.dumps({"resumed_from": resumed_from, "total": epochs * len(loader)}), flush=True)
    trainer.run(loader, max_epochs=epochs)
    digests = {
        "weights": digest(model.state_dict()),
        "optimizer": digest([optimizer.state_dict(), scheduler.state_dict()]),
        "random states": digest(trainer.state_dict()["rng_states"]),
    }
    return {
        "accuracy": _accuracy(model, trainer.backend),
        "iterations": trainer.state.iteration,
        "resumed_from": resumed_from,
        "digests": digests,
    }


def _accuracy(model: nn.Module, backend: Any) -> float:
    evaluator = create_supervised_evaluator(model, backend=backend)
    right = [0]

    @evaluator.on(Events.ITERATION_COMPLETED)
    def count() -> None:  # pyright: ignore[reportUnusedFunction]
        predicted, wanted = evaluator.state.output
        right[0] += int((predicted.argmax(1) == wanted).sum())

    test = DigitsDataset(False)
    evaluator.run(DataLoader(test, batch_size=120))
    return right[0] / len(test)


def main() -> int:
    """Runs the training that the command line asks for and prints its result as the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    result = train(args.backend, args.epochs, args.workers, args.folder, args.every)
    print(json.dumps({"result": result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
