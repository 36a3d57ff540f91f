"""What the manual's pages take for given: a small model, its optimizer, and data.

A page that says no more than `model` runs `globals().update(doc_setup.parts())` in an invisible
block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset


class Network(torch.nn.Sequential):
    """A network for the samples of `parts`."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def parts() -> dict[str, Any]:
    """Makes what a page's namespace holds before its first block."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    dataset = TensorDataset(x, x[:, :3].argmax(1))
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return {
        "torch": torch,
        "Network": Network,
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
        "loss_fn": torch.nn.functional.cross_entropy,
        "dataset": dataset,
        "loader": DataLoader(dataset, batch_size=8, shuffle=True),
    }
