"""Which trainer of this process has a place for its run: two would write over each other's files.

Another process is kept out by the folder's lock, which all of a process share: several handlers may
save into one folder, under names of their own.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import ClassVar

from crosstrain.engine.engine import Engine
from crosstrain.engine.storage.errors import CheckpointBusy
from crosstrain.engine.storage.locations import Location


class Claim:
    """Keeps other trainers of this process out of a place, from `take` to `give_back`.

    A trainer that is freed has no place any more. The folder exists, if it is one on a disk.
    """

    _trainers: ClassVar[weakref.WeakValueDictionary[tuple[str, str], Engine]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, place: Location, prefix: str, trainer: Engine) -> None:
        where = place.resolve() if isinstance(place, Path) else place
        #: What tells the place from others.
        self.key = (str(where), prefix)
        self._trainer = weakref.ref(trainer)

    def take(self) -> None:
        """Takes the place; once more, if it has it. CheckpointBusy if another trainer has it."""
        trainer, other = self._trainer(), self._trainers.get(self.key)
        if other is not None and other is not trainer:
            place, prefix = self.key
            raise CheckpointBusy(
                f"Another trainer of this process has {place} for its checkpoints, filename_prefix="
                f"{prefix!r}, and its run has not ended: each would go on from the other's, and "
                "remove them. Give this one a folder or a filename_prefix of its own, or let the "
                "other run to its end before."
            )
        if trainer is not None:
            self._trainers[self.key] = trainer

    def give_back(self) -> None:
        """Lets others have the place, if this trainer has it."""
        if self._trainers.get(self.key) is self._trainer():
            self._trainers.pop(self.key, None)
