"""Handwritten digits: the real data that the demo and the scenarios train on, and a network."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset

_TRAINING_SAMPLES = 1437


def read_digits(number: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the first so many of the 1,797 handwritten digits that scikit-learn ships, or all.

    Returns:
        Images (n, 1, 8, 8), float32 from 0 to 1, and labels (n,), int64 from 0 to 9.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        raise ModuleNotFoundError(
            "The digits are a part of scikit-learn, which is not installed. Run pip install "
            "'crosstrain[demo]'.",
            name="sklearn",
        )
    # Importing scikit-learn takes as long as importing torch, which many short processes pay.
    file = Path(*(spec.submodule_search_locations or ()), "datasets/data/digits.csv.gz")
    table: Any = numpy.loadtxt(file, delimiter=",", max_rows=number)
    pixels = torch.tensor(table[:, :-1], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return pixels, torch.tensor(table[:, -1], dtype=torch.int64)


class DigitsDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The 1,797 handwritten digits that scikit-learn ships: float32 images (1, 8, 8) from 0 to 1.

    Args:
        training: whether to take the first 1,437, randomly shifted, brightened and blurred by
            noise, or the other 360 as they are.
        number: how many of these to take; all by default.
    """

    def __init__(self, training: bool, number: int | None = None) -> None:
        if training:
            self.images, self.labels = read_digits(
                min(number or _TRAINING_SAMPLES, _TRAINING_SAMPLES)
            )
        else:
            images, labels = read_digits()
            self.images = images[_TRAINING_SAMPLES:][:number]
            self.labels = labels[_TRAINING_SAMPLES:][:number]
        self.training = training

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        if self.training:
            # One of each kind of generator, as real augmentation libraries use them.
            shift = (random.randint(-1, 1), random.randint(-1, 1))
            image = torch.roll(image, shift, (1, 2)) * float(numpy.random.uniform(0.8, 1.2))
            image = image + 0.05 * torch.randn(1, 8, 8)
        return image, self.labels[index]


def digits_network() -> nn.Module:
    """Returns a convolutional network with batch norm and dropout, for images (1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(512, 10),
    )
