"""Checkpoint: a handler that saves named objects, keeps the best or the newest, and loads them."""

from __future__ import annotations

import numbers
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any, ClassVar, cast

from crosstrain.backends import spec_of
from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import warn_user
from crosstrain.engine.events import EventEnum, Events
from crosstrain.engine.nests import walk_objects
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.storage.errors import CheckpointWarning
from crosstrain.engine.storage.locations import Location, StorePath, location_of

from .loading import Latest, find_latest, load_objects
from .objects import OWN_NAME, check_objects, gather_states, introduce, unsaved_objects
from .rank_objects import saves_with_all, score_of_all
from .retention import Item, Retention, format_score
from .save_handler import RunFacts, SaveHandler, adapted
from .save_job import SaveJob
from .saver import DiskSaver

# Few runs come to a step that is longer.
_LONG_STEP = 10**7 - 1


class CheckpointEvents(EventEnum):
    """What a `Checkpoint` fires on the engine that it is attached to."""

    SAVED_CHECKPOINT = "saved_checkpoint"


class Checkpoint:
    """Saves objects to one file whenever its event fires, and keeps `n_saved` of the files.

    The programming model and the file names are those of pytorch-ignite's
    `ignite.handlers.Checkpoint`. A new file is good before an old one is removed.

    A file's name is `{filename_prefix}_{name}_{global_step}_{score_name}={score}.pt`, without the
    parts that there are not: `name` is "checkpoint", or the object's name if there is only one;
    `global_step` is there unless there is a score and no `global_step_transform`; without a score
    it is the engine's iteration.

    Args:
        to_save: objects by name, or nests of them; each has `state_dict` and `load_state_dict`.
            Of a `DistributedDataParallel`, `DataParallel` or compiled model the module inside it is
            saved. A single object's state is the file's whole content.
        save_handler: a folder, or its URL in a store (see `DiskSaver`), a `BaseSaveHandler`, or a
            function of (checkpoint, filename) or (checkpoint, filename, metadata).
        filename_prefix: the first part of the file's name.
        score_function: called with the engine; returns the score, of which the highest are kept.
        score_name: the score's name; without a `score_function`, that of the engine's metric.
        n_saved: how many files to keep; None keeps all.
        global_step_transform: called with (engine, event name); returns the step for the name.
        filename_pattern: a pattern of `{filename_prefix}`, `{name}`, `{global_step}`,
            `{score_name}`, `{score}` and `{ext}`, to be used instead.
        include_self: saves this handler's own state too, as `checkpointer`.
        greater_or_equal: lets a new file of the same score as the lowest take its place.
        save_on_rank: which process saves, where there are several; all of them call the handler.

    Raises:
        TypeError: if an argument is of the wrong type, or an object has no `state_dict`.
        ValueError: if `n_saved` is below 1, or `include_self` meets an object of its name.
    """

    SAVED_CHECKPOINT: ClassVar[CheckpointEvents] = CheckpointEvents.SAVED_CHECKPOINT
    Item: ClassVar[type[Item]] = Item

    def __init__(
        self,
        to_save: Mapping[str, Any],
        save_handler: str | os.PathLike[str] | SaveHandler,
        filename_prefix: str = "",
        score_function: Callable[[Any], int | float] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        global_step_transform: Callable[[Any, Any], int] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
    ) -> None:
        check_objects(to_save, "state_dict", "to_save")
        if include_self:
            _check_room_for(OWN_NAME, to_save)
        if global_step_transform is not None and not callable(global_step_transform):
            raise TypeError(
                f"global_step_transform should be a function, got {type(global_step_transform)} "
                "instead."
            )
        if n_saved is not None and not (isinstance(n_saved, int) and n_saved >= 1):
            raise ValueError(f"n_saved must be a positive integer or None, got {n_saved!r}")
        introduce(to_save)
        self.to_save = to_save
        self.filename_prefix = filename_prefix
        self.score_name = score_name
        if score_function is None and score_name is not None:
            score_function = self.get_default_score_fn(score_name)
        self.score_function = score_function
        self.n_saved = n_saved
        self.ext = "pt"
        self.global_step_transform = global_step_transform
        self.filename_pattern = filename_pattern
        self.include_self = include_self
        self.greater_or_equal = greater_or_equal
        self.save_on_rank = save_on_rank
        self._saved: list[Item] = []
        self._job: SaveJob | None = None
        self._warned_of: set[str] = set()
        self.save_handler: SaveHandler = _as_handler(save_handler, save_on_rank)
        self._saver = adapted(self.save_handler)
        self._check_names()

    def _check_names(self) -> None:
        """Raises now what the names of all files would raise after hours of training."""
        name = next(iter(self.to_save)) if len(self.to_save) == 1 else "checkpoint"
        scored = self.score_function is not None
        step = _LONG_STEP if self.global_step_transform or not scored else None
        try:
            filename = self._filename(name, step, format_score(0.5) if scored else None)
        except KeyError:
            raise
        except Exception:  # noqa: BLE001 - a pattern may fit only what the user's functions give
            return
        self._saver.check_name(filename)

    def __call__(self, engine: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the objects, if the score is high enough.

        Args:
            engine: the engine whose event fired.
            *args: what the event passes; not used.
            **kwargs: likewise.

        Raises:
            ValueError: if the score is no number.
            CheckpointError: if the save fails; in the background, if the one before it failed.
        """
        if not engine.has_registered_events(self.SAVED_CHECKPOINT):
            engine.register_events(*CheckpointEvents)
        step = None
        if self.global_step_transform is not None:
            step = self.global_step_transform(engine, engine.last_event_name)
        if self.score_function is not None:
            priority = self.score_function(engine)
            if not isinstance(priority, numbers.Number):
                raise ValueError(
                    f"Output of score_function should be a number, got {type(priority)}; of a "
                    "tensor, return its item()"
                )
            priority = score_of_all(priority, self.to_save, self.save_on_rank)
        else:
            if step is None:
                step = engine.state.get_event_attrib_value(Events.ITERATION_COMPLETED)
            priority = cast("int", step)
        if Retention(self.n_saved, self.greater_or_equal, self._saved).admits(priority):
            # Settled before the list of files is looked at again: it may have to be set back.
            self.wait()
            self._save(engine, step, priority)

    def _save(self, engine: Any, step: int | None, priority: int | float) -> None:
        _warn_of_unsaved(self.to_save, self._warned_of)
        introduce(self.to_save)
        checkpoint: Any = gather_states(self.to_save, self.save_on_rank)
        name = next(iter(checkpoint)) if len(checkpoint) == 1 else "checkpoint"
        score = format_score(priority) if self.score_function is not None else None
        filename = self._filename(name, step, score)
        retention = Retention(self.n_saved, self.greater_or_equal, self._saved)
        saved, removed = retention.with_added(Item(priority, filename))
        if self.include_self:
            checkpoint[OWN_NAME] = _own_state(saved)
        facts = _facts_of(engine, self.to_save, checkpoint)
        if facts.bare:
            checkpoint = checkpoint[name]
        prefix = f"{self.filename_prefix}_" if self.filename_prefix else ""
        metadata = {
            "basename": f"{prefix}{name}",
            "score_name": self.score_name,
            "priority": priority,
        }
        self._saver.prepare(facts)
        self._saver(checkpoint, filename, metadata)
        before, self._saved = self._saved, saved
        job = self._saver.job
        for old in removed:
            self._saver.remove(old)
        if job is None:
            engine.fire_event(self.SAVED_CHECKPOINT)
            return

        def ended(is_saved: bool) -> None:
            self._job = None
            if is_saved:
                engine.fire_event(self.SAVED_CHECKPOINT)
            else:
                self._saved = before

        job.when_ended, self._job = ended, job
        self._watch(engine)

    def _watch(self, engine: Any) -> None:
        """Lets the engine ask after what a thread is writing, each iteration and at its end."""
        if not engine.has_event_handler(self._ask, Events.ITERATION_COMPLETED):
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._ask)
            engine.add_event_handler(Events.COMPLETED, self.wait)
            engine.call_at_end(self.wait)

    def _ask(self) -> None:
        if self._job is not None and not self._job.running:
            self.wait()

    def wait(self) -> None:
        """Waits until what was saved in the background is on the disk, and says so by the event.

        Raises:
            CheckpointError: if it could not be saved, unless the saver has said so already.
        """
        if self._job is not None:
            self._job.finish()

    def _filename(self, name: str, step: Any, score: Any) -> str:
        pattern = self.filename_pattern
        if pattern is None:
            pattern = self.setup_filename_pattern(
                with_prefix=len(self.filename_prefix) > 0,
                with_score=self.score_function is not None,
                with_score_name=self.score_name is not None,
                with_global_step=step is not None,
            )
        fields = {
            "filename_prefix": self.filename_prefix,
            "ext": self.ext,
            "name": name,
            "score_name": self.score_name,
            "score": score,
            "global_step": step,
        }
        try:
            return pattern.format(**fields)
        except KeyError as error:
            raise KeyError(
                f"filename_pattern {pattern!r} has the field {{{error.args[0]}}}, and there are "
                f"only {', '.join(fields)}"
            ) from None

    @property
    def last_checkpoint(self) -> str | Location | None:
        """The saved file of the highest priority: where it is, or else its name, or None."""
        pending = None if self._job is None else self._job.filename
        names = [item.filename for item in self._saved if item.filename != pending]
        if not names:
            return None
        path = self._saver.path_of(names[-1])
        return path if isinstance(path, (Path, StorePath)) else names[-1]

    def reset(self) -> None:
        """Forgets the saved files, so that none of them is removed; for engines that run anew."""
        self.wait()
        self._saved = []

    def state_dict(self) -> OrderedDict[str, list[tuple[int | float, str]]]:
        """Returns the saved files' priorities and names."""
        return _own_state(self._saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the saved files' priorities and names.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            TypeError: if it is no mapping.
            ValueError: if it lacks `_saved`.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            )
        if "_saved" not in state_dict:
            raise ValueError(
                "Required state attribute '_saved' is absent in provided state_dict "
                f"'{list(state_dict)}'"
            )
        # They may come from a file: what is no name in the handler's own folder is nobody's.
        self._saved = [
            Item(priority, filename)
            for priority, filename in state_dict["_saved"]
            if isinstance(filename, str)
            and filename == os.path.basename(filename) != ""
            and filename not in (".", "..")
        ]

    @staticmethod
    def load_objects(
        to_load: Mapping[str, Any],
        checkpoint: str | os.PathLike[str] | Mapping[str, Any],
        *,
        checks: Checks | None = None,
        **kwargs: Any,
    ) -> Proof:
        """Gives objects their states from a checkpoint; an engine among them last.

        A file is verified first, and loaded with `weights_only=True` onto the CPU; what
        pytorch-ignite saved for the same objects loads as well.

        Args:
            to_load: the objects by name, or nests of them; with a single one, the checkpoint may be
                its state itself.
            checkpoint: a path or a URL, what `Checkpoint.latest` returned, or what `torch.load`
                returned.
            checks: how strict it is about what it measures; by default, that of an engine in
                `to_load`, or `Checks()`. Without an engine, weights that are cast to a model's
                own dtype are a warning only.
            **kwargs: arguments for the `load_state_dict` of modules. `strict=False` warns of what
                is missing and unexpected in place of raising, unless nothing fits at all; it also
                allows an engine to be loaded without all that was saved with it.

        Returns:
            What was checked; with an engine in `to_load` it is `engine.proof`.

        Raises:
            TypeError: if an argument is of the wrong type.
            CheckpointNotFound: if there is no such file.
            CheckpointCorrupt: if the file is damaged.
            CheckpointUnsafe: if it cannot be loaded without running code.
            CheckpointMismatch: if a name or a part of a state is missing or too many.
            ResumeError: if an object, read back, does not hold what it was given.
        """
        return load_objects(to_load, checkpoint, checks, **kwargs)

    @staticmethod
    def latest(dirname: str | os.PathLike[str], objects: Collection[str] = ()) -> Latest:
        """Finds the newest good checkpoint of a folder: the last one saved that is whole.

        Args:
            dirname: the folder, or its URL in a store.
            objects: names that it must hold.

        Returns:
            The file, if there is one, and the files that were passed over, each with its reason;
            these are logged as warnings too.

        Raises:
            CheckpointNotFound: if there is no such folder.
        """
        return find_latest(location_of(dirname), objects)

    def reload_objects(
        self,
        to_load: Mapping[str, Any],
        load_kwargs: Mapping[str, Any] | None = None,
        **filename_components: Any,
    ) -> None:
        """Loads objects from one of this handler's files, named by the parts of its name.

        Args:
            to_load: as in `load_objects`.
            load_kwargs: arguments for the `load_state_dict` of modules.
            **filename_components: `name`, `score` and `global_step`, as far as the name has them.

        Raises:
            AttributeError: if the handler saves elsewhere than on a disk.
            CheckpointError: as in `load_objects`.
        """
        if self._saver.path_of("name") is None:
            raise AttributeError(
                "Checkpoint's `save_handler` should be of type `DiskSaver`, given "
                f"{type(self.save_handler)}"
            )
        parts = filename_components
        name = parts.get("name") or (next(iter(self.to_save)) if len(self.to_save) == 1 else None)
        filename = self._filename(
            name or "checkpoint", parts.get("global_step"), parts.get("score")
        )
        path = self._saver.path_of(filename)
        assert path is not None
        load_objects(to_load, path, **(load_kwargs or {}))

    @staticmethod
    def setup_filename_pattern(
        with_prefix: bool = True,
        with_score: bool = True,
        with_score_name: bool = True,
        with_global_step: bool = True,
    ) -> str:
        """Returns the default pattern of file names, with the parts that are asked for.

        Args:
            with_prefix: with `{filename_prefix}`.
            with_score: with `{score}`.
            with_score_name: with `{score_name}=` before it.
            with_global_step: with `{global_step}`.

        Raises:
            ValueError: if there is neither score nor step, or a score's name without a score.
        """
        if not (with_global_step or with_score):
            raise ValueError("At least one of with_score and with_global_step should be True.")
        if with_score_name and not with_score:
            raise ValueError("If with_score_name is True, with_score should be also True")
        parts = ["{filename_prefix}"] if with_prefix else []
        parts.append("{name}")
        if with_global_step:
            parts.append("{global_step}")
        if with_score:
            parts.append("{score_name}={score}" if with_score_name else "{score}")
        return "_".join(parts) + ".{ext}"

    @staticmethod
    def get_default_score_fn(metric_name: str, score_sign: float = 1.0) -> Callable[[Any], float]:
        """Makes a score function of one of the engine's metrics.

        Args:
            metric_name: its name in `engine.state.metrics`.
            score_sign: 1.0, or -1.0 for a metric of which less is better.

        Raises:
            ValueError: if the sign is neither.
        """
        if score_sign not in (1.0, -1.0):
            raise ValueError(f"Argument score_sign should be 1 or -1, got {score_sign}")

        def score(engine: Any) -> float:
            return score_sign * engine.state.metrics[metric_name]  # type: ignore[no-any-return]

        return score


def _own_state(saved: list[Item]) -> OrderedDict[str, list[tuple[int | float, str]]]:
    return OrderedDict(_saved=[(item.priority, item.filename) for item in saved])


def _as_handler(save_handler: Any, save_on_rank: int) -> SaveHandler:
    """Returns what saves: for a folder, a `DiskSaver`."""
    # What can be called is no folder, though it may stand for a path as well.
    if isinstance(save_handler, (str, os.PathLike)) and not callable(save_handler):
        return DiskSaver(save_handler, create_dir=True, save_on_rank=save_on_rank)
    if not callable(save_handler):
        raise TypeError(
            "Argument `save_handler` should be a string or Path object or callable or inherit "
            f"from BaseSaveHandler, but given {type(save_handler)}"
        )
    return cast("SaveHandler", save_handler)


def _check_room_for(name: str, to_save: Mapping[str, Any]) -> None:
    """Makes sure that a handler's own state can be saved with the objects."""
    if not isinstance(to_save, MutableMapping):
        raise TypeError(
            f"If `include_self` is True, then `to_save` must be mutable, but given {type(to_save)}."
        )
    if name in to_save:
        raise ValueError(f"Cannot have key {name!r} if `include_self` is True: {list(to_save)}")


def _facts_of(engine: Any, to_save: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> RunFacts:
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


def _warn_of_unsaved(to_save: Mapping[str, Any], warned_of: set[str]) -> None:
    """Warns, once for each, of what a trainer in `to_save` trains and `to_save` leaves out."""
    for name, value in walk_objects(to_save):
        if not isinstance(value, Engine):
            continue
        value.tell_of_repeated_data("is saved", saves_with_all(value))
        missing = sorted(set(unsaved_objects(value, to_save)) - warned_of)
        if missing:
            warned_of.update(missing)
            warn_user(
                f"to_save holds the trainer {name!r} but not {', '.join(missing)}, which it "
                "trains: a run cannot go on exactly from this checkpoint. Name it in to_save",
                CheckpointWarning,
            )
