"""Engine: runs a step over data, epoch by epoch, and fires events around it."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import distributed

from .digest import same
from .dispatch import check_signature
from .errors import ResumeWarning, warn_user
from .events import Events
from .loop import Loop
from .nests import walk_objects
from .progress import begin, check_limits, data_length, is_done, load_progress, resume
from .proof import Checks, Proof
from .random_states import is_just_seeded, random_states, restore_random_states
from .requests import END_RUN, ON_PURPOSE, QUIET_RUN
from .seen_by_ignite import SeenByIgnite
from .state import State
from .structure import recordable

if TYPE_CHECKING:
    from crosstrain.backends import Backend

__all__ = ["Engine", "Events", "State"]


class Engine(SeenByIgnite, Loop):
    """Runs `process_function` over batches and fires events, to which handlers are attached.

    The programming model, the names and the order of events are those of pytorch-ignite's
    `ignite.engine.Engine`.

    Args:
        process_function: called as `process_function(engine, batch)` once an iteration; what it
            returns becomes `engine.state.output`.
        backend: the device's step boundary: its `sync()` is called after each iteration's
            step, before ITERATION_COMPLETED. None where the step needs none.

    Raises:
        ValueError: if `process_function` is None or cannot be called with (engine, batch).
        TypeError: if `backend` is a spec, and no opened backend.
    """

    #: Whether a run that goes on inside an epoch goes on with the data that it has not seen.
    resumes_data = False

    def __init__(
        self, process_function: Callable[[Any, Any], Any], backend: Backend | None = None
    ) -> None:
        if process_function is None:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(
                "Engine must be given a processing function in order to run: a callable of "
                "(engine, batch), got None"
            )
        check_signature(process_function, "process_function", self, None)
        if isinstance(backend, (str, type)):
            raise TypeError(
                f"backend must be an opened backend or None, not {backend!r}. "
                "crosstrain.backends.get(spec).open() opens the one that a spec names."
            )
        super().__init__(process_function, backend)
        self._user_keys: list[str] = []
        # Whether the user was told of what `resumes_data` means where it is false.
        self._told_of_data = False
        # The random states to go on with, of a state that was loaded.
        self._loaded_rng_states: Any = None
        self._pass = _Pass()
        #: What this engine trains, by name: a checkpoint without one of them is not complete.
        self.objects: dict[str, Any] = {}
        #: What was loaded together with this engine's state, by name, until its run goes on.
        self.loaded_with: dict[str, Any] = {}
        #: What a checkpoint saves beside this engine, by name: its structure is recorded as well.
        self.saved_beside: dict[str, Any] = {}
        #: The objects that a checkpoint saves beside it: they have been named.
        self.named_beside: tuple[Any, ...] = ()
        #: How strict a resume of this engine is about each thing that it measures.
        self.checks = Checks()
        #: What the last resume of this engine was found to be; empty where a run began anew.
        self.proof = Proof()

    def introduce(self, others: Mapping[str, Any]) -> None:
        """Takes note of what a checkpoint saves beside this engine, before anything is loaded."""
        self.saved_beside = recordable(others)
        named = (value for _, value in walk_objects(others))
        self.named_beside = tuple(value for value in named if value is not self)

    @property
    def state_dict_user_keys(self) -> list[str]:
        """Names of the state's attributes that `state_dict` takes along; append yours."""
        return self._user_keys

    @state_dict_user_keys.setter
    def state_dict_user_keys(self, keys: list[str]) -> None:
        self._user_keys = keys

    def state_dict(self) -> OrderedDict[str, Any]:
        """Returns epoch length, iteration, limit, and the attributes that you named.

        Of a run that was ended on purpose it says so, too: `terminated` is True, or
        "skip_completed".
        """
        limit = "max_epochs" if self.state.max_iters is None else "max_iters"
        keys = ("epoch_length", "iteration", limit, *self._user_keys)
        values = OrderedDict((key, getattr(self.state, key)) for key in keys)
        # An iteration whose step failed is not completed: it is to be done again.
        values["iteration"] -= self._place.broken
        asked = self.asked | self._place.owed
        if asked & ON_PURPOSE:
            values["terminated"] = "skip_completed" if asked & QUIET_RUN else True
        return values

    def state_to_save(self) -> dict[str, Any]:
        """Returns the state with this process's random states, which a checkpoint holds.

        A run that goes on from it at the end of an epoch draws what it would have drawn.
        """
        return {**self.state_dict(), "rng_states": random_states(self.backend)}

    def iteration_marks(self) -> dict[str, str]:
        """Returns digests by which to tell whether an iteration comes out the same once more.

        None, of an engine that does not promise it.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the engine to go on from a state; the next `run` does.

        Args:
            state_dict: `epoch_length`, one of `iteration` and `epoch` (how many are completed), one
                of `max_epochs` and `max_iters`, and each of `state_dict_user_keys`. If it has
                `terminated`, the run was ended on purpose; see `terminate`. If it has `rng_states`,
                as that of a checkpoint, the next epoch begins with them.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: if a key is missing, contradicts another, or has an illegal value.
        """
        load_progress(self.state, state_dict, self._user_keys)
        self.proof = Proof()
        if not self._is_running():
            self._loaded_rng_states = None if self.resumes_data else state_dict.get("rng_states")
            self._drop_session()
            self._place.loaded = True
            if how := state_dict.get("terminated"):
                quiet = QUIET_RUN if how == "skip_completed" else 0
                self._place.owed = END_RUN | ON_PURPOSE | quiet

    def set_data(self, data: Iterable[Any]) -> None:
        """Takes the next batch, and all after it, from other data; the epoch's length stays.

        Args:
            data: what `run` takes.

        Raises:
            TypeError: if it is not iterable.
        """
        check_iterable(data)
        self.state.dataloader = data
        self._data_iter = self._open_data()

    def run(
        self,
        data: Iterable[Any] | None = None,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> State:
        """Runs the step over the data until a limit, or goes on with a run that has not ended.

        A run that was interrupted, terminated, loaded from a state, or left by an exception has
        iterations left: it goes on from its state, whose limits the arguments may raise. Otherwise
        a new run begins.

        Args:
            data: batches: a list, a DataLoader, an iterator, any iterable. None: the step is called
                with None, and `epoch_length` is needed.
            max_epochs: ends after this many epochs; 1 by default.
            max_iters: ends after this many iterations instead.
            epoch_length: the iterations of an epoch; by default the data's length, or, where it has
                none, what its first pass gives.

        Returns:
            The engine's state.

        Raises:
            TypeError: if `data` is not iterable.
            ValueError: if the data is empty (`EmptyData`), or the limits contradict each other or
                the state.
            RuntimeError: if the engine runs already, or data that cannot be iterated anew ends
                before the run does (`DataUsedUp`).
        """
        if data is not None:
            check_iterable(data)
        if self._is_running():
            raise RuntimeError(
                "Engine.run() was called by a handler or a step of the same run. Use another "
                "Engine for an inner loop, such as one for evaluation."
            )
        for function in self._before_run:
            function()
        if self._session is None:
            self._recover()
        self._pass.length_is_given = epoch_length is not None
        passed_by = self.restartable and self._place.loaded
        check_limits(self.state, max_epochs, max_iters, passed_by)
        unlimited = self.state.max_epochs is None and self.state.max_iters is None
        if unlimited or (is_done(self.state) and self._session is None and not self._place.loaded):
            begin(self.state, data, max_epochs, max_iters, epoch_length)
            self.proof = Proof()
            self._begin_anew()
            self._drop_session()
            self.logger.info("Run begins: %s.", self._goal())
        else:
            resume(self.state, data, epoch_length)
            self.logger.info(
                "Run goes on from iteration %s: %s.", self.state.iteration, self._goal()
            )
        if self._data_iter is None:
            self.state.dataloader = data
        if self._place.loaded and not (is_done(self.state) or self.should_terminate):
            self.tell_of_repeated_data("goes on")
        return self._continue()

    def tell_of_repeated_data(self, doing: str, all_ranks_save: bool = True) -> None:
        """Warns, once, if a resumed run does not go on with the data, or the draws, of this one.

        Args:
            doing: what the run does there, in words.
            all_ranks_save: whether a checkpoint has the random states of each rank.
        """
        state = self.state
        if self.resumes_data or self._told_of_data or state.dataloader is None:
            return
        done = state.iteration % (state.epoch_length or state.iteration or 1)
        if done:
            message = (
                f"The run {doing} inside an epoch, after {done} of {state.epoch_length} "
                "iterations, and a plain Engine that goes on there begins the data anew: it "
                "repeats some samples and skips others. Use DeterministicEngine, or "
                "create_supervised_trainer(..., deterministic=True), which goes on with the next "
                "batch; or save at the end of epochs only"
            )
        elif getattr(state.dataloader, "persistent_workers", False):
            message = (
                f"The run {doing} with persistent_workers, and a plain Engine that goes on there "
                "begins new workers: the order, and what they draw, are others. Use "
                "DeterministicEngine, or create_supervised_trainer(..., deterministic=True); or "
                "leave persistent_workers out"
            )
        elif taken := self._taken_of_pass():
            message = (
                f"The run {doing} inside a pass over the data, after {taken} batches of it, and a "
                "plain Engine that goes on there begins the data anew: it repeats some samples "
                "and skips others. Use DeterministicEngine, or create_supervised_trainer(..., "
                "deterministic=True), which goes on with the next batch; or leave epoch_length out"
            )
        elif not all_ranks_save and self._has_drawn():
            message = (
                f"The run {doing} in one of several processes, and the checkpoint of a plain "
                "Engine has not the random states of each: the next epoch's dropout, augmentation "
                "and order are others after a resume. Use resume_or_start, which has all ranks "
                "save together, with an engine that has a backend; or DeterministicEngine; or "
                "seed each epoch in a handler of EPOCH_STARTED"
            )
        else:
            return
        self._told_of_data = True
        warn_user(message, ResumeWarning)

    def _taken_of_pass(self) -> int:
        """Returns how many batches were taken of a pass that is not known to have ended."""
        if self._data_iter is None:
            return 0
        taken = self.state.iteration - self._pass.opened_at
        length = data_length(self.state.dataloader)
        if length is None and not self._pass.length_is_given:
            length = self.state.epoch_length
        return 0 if taken == length else taken

    def _has_drawn(self) -> bool:
        """Whether random numbers were drawn in this pass that follow from no seed of the epoch's.

        Those that the making of a loader's iterator draws count only for its workers.
        """
        if self._pass.is_seeded:
            return False
        workers = getattr(self.state.dataloader, "num_workers", 0)
        return bool(workers) or not same(self._pass.states, random_states(self.backend))

    def _open_data(self) -> Any:
        self._pass.opened_at = self.state.iteration
        if _is_alone():
            return super()._open_data()
        self._pass.is_seeded = is_just_seeded()
        opened = super()._open_data()
        self._pass.states = random_states(self.backend)
        return opened

    def _begin_anew(self) -> None:
        self._loaded_rng_states = None

    def _epoch_begins(self) -> None:
        if self._loaded_rng_states is not None:
            restore_random_states(self._loaded_rng_states, self.backend)
            self._loaded_rng_states = None

    def _is_running(self) -> bool:
        session = self._session
        return session is not None and inspect.getgeneratorstate(session) == inspect.GEN_RUNNING


class _Pass:
    """What an engine notes of its pass over the data."""

    def __init__(self) -> None:
        #: The iteration that it was begun after.
        self.opened_at = 0
        #: Whether it was told how many batches make an epoch: these may not be a whole pass.
        self.length_is_given = False
        #: In several processes: the random states that it was begun with, and whether it was just
        #: seeded then.
        self.states: Any = None
        self.is_seeded = False


def _is_alone() -> bool:
    """Tells whether this process is the only one of its run, as far as torch knows."""
    group: Any = distributed
    joined = group.is_available() and group.is_initialized()
    return not joined or group.get_world_size() == 1


def check_iterable(data: Any) -> None:
    """Checks that data is what `run` takes."""
    if not isinstance(data, Iterable):
        raise TypeError(
            "Argument data should be iterable: a list, a DataLoader, an iterator or a generator; "
            f"got {type(data)}"
        )
