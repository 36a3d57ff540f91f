"""What one child process of ours is told to train, and how it ends. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

#: The exit code of a process whose training raised an exception.
FAILED: Final = 1
#: The exit code of a process whose target or backend cannot be used.
UNUSABLE: Final = 2
#: The module of our own trainings.
OURS: Final = "crosstrain.ci.trials.trainings"


@dataclass(frozen=True)
class Order:
    """What one process does: it trains, from the folder's newest checkpoint if there is one.

    Args:
        target: the training: a user's, or one of ours.
        folder: where checkpoints are kept; None: the run is not saved.
        options: what the training is made with besides, by name.
        seed: seeds the process's generators before the training is built. A resumed run must not
            depend on it.
        resumed_seed: the same, if there is a checkpoint to go on from; None: as `seed`.
        workers: worker processes of the data loader.
        every: iterations between two checkpoints; 0: none but the last.
        background: whether checkpoints are written in the background.
        overlap: whether the training goes on while they are copied; never with a sharded model.
        stop_at: the iteration in which the process gets SIGTERM, upon which it saves and ends.
        hold_at: the iteration before which the process waits to be killed.
        trace: the file of a trace, that of rank 0, beside which those of the others are; None: the
            process tells the digests of each iteration itself.
    """

    spec: str
    target: str
    folder: str | None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    resumed_seed: int | None = None
    workers: int = 0
    every: int = 0
    background: bool = False
    overlap: bool = False
    stop_at: int | None = None
    hold_at: int | None = None
    trace: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `as_json` wrote."""
        return cls(**json.loads(text))

    def as_json(self) -> str:
        """Returns the order as a line."""
        return json.dumps(asdict(self))
