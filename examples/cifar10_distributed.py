"""Save and resume on CIFAR10 in many processes: crash a run where you like, and start it again.

    run="torchrun --nproc-per-node 2 examples/cifar10_distributed.py"
    $run --output-dir /tmp/whole
    $run --output-dir /tmp/crashed --crash-iteration 13
    $run --output-dir /tmp/crashed

The first run and the last print the same hash of the weights. The last one finds the newest
checkpoint by itself; `--resume-from /tmp/crashed/checkpoint_10.pt` would name one. It goes on in
another number of processes too, or in one, without torchrun: with the same batches, and numbers
that differ in their last bits.

CIFAR10 is read from `--data-dir`: `cifar-10-batches-bin` or `cifar-10-batches-py`, as they are in
the archives of https://www.cs.toronto.edu/~kriz/cifar.html, or through torchvision, which fetches
it. Where neither is there, a small generated set takes its place, and the program says so.
"""

from __future__ import annotations

import argparse
import codecs
import hashlib
import io
import logging
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import add_backend_argument
from crosstrain.engine import (
    Engine,
    Events,
    create_supervised_evaluator,
    create_supervised_trainer,
    manual_seed,
    mean_over_ranks,
    resume_or_start,
)

log = logging.getLogger("cifar10_distributed")

Arrays = tuple[torch.Tensor, torch.Tensor]  # images (n, 3, 32, 32), uint8; labels (n,), int64

# What the pickles of CIFAR10 need. Any other name would let a file run code.
ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype")}
RECONSTRUCT = {"numpy.core.multiarray", "numpy._core.multiarray"}


class ArraysOnly(pickle.Unpickler):
    """Reads a pickle of plain values and arrays, and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Returns what a pickle asks for by name, if it is one of NumPy's arrays.

        Raises:
            pickle.UnpicklingError: if it is something else.
        """
        if (module_name, global_name) in ALLOWED:
            return getattr(np, global_name)
        if module_name in RECONSTRUCT and global_name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module_name, global_name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them
            return codecs.encode
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of CIFAR10")


def read_pickled(folder: Path, names: list[str]) -> Arrays:
    """Reads batches of `cifar-10-batches-py`."""
    images, labels = [], list[int]()
    for name in names:
        content = io.BytesIO((folder / name).read_bytes())
        batch = ArraysOnly(content, encoding="bytes").load()
        images.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
        labels += batch[b"labels"]
    return torch.from_numpy(np.concatenate(images)), torch.tensor(labels)


def read_binary(folder: Path, names: list[str]) -> Arrays:
    """Reads batches of `cifar-10-batches-bin`: a byte of label, 3072 of image, and so on."""
    records = [np.fromfile(folder / f"{name}.bin", np.uint8).reshape(-1, 3073) for name in names]
    found = torch.from_numpy(np.concatenate(records))
    return found[:, 1:].reshape(-1, 3, 32, 32).contiguous(), found[:, 0].long()


def cifar10(folder: Path, fetch: bool) -> tuple[Arrays, Arrays]:
    """Returns CIFAR10's 50,000 training and 10,000 test images.

    Args:
        folder: where it is.
        fetch: whether torchvision may fetch it into the folder.

    Raises:
        ImportError: if it is not there, and torchvision is not installed.
        OSError, RuntimeError: if it cannot be fetched.
    """
    training, test = [f"data_batch_{number}" for number in range(1, 6)], ["test_batch"]
    binary, pickled = folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"
    if binary.is_dir():
        return read_binary(binary, training), read_binary(binary, test)
    if not pickled.is_dir():
        from torchvision.datasets import CIFAR10

        CIFAR10(folder, download=fetch)
    return read_pickled(pickled, training), read_pickled(pickled, test)


def generated(training: int = 480, test: int = 120) -> tuple[Arrays, Arrays]:
    """Returns images of ten made-up kinds: a pattern for each, shifted, under noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 3, 8, 8, generator=generator)
    patterns = nn.functional.interpolate(coarse, 32, mode="bilinear")

    def make(count: int) -> Arrays:
        labels = torch.arange(count) % 10
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        return ((patterns[labels] + 0.2 * noise).clamp(0, 1) * 255).to(torch.uint8), labels

    return make(training), make(test)


class Images(Dataset[Any]):
    """Images with labels; those to train on are cropped and flipped at random.

    Args:
        arrays: images and labels.
        training: whether they are augmented.
    """

    def __init__(self, arrays: Arrays, training: bool) -> None:
        self.images, self.labels = arrays
        self.training = training

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index].float() / 128 - 1
        if self.training:  # the same crop in any process of any world
            top, left, flip = (int(torch.randint(high, ())) for high in (9, 9, 2))
            padded = nn.functional.pad(image, (4, 4, 4, 4))
            image = padded[:, top : top + 32, left : left + 32]
            image = image.flip(2) if flip else image
        return image, self.labels[index]


def network() -> nn.Module:
    """Returns a small convolutional network with batch norm and dropout."""

    def block(before: int, after: int) -> list[nn.Module]:
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *(*block(3, 16), *block(16, 32), *block(32, 32)),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10)),
    )


def choose(name: str, folder: Path, fetch: bool) -> tuple[str, tuple[Arrays, Arrays]]:
    """Returns the data of this name; for `auto`, CIFAR10 if it can be had, and says which it is."""
    if name != "generated":
        try:
            return "cifar10", cifar10(folder, fetch)
        except (ImportError, OSError, RuntimeError) as error:
            if name == "cifar10":
                raise
            print(f"CIFAR10 is not available ({error}). Training on a small generated set instead.")
    return "generated", generated()


def load_data(name: str, folder: Path, rank: int, size: int) -> tuple[Arrays, Arrays]:
    """Returns the same data in all processes; the first one chooses, and fetches it."""
    if size == 1:
        return choose(name, folder, fetch=True)[1]
    chosen: list[Any] = [name]
    found: Any = None
    if rank == 0:
        chosen[0], found = choose(name, folder, fetch=True)
    distributed.broadcast_object_list(chosen)
    return found or choose(chosen[0], folder, fetch=False)[1]


def accuracy_of(evaluator: Engine, loader: DataLoader[Any]) -> float:
    """Returns the share of images that the model gets right, in the parts of all processes."""
    backend = evaluator.backend
    assert backend is not None
    counts = torch.zeros(2, device=backend.device)

    def count(engine: Engine) -> None:
        predicted, expected = engine.state.output
        counts[0] += (predicted.argmax(1) == expected).sum()
        counts[1] += len(expected)

    with evaluator.add_event_handler(Events.ITERATION_COMPLETED, count):
        evaluator.run(loader)
    if backend.world.size > 1:
        distributed.all_reduce(counts)
    return float(counts[0] / counts[1])


def train(args: argparse.Namespace) -> int:
    """Trains as the arguments say; returns the exit code."""
    torch.set_num_threads(1)  # their number changes fp32 results
    manual_seed(args.seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.cross_entropy, backend=args.backend, deterministic=True
    )
    assert trainer.backend is not None
    rank, size = trainer.backend.world.rank, trainer.backend.world.size
    evaluator = create_supervised_evaluator(model, backend=trainer.backend)

    training, test = load_data(args.data, args.data_dir, rank, size)
    # The batch size is that of all processes together, and their samples those of one process.
    loader = DataLoader(
        Images(training, True), args.batch_size, shuffle=True, num_workers=args.num_workers
    )
    # An evaluator takes what it is given: each process tests a part, in as many batches as the
    # others, since the processes of a sharded model compute together.
    mine = np.arange(rank, len(test[1]), size)
    count = math.ceil(len(test[1]) / size / args.batch_size)
    batches = [part.tolist() for part in np.array_split(mine, count)]
    test_loader = DataLoader(Images(test, False), batch_sampler=batches)

    @trainer.on(Events.ITERATION_COMPLETED(every=args.log_interval))
    def show_loss(engine: Engine) -> None:
        loss = mean_over_ranks(engine)
        if rank == 0:
            log.info("iteration %d: loss %.4f", engine.state.iteration, loss.item())

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        scheduler.step()
        accuracy = accuracy_of(evaluator, test_loader)
        if rank == 0:
            print(f"epoch {engine.state.epoch}: test accuracy {accuracy:.4f}", flush=True)

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
    if rank == 0:
        start = run.resumed_from
        print("starts from the beginning" if start is None else f"resumes from {start}", flush=True)
    trainer.run(loader, max_epochs=args.epochs)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        # Of a sharded model each process has a part.
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        digest.update(whole.detach().cpu().contiguous().numpy().tobytes())
    if rank == 0:
        shown = f"iteration {trainer.state.iteration}: weights {digest.hexdigest()}"
        print(f"{size} processes, {shown}" if size > 1 else f"1 process, {shown}", flush=True)
    return run.exit_code


def main() -> int:
    """Reads the arguments and trains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("cifar10_save"), help="checkpoints")
    parser.add_argument("--data", choices=("auto", "cifar10", "generated"), default="auto")
    parser.add_argument("--data-dir", type=Path, default=Path("cifar10_data"), help="of CIFAR10")
    add_backend_argument(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--num-workers", type=int, default=0, help="of each process")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-interval", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=5, help="iterations")
    parser.add_argument("--crash-iteration", type=int, help="raise an error when it starts")
    parser.add_argument("--resume-from", type=Path, help="this checkpoint, not the newest one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("crosstrain.engine.Engine", "crosstrain.engine.DeterministicEngine"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return train(args)


if __name__ == "__main__":
    sys.exit(main())
