"""Trainings for `crosstrain verify`: one that resumes exactly, and some with a planted fault each.

Each has 12 iterations in 2 epochs, unless it says otherwise.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.backends import World
from crosstrain.ci import Training
from crosstrain.engine import Events, StepEvents, create_supervised_trainer

SAMPLES, BATCH, FEATURES = 24, 4, 6


class Numbers(Dataset[Any]):
    """Points with noise from the global generators, as an augmentation has it."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(5)
        self.x = torch.randn(SAMPLES, FEATURES, generator=source)
        self.y = torch.randint(0, 3, (SAMPLES,), generator=source)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * torch.randn(FEATURES), self.y[index]


class OwnGenerator(Numbers):
    """Draws its noise from a generator of its own."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.generator = np.random.default_rng(seed)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] * float(self.generator.uniform(0.9, 1.1)), self.y[index]


class Counting(nn.Module):
    """Weakens what passes through it, the more often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return x * 0.99 ** self.calls[0]


class _Dithered(torch.autograd.Function):
    """Rounds its gradient at random, and seeds that by the clock, as some fused kernels do."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        source = torch.Generator().manual_seed(time.perf_counter_ns())
        return gradient * (1 + 1e-3 * torch.rand(gradient.shape, generator=source))


class Dithered(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Dithered.apply(x)


class Negatives(Numbers):
    """Points of which a handler replaces some at random, by a count that no object of it has."""

    draws = itertools.count()

    def draw_negatives(self) -> None:
        self.y = torch.from_numpy(np.random.default_rng([7, next(self.draws)]).permutation(self.y))


class CountingSampler(Sampler[int]):
    """Shuffles by the number of its pass, which a server counts for all samplers, as it were."""

    passes = itertools.count()

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(next(CountingSampler.passes))
        return iter(torch.randperm(SAMPLES, generator=generator).tolist())


class Normalizer:
    """Normalizes by running statistics that are in no state_dict."""

    def __init__(self) -> None:
        self.mean, self.count = torch.zeros(FEATURES), 0

    def __call__(self, batch: Any, **_: Any) -> Any:
        self.count += 1
        self.mean = self.mean + (batch[0].mean(0) - self.mean) / self.count
        return batch[0] - self.mean, batch[1]


def build(
    backend: str,
    workers: int = 0,
    *,
    data: Numbers | None = None,
    middle: nn.Module | None = None,
    sampler: Sampler[int] | None = None,
    **options: Any,
) -> Training:
    model = nn.Sequential(
        nn.Linear(FEATURES, 8),
        nn.BatchNorm1d(8),
        middle or nn.Identity(),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        backend=backend,
        deterministic=True,
        **options,
    )
    loader = DataLoader(
        Numbers() if data is None else data,
        BATCH,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
    )
    return Training(trainer, loader, 2, {"model": model, "optimizer": optimizer})


def scheduled(backend: str, saved: bool) -> Training:
    training = build(backend)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        training.to_save["optimizer"], lambda step: 0.9**step
    )
    training.trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    if not saved:
        return training
    return Training(training.trainer, training.data, 2, {**training.to_save, "s": scheduler})


def shards(backend: str) -> Training:
    return build(backend, shards=2)


def exact(backend: str, workers: int = 0) -> Training:
    print("A line of the training's own, which is nobody else's business.", flush=True)
    training = build(backend, workers)
    scheduler = torch.optim.lr_scheduler.StepLR(training.to_save["optimizer"], 3, 0.5)
    training.trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    return Training(training.trainer, training.data, 2, {**training.to_save, "s": scheduler})


def unseeded_generator(backend: str) -> Training:
    return build(backend, data=OwnGenerator(None))


def own_generator(backend: str) -> Training:
    return build(backend, data=OwnGenerator(3))


def own_generator_on_rank_1(backend: str) -> Training:
    return build(backend, data=OwnGenerator(3) if World.from_environment().rank == 1 else Numbers())


def hidden_state(backend: str) -> Training:
    return build(backend, middle=Counting())


def reseeding(backend: str) -> Training:
    """A handler seeds the global generators from a number that was drawn when it was made."""
    training = build(backend)
    trainer, seed = training.trainer, int(torch.randint(0, 1000, ()))

    @trainer.on(Events.ITERATION_COMPLETED(every=5))
    def reseed() -> None:
        torch.manual_seed(seed + trainer.state.iteration)

    return training


def unsaved_scheduler(backend: str) -> Training:
    return scheduled(backend, saved=False)


def unsaved_stream(backend: str) -> Training:
    """A handler adds noise to a weight, from a generator that is seeded but not saved."""
    training = build(backend)
    source = torch.Generator().manual_seed(11)
    weight = training.to_save["model"][4].weight

    @training.trainer.on(Events.ITERATION_COMPLETED)
    def disturb() -> None:
        with torch.no_grad():
            weight.add_(1e-4 * torch.randn(weight.shape, generator=source))

    return training


def negatives(backend: str) -> Training:
    data = Negatives()
    training = build(backend, data=data)
    training.trainer.add_event_handler(Events.EPOCH_STARTED, data.draw_negatives)
    return training


def counting_sampler(backend: str) -> Training:
    return build(backend, sampler=CountingSampler())


def normalizer(backend: str) -> Training:
    return build(backend, prepare_batch=Normalizer())


def second_loader(backend: str) -> Training:
    """Unlabelled points from a loader that the step, and not the engine, draws from."""
    others = itertools.cycle(DataLoader(Numbers(), BATCH, sampler=CountingSampler()))

    def mixed(batch: Any, **_: Any) -> Any:
        return batch[0] + 0.1 * next(others)[0], batch[1]

    return build(backend, prepare_batch=mixed)


def unfreezes_once(backend: str) -> Training:
    """Three epochs, the first layer frozen by a hook that is taken away when the second begins."""
    training = build(backend)
    hook = training.to_save["model"][0].weight.register_hook(torch.zeros_like)
    training.trainer.add_event_handler(Events.EPOCH_STARTED(once=2), hook.remove)
    return Training(training.trainer, training.data, 3, training.to_save)


def nondeterministic(backend: str) -> Training:
    return build(backend, middle=Dithered())


def ends_itself(backend: str) -> Training:
    """A handler ends the run when it has been called ten times, and forgets how often it was."""
    training = build(backend)
    calls: list[int] = []

    @training.trainer.on(Events.ITERATION_COMPLETED)
    def count() -> None:
        calls.append(1)
        if len(calls) == 10:
            training.trainer.terminate()

    return training


def fails_when_resumed(backend: str) -> Training:
    training = build(backend)

    @training.trainer.on(Events.STARTED)
    def complain() -> None:
        if training.trainer.state.iteration:
            raise RuntimeError("this training cannot go on")

    return training


def fails(backend: str) -> Training:
    training = build(backend)

    @training.trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail() -> None:
        print("its last words", file=sys.stderr)
        raise RuntimeError("the third iteration is bad")

    return training


def sleeps(backend: str) -> Training:
    training = build(backend)
    training.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: time.sleep(60))
    return training
