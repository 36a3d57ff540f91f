"""Trains a small network on real handwritten digits, on any backend; kill it and start it again.

    python examples/digits.py --backend cpu --epochs 5 --out digits
    torchrun --nproc-per-node 2 examples/digits.py --backend cpu --epochs 5 --out digits

Started again with the same folder it goes on from its last checkpoint, and ends with the same bits
as a run that nobody stopped, if it has as many processes. Copy it and put your own model and data
in.
"""

import argparse
import random
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import add_backend_argument
from crosstrain.engine import (
    Events,
    StepEvents,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    mean_over_ranks,
    resume_or_start,
)


class Digits(Dataset):
    def __init__(self, training):
        images, labels = load_digits(return_X_y=True)
        part = slice(None, 1437) if training else slice(1437, None)
        self.images = torch.tensor(images[part], dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.labels = torch.tensor(labels[part])
        self.training = training

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if self.training:  # random augmentation: exact on resume, whoever draws it, in any worker
            image = torch.roll(image, (random.randint(-1, 1), random.randint(-1, 1)), (1, 2))
            image = image * float(np.random.uniform(0.8, 1.2))
            image = image + 0.05 * torch.randn(1, 8, 8)
        return image, self.labels[index]


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25), nn.Linear(512, 10)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_backend_argument(parser)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="digits")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the number of threads changes fp32 results
    manual_seed(2026)
    loader = DataLoader(Digits(True), batch_size=48, shuffle=True, num_workers=args.workers)
    test_loader = DataLoader(Digits(False), batch_size=120)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))

    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend=args.backend, deterministic=True
    )
    evaluator = create_supervised_evaluator(model, backend=trainer.backend)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())

    first = trainer.backend.world.rank == 0  # each process tests; one prints
    correct = []

    @evaluator.on(Events.ITERATION_COMPLETED)
    def count():
        predicted, wanted = evaluator.state.output
        correct.append((predicted.argmax(1) == wanted).sum())

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        correct.clear()
        evaluator.run(test_loader)
        accuracy = float(sum(correct)) / len(test_loader.dataset)
        loss = float(mean_over_ranks(trainer))  # of the whole batch, in all processes together
        if first:
            print(f"epoch {trainer.state.epoch}: loss {loss:.3f}, test accuracy {accuracy:.2%}")

    run = resume_or_start(
        trainer,
        {"model": model, "optimizer": optimizer, "scheduler": scheduler},
        args.out,
        every=10,
    )
    if run.resumed_from and first:
        print(f"resumed from {run.resumed_from}")
    trainer.run(loader, max_epochs=args.epochs)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
