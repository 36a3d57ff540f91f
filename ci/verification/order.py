"""What a process of a verification is told, and how it ends; without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final, Self

__all__ = ["FAILED", "UNUSABLE", "Order"]

#: The exit code of a process whose training raised an exception.
FAILED: Final = 1
#: The exit code of a process whose target or backend cannot be used.
UNUSABLE: Final = 2


@dataclass(frozen=True)
class Order:
    """One life of a training: what its process does, or each of its processes.

    Args:
        target: the training, as `module:function`.
        backend: a spec.
        trace: the file of the trace; that of rank 0, beside which those of the others are.
        seed: what the process seeds the global generators with before it builds the training, if
            it is the first.
        resumed_seed: the same, if there is a checkpoint to go on from.
        workers: worker processes of the loader.
        folder: where the run is saved and resumed from; None: it is not saved.
        every: iterations between two checkpoints.
        stop_at: the iteration after which it saves and ends; 0: none.
    """

    target: str
    backend: str
    trace: str
    seed: int
    resumed_seed: int = 0
    workers: int = 0
    folder: str | None = None
    every: int = 1
    stop_at: int = 0

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `as_json` wrote."""
        return cls(**json.loads(text))

    def as_json(self) -> str:
        """Returns the order as a line."""
        return json.dumps(asdict(self))
