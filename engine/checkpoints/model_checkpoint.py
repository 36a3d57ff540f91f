"""ModelCheckpoint: saves to a folder the objects that it is given when its event fires."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, cast

from crosstrain.engine.storage.locations import Location

from .handler import Checkpoint
from .objects import check_objects
from .saver import DiskSaver


class ModelCheckpoint(Checkpoint):
    """Saves to a folder the objects that are passed where it is attached.

    The programming model is that of pytorch-ignite's `ignite.handlers.ModelCheckpoint`:
    `trainer.add_event_handler(event, ModelCheckpoint(folder, "prefix"), {"model": model})`.

    Args:
        dirname: the folder, or its URL in a store.
        filename_prefix: the first part of the files' names.
        score_function: see `Checkpoint`, as all that follow except:
        score_name: the score's name.
        n_saved: how many files to keep.
        atomic: see `DiskSaver`.
        require_empty: see `DiskSaver`.
        create_dir: see `DiskSaver`.
        global_step_transform: gives the step in the files' names.
        filename_pattern: replaces the pattern of the files' names.
        include_self: saves this handler's own state too.
        greater_or_equal: lets a file of the same score take the place of the lowest.
        save_on_rank: which process saves.
        background: see `DiskSaver`.
        overlap: see `DiskSaver`.
        **kwargs: arguments of `torch.save`, see `DiskSaver`.

    Raises:
        ValueError: as `Checkpoint` and `DiskSaver` do.
        TypeError: likewise.
        CheckpointBusy: if another process saves into the folder.
    """

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        filename_prefix: str = "",
        score_function: Callable[[Any], int | float] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        atomic: bool = True,
        require_empty: bool = True,
        create_dir: bool = True,
        global_step_transform: Callable[[Any, Any], int] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
        *,
        background: bool = False,
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        saver = DiskSaver(
            dirname,
            atomic=atomic,
            create_dir=create_dir,
            require_empty=require_empty,
            save_on_rank=save_on_rank,
            background=background,
            overlap=overlap,
            **kwargs,
        )
        super().__init__(
            to_save={},
            save_handler=saver,
            filename_prefix=filename_prefix,
            score_function=score_function,
            score_name=score_name,
            n_saved=n_saved,
            global_step_transform=global_step_transform,
            filename_pattern=filename_pattern,
            include_self=include_self,
            greater_or_equal=greater_or_equal,
            save_on_rank=save_on_rank,
        )

    @property
    def last_checkpoint(self) -> Location | None:
        """The path of the saved file of the highest priority; None before the first."""
        return cast("Location | None", super().last_checkpoint)

    def __call__(self, engine: Any, to_save: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Saves the objects, if the score is high enough.

        Args:
            engine: the engine whose event fired.
            to_save: the objects by name.

        Raises:
            RuntimeError: if there are no objects.
            TypeError: if an object has no `state_dict`.
            CheckpointError: as `Checkpoint` does.
        """
        if len(to_save) == 0:
            raise RuntimeError(
                "No objects to checkpoint found. Pass them where the handler is attached: "
                "add_event_handler(event, handler, {'model': model})"
            )
        check_objects(to_save, "state_dict", "to_save")
        self.to_save = to_save
        super().__call__(engine)
