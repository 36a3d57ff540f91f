"""BaseSaveHandler: what stores a checkpoint, and all that a `Checkpoint` asks of it."""

from __future__ import annotations

import inspect
import sys
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from crosstrain.engine.nests import has
from crosstrain.engine.proof import Checks
from crosstrain.engine.storage.locations import Location

from .save_job import SaveJob


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint is of: what its manifest tells, and the live objects themselves.

    `bare` says whether it is the state of its one object itself, `checks` how strict to be about
    what could not be loaded again.
    """

    iteration: int | None = None
    epoch: int | None = None
    backend: str | None = None
    names: tuple[str, ...] | None = None
    bare: bool = False
    objects: Mapping[str, Any] = field(default_factory=dict[str, Any])
    checks: Checks = field(default_factory=Checks)


class BaseSaveHandler(metaclass=ABCMeta):
    """The base of what stores a checkpoint somewhere and removes it again.

    With several processes, all of them call it; see to it that one stores. Only `__call__` and
    `remove` have to be written; the rest says what is so for one that stores at once, elsewhere
    than on a disk.
    """

    @abstractmethod
    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a checkpoint.

        Args:
            checkpoint: the objects' states by their names, or the state of the only one itself.
            filename: the name to store it under; what is there already is replaced.
            metadata: plain values: `basename` (prefix and name), `score_name`, and `priority`
                (more is better).
        """

    @abstractmethod
    def remove(self, filename: str) -> None:
        """Removes a stored checkpoint.

        Args:
            filename: the name that it was stored under.
        """

    def prepare(self, run: RunFacts) -> None:  # noqa: B027 - not all want to hear it
        """Hears what the next checkpoint is of, right before it is called."""

    def check_name(self, filename: str) -> None:  # noqa: B027 - some take any name
        """Raises what storing a checkpoint under a name would raise because of the name.

        Args:
            filename: the name.
        """

    def path_of(self, filename: str) -> Location | None:
        """Returns where a stored checkpoint is, on a disk or in a store; None if elsewhere."""
        return None

    @property
    def job(self) -> SaveJob | None:
        """What a thread is still writing; None if nothing."""
        return None

    def register_with_ignite(self) -> None:
        """Makes pytorch-ignite take this class for one of its own, where it has been imported.

        Its `Checkpoint` removes old files of its own kind only.
        """
        module: Any = sys.modules.get("ignite.handlers.checkpoint")
        if module is not None:
            module.BaseSaveHandler.register(type(self))


SaveHandler = Callable[..., None] | BaseSaveHandler


class _Adapted(BaseSaveHandler):
    """A function, or another library's handler, as a save handler of ours."""

    def __init__(self, store: Callable[..., Any]) -> None:
        self._store = store
        self._takes_metadata = _takes_metadata(store)

    def __call__(
        self,
        checkpoint: Mapping[str, Any],
        filename: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a checkpoint as the function does."""
        if self._takes_metadata:
            self._store(checkpoint, filename, metadata)
        else:
            self._store(checkpoint, filename)

    def remove(self, filename: str) -> None:
        """Removes a checkpoint, if it knows how to."""
        # Asked of the type: mocks answer every name.
        if has(self._store, "remove"):
            cast("Any", self._store).remove(filename)


def adapted(save_handler: SaveHandler) -> BaseSaveHandler:
    """Returns a save handler with all that a `Checkpoint` asks of one."""
    return save_handler if isinstance(save_handler, BaseSaveHandler) else _Adapted(save_handler)


def _takes_metadata(save_handler: Callable[..., Any]) -> bool:
    """Tells whether a save handler takes three arguments, or only checkpoint and filename."""
    try:
        inspect.signature(save_handler).bind({}, "", {})
    except TypeError:
        return False
    except ValueError:
        # Written in C without a signature: the full form is what is documented.
        return True
    return True
