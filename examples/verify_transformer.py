"""A small transformer that learns to write this repository's own documentation.

Train it, and go on with it after any interruption:

    python examples/verify_transformer.py --backend cpu --folder runs/transformer

Show that it resumes exactly:

    crosstrain verify examples/verify_transformer.py:training --backend cpu --workers 0,2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from crosstrain.backends import add_backend_argument
from crosstrain.ci import Training
from crosstrain.engine import StepEvents, create_supervised_trainer, manual_seed, resume_or_start

TEXT = Path(__file__).resolve().parent.parent / "docs" / "engine.md"
LENGTH, WIDTH, HEADS, LAYERS = 32, 32, 4, 2


class Characters(Dataset):
    """Pieces of a text, each from a random place near its own; the answer is the next character."""

    def __init__(self, path: Path, pieces: int) -> None:
        text = path.read_text(encoding="utf-8")
        self.alphabet = sorted(set(text))
        numbers = {letter: number for number, letter in enumerate(self.alphabet)}
        self.text = torch.tensor([numbers[letter] for letter in text])
        self.pieces = pieces

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        last = len(self.text) - LENGTH - 1
        # From the global generator: the engine sets it for each sample.
        shift = int(torch.randint(0, LENGTH, ()))
        start = (index * (last // self.pieces) + shift) % last
        piece = self.text[start : start + LENGTH + 1]
        return piece[:-1], piece[1:]


class Writer(nn.Module):
    """A transformer that predicts each next character from those before it."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, letters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        hidden = self.layers(self.letters(x) + self.places(places), mask=mask, is_causal=True)
        return self.out(hidden).transpose(1, 2)


def training(backend: str, workers: int = 0) -> Training:
    """Builds the training; it is run by `main`, or by `crosstrain verify`."""
    data = Characters(TEXT, pieces=128)
    model = Writer(len(data.alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=33)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.cross_entropy,
        backend=backend,
        deterministic=True,
        max_norm=1.0,
    )
    trainer.add_event_handler(StepEvents.OPTIM_STEP_APPLIED, lambda: scheduler.step())
    loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)
    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    return Training(trainer, loader, max_epochs=2, to_save=to_save)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_backend_argument(parser)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    manual_seed(2026)
    built = training(args.backend, args.workers)
    run = resume_or_start(built.trainer, built.to_save, args.folder, every=10)
    built.run()
    print(f"iteration {built.trainer.state.iteration}, loss {built.trainer.state.output:.3f}")
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
