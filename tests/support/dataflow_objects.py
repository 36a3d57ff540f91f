"""What users write: datasets, samplers and iterables of every kind, over scikit-learn's digits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from resume_harness import IMAGES, augmented
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)

from crosstrain.engine import current_sample

SIZE, BATCH = 44, 8  # 6 batches, the last of 4 samples


class Images(Dataset[torch.Tensor]):
    """Augmented digits: vectors of 64."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return augmented(IMAGES[index])


class WholeBatches(Images):
    """Fetches a whole batch at once, with random numbers for all of it."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert isinstance(indices, list)
        noise = torch.randn(len(indices), 64, generator=current_sample().torch())
        images = IMAGES[torch.tensor(indices)] + 0.1 * noise + 0.1 * torch.rand(64)
        return list(images * random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1))


class ArrayBatches(Images):
    """Takes its indices as the array that its batch sampler gives."""

    def __getitems__(self, indices: np.ndarray[Any, Any]) -> list[torch.Tensor]:
        assert isinstance(indices, np.ndarray)
        return [augmented(image) for image in IMAGES[indices % SIZE]]


class EagerSampler(Sampler[int]):
    """A user's sampler that draws its order from the global generator at once."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size).tolist())


class LazySampler(EagerSampler):
    """A user's sampler that draws each index when it is asked for it, from three generators."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.size):
            drawn = (random.randrange(9), np.random.randint(9), int(torch.randint(9, ())))
            yield sum(drawn) % self.size


class EndlessSampler(Sampler[int]):
    """A user's sampler without an end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(SIZE).tolist()


class OwnGeneratorSampler(EagerSampler):
    """A user's sampler with generators of its own, from which it draws at each index."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.generators = [np.random.default_rng(5), np.random.RandomState(6), random.Random(7)]

    def __iter__(self) -> Iterator[int]:
        new, old, python = self.generators
        for _ in range(self.size):
            yield int(new.integers(9) + old.randint(9) + python.randrange(9)) % self.size


class StatefulSampler(EagerSampler):
    """A user's sampler that counts its passes, and tells them by `state_dict`."""

    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([(index * 7 + self.passes) % self.size for index in range(self.size)])

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


class GrowingBatches(Sampler[list[int]]):
    """A user's batch sampler whose batches have different sizes."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(SIZE).tolist()
        for size in range(2, 8):
            yield [order.pop() for _ in range(size)]


class ArrayBatchSampler(GrowingBatches):
    def __iter__(self) -> Iterator[Any]:
        yield from (np.array(batch) for batch in super().__iter__())


class Stream(IterableDataset[torch.Tensor]):
    """An iterable dataset; each worker has its share."""

    def __init__(self, noisy: bool = True) -> None:
        self.noisy = noisy

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, SIZE, step):
            noise = torch.randn(64) * random.random() * np.random.rand() if self.noisy else 0
            yield IMAGES[index] + 0.1 * noise


class StatefulStream(IterableDataset[torch.Tensor]):
    """An iterable dataset with a state: its position, and its generator's."""

    def __init__(self) -> None:
        self.position, self.generator = 0, torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.position < SIZE // 2:
            index, self.position = self.position, self.position + 1
            yield IMAGES[index] + 0.1 * torch.randn(64, generator=self.generator)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.generator.set_state(state["generator"])


class Walk:
    """An iterator with a state, which stays at its end."""

    def __init__(self) -> None:
        worker = get_worker_info()
        self.position, self.step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self.generator = torch.Generator().manual_seed(self.position)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        if self.position >= SIZE:
            raise StopIteration
        index, self.position = self.position, self.position + self.step
        return IMAGES[index] + 0.1 * torch.randn(64, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.generator.set_state(state["generator"])


class Walks(IterableDataset[torch.Tensor]):
    """An iterable dataset whose iterators have a state."""

    def __iter__(self) -> Walk:
        return Walk()


class StatefulBatches:
    """Batches with a state, no loader: the plainest form of torchdata's protocol."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        first, self.next = self.next, 0
        for index in range(first, 6):
            self.next = index + 1
            yield IMAGES[index * BATCH : (index + 1) * BATCH] + 0.1 * torch.randn(BATCH, 64)
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


class OwnBatches:
    """Batches that can be iterated over again, drawn from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(6):
            yield IMAGES[self.rng.integers(0, SIZE, BATCH)]


def random_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    scale = random.random() + np.random.rand() + torch.rand(())
    return default_collate(samples) * scale + torch.rand(64, generator=current_sample().torch())


def seed_worker(worker: int) -> None:
    """What people do, and should not need to."""
    random.seed(worker)
    np.random.seed(worker)
    torch.manual_seed(worker)


def batches(noise: bool = False) -> Iterator[torch.Tensor]:
    while True:
        for index in range(6):
            image = IMAGES[index * BATCH : (index + 1) * BATCH]
            yield image + 0.1 * torch.randn(BATCH, 64) if noise else image


def loader(dataset: Any = None, workers: int = 0, **options: Any) -> DataLoader[Any]:
    kind = options.pop("kind", DataLoader)
    if "batch_sampler" not in options:
        options.setdefault("batch_size", BATCH)
    dataset = Images() if dataset is None else dataset
    return kind(dataset, num_workers=workers, **options)
