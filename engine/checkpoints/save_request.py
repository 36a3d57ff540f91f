"""What a `Checkpoint` finds out about a run and its objects before it has them saved."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, NamedTuple, cast

from crosstrain.backends import spec_of
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.guards import is_path
from crosstrain.engine.nests import walk_objects
from crosstrain.engine.proof import Checks
from crosstrain.engine.storage.errors import CheckpointWarning

from .objects import unsaved_objects
from .retention import Item
from .save_handler import RunFacts, SaveHandler
from .save_job import SaveJob
from .saver import DiskSaver


class Pending(NamedTuple):
    """A file that a thread is writing: its job, whose it is, and the list of files before it."""

    job: SaveJob
    engine: Any
    saved_before: list[Item]


def as_handler(save_handler: Any, save_on_rank: int) -> SaveHandler:
    """Returns what saves: for a folder, a `DiskSaver`."""
    # What can be called is no folder, though it may stand for a path as well.
    if is_path(save_handler) and not callable(save_handler):
        return DiskSaver(save_handler, create_dir=True, save_on_rank=save_on_rank)
    if not callable(save_handler):
        raise TypeError(
            "Argument `save_handler` should be a string or Path object or callable or inherit "
            f"from BaseSaveHandler, but given {type(save_handler)}"
        )
    return cast("SaveHandler", save_handler)


def check_room_for(name: str, to_save: Mapping[str, Any]) -> None:
    """Makes sure that a handler's own state can be saved with the objects."""
    if not isinstance(to_save, MutableMapping):
        raise TypeError(
            f"If `include_self` is True, then `to_save` must be mutable, but given {type(to_save)}."
        )
    if name in to_save:
        raise ValueError(f"Cannot have key {name!r} if `include_self` is True: {list(to_save)}")


def facts_of(engine: Any, to_save: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> RunFacts:
    """Returns what a checkpoint is of.

    Args:
        engine: the engine whose event has fired.
        to_save: the objects; an engine among them is the one whose progress counts.
        checkpoint: their states, as they are about to be saved.
    """
    engines = [value for _, value in walk_objects(to_save) if isinstance(value, Engine)]
    trainer = engines[0] if engines else engine
    return RunFacts(
        iteration=trainer.state.iteration,
        epoch=trainer.state.epoch,
        backend=spec_of(getattr(trainer, "backend", None)),
        names=tuple(map(str, checkpoint)),
        bare=len(checkpoint) == 1,
        objects=to_save,
        checks=getattr(trainer, "checks", Checks()),
    )


def warn_of_unsaved(to_save: Mapping[str, Any], warned_of: set[str]) -> None:
    """Warns, once for each, of what a trainer in `to_save` trains and `to_save` leaves out."""
    for name, value in walk_objects(to_save):
        if not isinstance(value, Engine):
            continue
        warn_of_repeated_data(value, "is saved")
        missing = sorted(set(unsaved_objects(value, to_save)) - warned_of)
        if missing:
            warned_of.update(missing)
            warn_user(
                f"to_save holds the trainer {name!r} but not {', '.join(missing)}, which it "
                "trains: a run cannot go on exactly from this checkpoint. Name it in to_save",
                CheckpointWarning,
            )


def warn_of_repeated_data(trainer: Engine, doing: str) -> None:
    """Warns, once for each engine, that it is inside an epoch and does not keep its place there.

    What the run does is told in words.
    """
    state = trainer.state
    done = state.iteration % (state.epoch_length or state.iteration or 1)
    if trainer.resumes_data or trainer.warned_of_data or not done or state.dataloader is None:
        return
    trainer.warned_of_data = True
    warn_user(
        f"The run {doing} inside an epoch, after {done} of {state.epoch_length} iterations, and a "
        "plain Engine that goes on there begins the data anew: it repeats some samples and skips "
        "others. Use DeterministicEngine, or create_supervised_trainer(..., deterministic=True), "
        "which goes on with the next batch; or save at the end of epochs only",
        ResumeWarning,
    )
