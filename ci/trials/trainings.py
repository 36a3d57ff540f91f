"""Our own trainings, of the scenarios and the demo: small real networks on handwritten digits.

Each is named as a user's is, `module:function`: see `crosstrain.ci.trials.target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from crosstrain.engine import (
    DeterministicEngine,
    Events,
    StepEvents,
    create_supervised_evaluator,
    create_supervised_trainer,
)

from .digits import DigitsDataset, digits_network
from .target import Training

_EPOCHS = 2
# Eight batches an epoch, of which the last is smaller.
_SAMPLES, _BATCH = 120, 16


def _data(workers: int) -> DataLoader[Any]:
    return DataLoader(
        DigitsDataset(True, _SAMPLES), batch_size=_BATCH, shuffle=True, num_workers=workers
    )


def _perceptron() -> nn.Module:
    # The normalisation lets so short a training learn something that a curve shows.
    return nn.Sequential(
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9)


def _trainer(backend: str, model: Any, optimizer: Any, **options: Any) -> DeterministicEngine:
    # The networks are too small for several threads, and their number would change their bits.
    torch.set_num_threads(1)
    loss_fn = options.pop("loss_fn", nn.functional.cross_entropy)
    trainer = create_supervised_trainer(
        model, optimizer, loss_fn, backend=backend, deterministic=True, **options
    )
    return cast("DeterministicEngine", trainer)


def plain(backend: str, workers: int = 0, **options: Any) -> Training:
    """A network that draws no random numbers."""
    model = _perceptron()
    optimizer = _sgd(model)
    trainer = _trainer(backend, model, optimizer, **options)
    return Training(trainer, _data(workers), _EPOCHS, {"model": model, "optimizer": optimizer})


def accumulating(backend: str, workers: int = 0) -> Training:
    """Windows of 3 iterations: the third crosses the epochs, and the last one has 1."""
    return plain(backend, workers, gradient_accumulation_steps=3, max_norm=1.0)


def overflowing(backend: str, workers: int = 0, at: Sequence[int] = ()) -> Training:
    """Gradients beyond the range of fp16 in some iterations, whose losses are those of others."""
    held: list[DeterministicEngine] = []

    def loss_fn(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if held[0].state.iteration in at:
            hooked: Any = found
            hooked.register_hook(lambda gradient: gradient * 2.0**14)
        return nn.functional.cross_entropy(found, wanted)

    training = plain(backend, workers, loss_fn=loss_fn)
    held.append(training.trainer)
    return training


def two_optimizers(backend: str, workers: int = 0) -> Training:
    """Two networks in a row, one trained by SGD and one by AdamW."""
    body = nn.Sequential(nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 32), nn.ReLU())
    head = nn.Linear(32, 10)
    first, second = _sgd(body), torch.optim.AdamW(head.parameters(), lr=1e-2)

    def through(models: list[nn.Module], images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = models[1](models[0](images))
        return found

    trainer = _trainer(backend, [body, head], [first, second], model_fn=through)
    to_save = {"body": body, "head": head, "body_optimizer": first, "head_optimizer": second}
    return Training(trainer, _data(workers), _EPOCHS, to_save)


def random_layers(backend: str, workers: int = 0, **options: Any) -> Training:
    """A convolutional network with batch norm and dropout, which draws on the device."""
    model = digits_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = _trainer(backend, model, optimizer, **options)
    return Training(trainer, _data(workers), _EPOCHS, {"model": model, "optimizer": optimizer})


def in_shards(backend: str, workers: int = 0) -> Training:
    """The same in four logical shards, with clipping."""
    return random_layers(backend, workers, shards=4, max_norm=1.0)


def scheduled(backend: str, workers: int = 0) -> Training:
    """A rate that rises for 5 steps, then falls along a cosine."""
    training = plain(backend, workers)
    optimizer = training.to_save["optimizer"]
    kinds = torch.optim.lr_scheduler
    rising = kinds.LinearLR(optimizer, 0.1, total_iters=5)
    falling = kinds.CosineAnnealingLR(optimizer, 11)
    scheduler = kinds.SequentialLR(optimizer, [rising, falling], [5])
    training.trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    to_save = {**training.to_save, "scheduler": scheduler}
    return Training(training.trainer, training.data, _EPOCHS, to_save)


def digits(backend: str, workers: int = 0, epochs: int = 5) -> Training:
    """All the digits, for a number of epochs that is asked for, and its accuracy: the demo's."""
    loader = DataLoader(DigitsDataset(True), batch_size=48, shuffle=True, num_workers=workers)
    model = digits_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    trainer = _trainer(backend, model, optimizer)
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())

    @trainer.on(Events.COMPLETED)
    def measure() -> None:
        trainer.state.metrics["accuracy"] = _accuracy(model, trainer.backend)

    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return Training(trainer, loader, epochs, to_save)


def _accuracy(model: nn.Module, backend: Any) -> float:
    evaluator = create_supervised_evaluator(model, backend=backend)
    right = [0]

    @evaluator.on(Events.ITERATION_COMPLETED)
    def count() -> None:
        predicted, wanted = evaluator.state.output
        right[0] += int((predicted.argmax(1) == wanted).sum())

    test = DigitsDataset(False)
    evaluator.run(DataLoader(test, batch_size=120))
    return right[0] / len(test)
