"""A small training that is killed and resumed within this process, and what it is warned of."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crosstrain.engine import Events, ResumeWarning, resume_or_start

#: A trainer, what is named beside it, and its data.
Parts = tuple[Any, dict[str, Any], Any]


#: So many iterations no run has: it saves at its end only.
SELDOM = 1000


class Killed(Exception):
    """Ends a run."""


def rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns as many pairs of what a model is given and what is wanted of it."""
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(3, generator=generator), torch.ones(1)) for _ in range(count)]


def run(
    folder: Path,
    make: Callable[[], Parts],
    dies: int | None = None,
    every: int = 1,
    max_epochs: int = 4,
) -> tuple[list[str], bytes, Any]:
    """Runs it until it dies; returns what it was warned of, its weights, and the trainer."""
    torch.manual_seed(3)
    trainer, to_save, loader = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What a script sets otherwise is told as well, and has tests of its own.
        checks = dataclasses.replace(trainer.checks, settings="off")
        resume_or_start(
            trainer, to_save, folder, every, signals=(), background=False, checks=checks
        )
        if dies is not None:

            @trainer.on(Events.ITERATION_STARTED(once=dies + 1))
            def die() -> None:
                raise Killed

        try:
            trainer.run(loader, max_epochs=max_epochs)
        except Killed:
            assert dies is not None
    said = [str(item.message) for item in caught if item.category is ResumeWarning]
    weights = to_save["model"].state_dict().values()
    return said, b"".join(one.numpy().tobytes() for one in weights), trainer


def resumed(
    folder: Path, make: Callable[[], Parts], dies: int, every: int = 1, max_epochs: int = 4
) -> tuple[list[str], list[str], bool]:
    """Returns what it says before it is killed and after, and whether its weights are the same.

    They are compared with those of a run that nobody killed, and that saves at its end only.
    """
    _, straight, _ = run(folder / "straight", make, None, SELDOM, max_epochs)
    before, _, _ = run(folder / "killed", make, dies, every, max_epochs)
    after, weights, _ = run(folder / "killed", make, None, every, max_epochs)
    return before, after, straight == weights
