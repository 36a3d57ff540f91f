"""Trainings that nobody wrote for verify: networks of torchvision and timm, with their defaults."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from crosstrain.ci import Training
from crosstrain.engine import StepEvents, create_supervised_trainer


def _training(model: Any, backend: str, workers: int) -> Training:
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(24) % 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    trainer = create_supervised_trainer(
        model, optimizer, cross_entropy, backend=backend, deterministic=True
    )
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    return Training(
        trainer,
        DataLoader(data, batch_size=8, shuffle=True, num_workers=workers),
        max_epochs=2,
        to_save={"model": model, "optimizer": optimizer, "scheduler": scheduler},
    )


def torchvision(backend: str, workers: int = 0) -> Training:
    """ResNet-18 of torchvision: batch norm, residuals."""
    torch.manual_seed(0)
    models: Any = importlib.import_module("torchvision.models")
    return _training(models.resnet18(num_classes=10), backend, workers)


def timm(backend: str, workers: int = 0) -> Training:
    """A small vision transformer of timm: attention, dropout, stochastic depth."""
    torch.manual_seed(0)
    create: Any = importlib.import_module("timm").create_model
    model = create(
        "vit_tiny_patch16_224",
        img_size=32,
        num_classes=10,
        depth=3,
        drop_rate=0.1,
        drop_path_rate=0.2,
    )
    return _training(model, backend, workers)
