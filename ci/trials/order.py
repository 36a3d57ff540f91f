"""What a scenario asks of one of its processes, and how the two talk. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Order"]


@dataclass(frozen=True)
class Order:
    """What one process does: it trains, from the folder's newest checkpoint if there is one.

    Args:
        spec: the backend.
        folder: where checkpoints are kept.
        training: which of our trainings it is; unused with a target.
        target: a user's training, as `module:function`.
        seed: seeds the process's generators before the training is built. A resumed run must not
            depend on it.
        workers: worker processes of the data loader; None: as the training has them.
        every: iterations between two checkpoints; 0: none but the last.
        background: whether checkpoints are written in the background.
        overlap: whether the training goes on while they are copied; never with a sharded model.
        stop_at: the iteration in which the process gets SIGTERM, upon which it saves and ends.
        hold_at: the iteration before which the process waits to be killed.
    """

    spec: str
    folder: str
    training: str = "plain"
    target: str | None = None
    seed: int = 0
    workers: int | None = None
    every: int = 0
    background: bool = False
    overlap: bool = False
    stop_at: int | None = None
    hold_at: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns the arguments by name."""
        return asdict(self)
