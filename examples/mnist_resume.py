"""Save and resume on MNIST: crash a run where you like, start it again, and end with the same bits.

    python examples/mnist_resume.py --deterministic --output-dir /tmp/whole
    python examples/mnist_resume.py --deterministic --output-dir /tmp/crashed --crash-iteration 60
    python examples/mnist_resume.py --deterministic --output-dir /tmp/crashed

The first and the last command print the same hash of the weights. The last one finds the newest
checkpoint by itself; `--resume-from /tmp/crashed/checkpoint_50.pt` would name one. Ctrl-C and
SIGTERM save and end the run in order.

MNIST comes through torchvision. Where that is not installed, or the data cannot be reached,
scikit-learn's digits, which are part of that package, take its place, and the program says so.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from crosstrain.backends import add_backend_argument
from crosstrain.engine import (
    Engine,
    Events,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

log = logging.getLogger("mnist_resume")


def network() -> nn.Module:
    """Returns a small convolutional network with dropout and batch norm, for images of any size."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 3, padding=1),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 20, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(320, 50),
        nn.ReLU(),
        nn.Linear(50, 10),
    )


def mnist(folder: Path) -> tuple[Dataset[Any], Dataset[Any]]:
    """Returns MNIST's 60,000 training and 10,000 validation images; fetches them if need be.

    Raises:
        ImportError: if torchvision is not installed.
        OSError, RuntimeError: if the data cannot be fetched.
    """
    from torchvision import datasets, transforms

    prepare = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    training = datasets.MNIST(folder, train=True, download=True, transform=prepare)
    return training, datasets.MNIST(folder, train=False, transform=prepare)


def digits() -> tuple[Dataset[Any], Dataset[Any]]:
    """Returns scikit-learn's 1,797 handwritten digits of 8 x 8, the last 360 for validation."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels)
    return TensorDataset(inputs[:-360], targets[:-360]), TensorDataset(
        inputs[-360:], targets[-360:]
    )


def load_data(name: str, folder: Path) -> tuple[Dataset[Any], Dataset[Any]]:
    """Returns the data of this name; for `auto`, MNIST if it can be had, and says which it is."""
    if name == "digits":
        return digits()
    try:
        return mnist(folder)
    except (ImportError, OSError, RuntimeError) as error:
        if name == "mnist":
            raise
        print(f"MNIST is not available ({error}). Training on scikit-learn's digits instead.")
        return digits()


def accuracy_of(evaluator: Engine, loader: DataLoader[Any]) -> float:
    """Returns the share of a loader's images that an evaluator's model gets right."""
    right = total = 0

    def count(engine: Engine) -> None:
        nonlocal right, total
        predicted, expected = engine.state.output
        right += int((predicted.argmax(1) == expected).sum())
        total += len(expected)

    with evaluator.add_event_handler(Events.ITERATION_COMPLETED, count):
        evaluator.run(loader)
    return right / total


def train(args: argparse.Namespace) -> int:
    """Trains as the arguments say; returns the exit code."""
    manual_seed(args.seed)
    training, validation = load_data(args.data, args.data_dir)
    train_loader = DataLoader(training, args.batch_size, shuffle=True, num_workers=args.num_workers)
    val_loader = DataLoader(validation, 4 * args.batch_size)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        backend=args.backend,
        deterministic=args.deterministic,
    )
    evaluator = create_supervised_evaluator(model, backend=args.backend)

    @trainer.on(Events.ITERATION_COMPLETED(every=args.log_interval))
    def show_loss(engine: Engine) -> None:
        log.info("iteration %d: loss %.4f", engine.state.iteration, engine.state.output)

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        scheduler.step()
        accuracy = accuracy_of(evaluator, val_loader)
        print(f"epoch {engine.state.epoch}: validation accuracy {accuracy:.4f}", flush=True)

    if args.crash_iteration is not None:

        @trainer.on(Events.ITERATION_STARTED(once=args.crash_iteration))
        def crash() -> None:
            raise RuntimeError(f"crash at iteration {args.crash_iteration}, as asked for")

    run = resume_or_start(
        trainer,
        {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler},
        args.output_dir,
        every=args.checkpoint_every,
        resume_from=args.resume_from,
    )
    start = run.resumed_from
    print("starts from the beginning" if start is None else f"resumes from {start}", flush=True)
    trainer.run(train_loader, max_epochs=args.epochs)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        # Of a sharded model each process has a part.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().cpu().contiguous().numpy().tobytes())
    print(f"iteration {trainer.state.iteration}: weights {digest.hexdigest()}")
    return run.exit_code


def main() -> int:
    """Reads the arguments and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("mnist_save"), help="checkpoints")
    parser.add_argument("--data", choices=("auto", "mnist", "digits"), default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("mnist_data"), help="of MNIST")
    add_backend_argument(parser)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=50)
    parser.add_argument("--checkpoint-every", type=int, default=50, help="iterations")
    parser.add_argument("--crash-iteration", type=int, help="raise an error when it starts")
    parser.add_argument("--resume-from", type=Path, help="this checkpoint, not the newest one")
    parser.add_argument(
        "--deterministic", action="store_true", help="end with the same bits, however often resumed"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("crosstrain.engine.Engine", "crosstrain.engine.DeterministicEngine"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return train(args)


if __name__ == "__main__":
    sys.exit(main())
