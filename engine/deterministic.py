"""Deterministic training: the same data for a seed, and runs that resume bit for bit anywhere."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from crosstrain.backends import random_state
from crosstrain.engine.data.cursor import Cursor
from crosstrain.engine.data.sampling import ReproducibleBatchSampler, update_dataloader
from crosstrain.engine.data.shares import BatchShare, Shards, check_shards, world_of
from crosstrain.engine.data.streams import ALL_STREAMS, StreamKey
from crosstrain.engine.exact.porting import port
from crosstrain.engine.exact.rank_states import RANKS, SHARDS, check_same_shards, gathered, own_part
from crosstrain.engine.exact.snapshot import (
    FORMAT,
    KEYS,
    OPTIONAL_KEYS,
    check_keys,
    environment,
    load_step,
    report_differences,
    step_state,
)
from crosstrain.engine.ranks.agreed_seed import agreed_seed
from crosstrain.engine.training.own_step import OwnStep

from .engine import Engine
from .errors import ResumeWarning, warn_user
from .events import Events
from .progress import data_length
from .proof import Checks
from .random_states import random_states, random_states_kept, restore_random_states
from .requests import END_EPOCH, QUIET_EPOCH
from .state import State
from .structure import Restored, Structure, named

if TYPE_CHECKING:
    from crosstrain.backends import Backend

__all__ = [
    "DeterministicEngine",
    "ReproducibleBatchSampler",
    "keep_random_state",
    "manual_seed",
    "update_dataloader",
]

_ITERATION_ENDS = Events.ITERATION_COMPLETED
P = ParamSpec("P")
R = TypeVar("R")


def manual_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (torch's on each device it knows).

    Args:
        seed: an integer of at least 0.

    Raises:
        ValueError: if it is negative.
    """
    random_state.seed(seed)


def keep_random_state(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function so that it leaves the host's random states as it found them.

    Args:
        function: a handler, or any function; what it returns is returned.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with random_state.preserved():
            return function(*args, **kwargs)

    return wrapper


class DeterministicEngine(Engine):
    """An engine whose run follows from its seed, and which resumes exactly from any iteration.

    Pass p over the data begins with the global generators seeded with `seed + p`; a DataLoader over
    a map-style dataset then gives the batches of torch's own sampling, and each sample's random
    numbers follow from (seed, p, position), in whatever process it is fetched. `state_dict` holds
    what a resumed run needs to end with the same bits, besides model, optimizer and scheduler.

    Args:
        process_function: as of `Engine`. If it has `state_dict` and `load_state_dict`, as a
            factory's training step does, its state rides along. If not, the gradients that wait
            for their optimizer's step do: of the models and optimizers in `objects`, and of those
            that the function refers to.
        backend: as of `Engine`; its arithmetic is deterministic while a run goes on.
        seed: the seed of each run that begins anew, from 0 to 2**63 - 1. None: drawn from torch's
            global generator when a run starts, as pytorch-ignite does, so that `manual_seed`
            decides it.
        streams: which global generators are keyed for each sample: of `python`, `numpy`, `torch`.
        warn_only: whether an operation without a deterministic kernel warns instead of raising.
        checks: how strict a resume is about each thing that it measures; by default, all of it is
            an error. What it finds stands in `proof` afterwards, and in one line of the log.

        shards: to how many logical shards each batch is dealt out, for a process function that
            computes it by `LogicalShards`; a power of two that the number of processes divides.

    Raises:
        ValueError: if `streams` names another generator, the seed is out of range, or the number of
            processes does not divide that of shards.
    """

    resumes_data = True

    def __init__(
        self,
        process_function: Callable[[Any, Any], Any],
        backend: Backend | None = None,
        *,
        seed: int | None = None,
        streams: Iterable[str] = ALL_STREAMS,
        warn_only: bool = False,
        checks: Checks | None = None,
        shards: int | None = None,
    ) -> None:
        super().__init__(process_function, backend)
        world = world_of(backend)
        #: The number of logical shards, whatever the number of processes; None without any.
        self.shards = None if shards is None else check_shards(shards, world)
        self.checks = checks or Checks()
        self._structure = Structure()
        self._streams = tuple(streams)
        if unknown := sorted(set(self._streams) - set(ALL_STREAMS)):
            raise ValueError(f"streams has {unknown}; legal values: {', '.join(ALL_STREAMS)}.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is an integer from 0 to 2**63 - 1, got {seed}.")
        has_state = hasattr(process_function, "state_dict")
        self._step: Any = process_function if has_state else OwnStep(process_function, self)
        self._cursor = Cursor(backend, None if shards is None else Shards.of(shards, world))
        self._process_function = _tracked(process_function, self._cursor)
        self._given_seed = seed
        self._warn_only = warn_only
        self._completed = self._epoch_began = self._last_ended_epoch = 0
        # The state that was loaded, until the data is opened.
        self._snapshot: dict[str, Any] | None = None
        self._reseeds = False  # It has no random states of this rank.
        self._defers = False
        self._put_back: list[str] = []
        self._conditions: dict[str, Any] | None = None
        # Plain functions: a bound method here would keep the engine alive.
        self.add_event_handler(Events.STARTED, _on_started)
        self.add_event_handler(Events.EPOCH_STARTED, _on_epoch_started)
        self.add_event_handler(Events.EPOCH_COMPLETED, _on_epoch_completed)
        self.add_event_handler(Events.COMPLETED, _on_completed)

    @property
    def share(self) -> BatchShare | None:
        """What this process has of the batch; None in one process, and where data is its own."""
        return self._cursor.share

    # ------------------------------------------------------------ the state

    def state_dict(self) -> OrderedDict[str, Any]:
        """Returns everything that this engine needs to go on exactly, as tensors and plain types.

        Call it at ITERATION_COMPLETED, at EPOCH_COMPLETED or between runs. In the middle of an
        iteration it warns: the random states are not those of the iteration's beginning.

        In a world of several processes all have to call it, at the same iteration. Rank 0 gets what
        differs on the others, too, and its state is the one to save. `RankFailed`, if one does not.
        """
        return self.state_on(0)

    def state_on(self, rank: int) -> OrderedDict[str, Any]:
        """Does what `state_dict` does, for another rank to save."""
        return OrderedDict(gathered(self._own_state(), self, rank))

    def _own_state(self) -> dict[str, Any]:
        values = super().state_dict()
        if self._snapshot is not None:
            known = KEYS | set(OPTIONAL_KEYS)
            values.update({k: v for k, v in self._snapshot.items() if k in known})
            return values
        exact = self._cursor.between_batches
        if not exact:
            _warn_inexact("state_dict() was called in the middle of an iteration")
            values["iteration"] = self._completed
        state = self.state
        values["format"] = FORMAT
        values["seed"] = state.seed
        values["streams"] = list(self._streams)
        values["progress"] = {
            "epoch": state.epoch,
            "done": values["iteration"] - self._epoch_began,
            "ended": state.epoch == self._last_ended_epoch,
            "ends": self.asked & END_EPOCH > 0 and self.last_event_name == _ITERATION_ENDS,
            "quiet": bool(self.asked & QUIET_EPOCH),
        }
        values["position"] = self._cursor.position()
        values["rng_states"] = random_states(self.backend)
        values["backend"] = None if self.backend is None else self.backend.state_dict()
        values["step"] = step_state(self._step)
        values["structure"] = self._structure.record(named(self.objects, self.saved_beside))
        values["environment"] = self._environment()
        values["exact"] = exact
        return values

    def _environment(self) -> dict[str, Any]:
        if self._conditions is None:
            # Once: some backends' probes take long.
            self._conditions = environment(self.backend)
        now = {**self._conditions, "threads": torch.get_num_threads()}
        return now if self.shards is None else {**now, SHARDS: self.shards}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the engine to go on from a state; the next `run` restores all of it, in order.

        Args:
            state_dict: what `state_dict` returned, or a state of pytorch-ignite's form: progress
                and `rng_states`. The latter resumes exactly only where pytorch-ignite's own does.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: if a key is missing or unexpected, or has an illegal value.
        """
        if not isinstance(state_dict, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            )
        own = {"epoch_length", "iteration", "epoch", "max_epochs", "max_iters"}
        full = check_keys(state_dict, {*own, RANKS, *self.state_dict_user_keys})
        if full and state_dict.get("epoch_length", 0) is None:
            # Within a first pass over data of unknown length, an iteration needs no epoch.
            super().load_state_dict({**state_dict, "iteration": 0})
            self.state.iteration = state_dict["iteration"]
        else:
            super().load_state_dict(state_dict)
        self._cursor.reset()
        if full:
            check_same_shards(state_dict, self.shards)
        self._snapshot = own_part(state_dict, self.backend) if full else dict(state_dict)
        self._reseeds = full and self._snapshot["rng_states"] is None
        if self._reseeds:
            self._snapshot["rng_states"] = random_states(self.backend)
        self._completed = self.state.iteration
        self.state.seed = state_dict["seed"] if full else self._given_seed
        if full:
            self._streams = tuple(state_dict["streams"])
            progress = state_dict["progress"]
            open_epoch = progress["epoch"] > 0 and not progress["ended"]
            self.state.epoch = progress["epoch"] - open_epoch
            if not state_dict["exact"]:
                _warn_inexact("the state was written in the middle of an iteration")
            older = [what for key, what in OPTIONAL_KEYS.items() if key not in state_dict]
            self.proof.unchecked += [f"{what} (the state is an older version's)" for what in older]

    # ---------------------------------------------------------------- the run

    def _begin_anew(self) -> None:
        self._cursor.reset()
        self._completed = self._epoch_began = self._last_ended_epoch = 0
        self._snapshot, self._owes_epoch_end, self._owed = None, False, 0
        self.state.seed = self._given_seed

    def _continue(self) -> State:
        if self._session is None:
            # Data that was set before the run: it is opened when the run has come to it.
            self._data_iter = None
            if isinstance(self._step, OwnStep):
                self._step.watch()
            if self._snapshot is not None:
                self._take_up(self._snapshot)
        arithmetic = (
            nullcontext() if self.backend is None else self.backend.deterministic(self._warn_only)
        )
        try:
            with arithmetic:
                return super()._continue()
        finally:
            if self._session is None:
                # Workers stop with the run.
                self._cursor.close()
                snapshot = self._snapshot
                if snapshot is not None and "format" in snapshot:
                    # Nothing was left to do, but handlers may have drawn.
                    self._snapshot = {**snapshot, "rng_states": random_states(self.backend)}

    def _take_up(self, snapshot: Mapping[str, Any]) -> None:
        """Restores what comes before the data: the step's and the backend's state, the progress."""
        if "format" not in snapshot:
            return
        progress = snapshot["progress"]
        self._last_ended_epoch = progress["epoch"] if progress["ended"] else 0
        self._epoch_offset = 0 if progress["ended"] else progress["done"]
        length = self.state.epoch_length
        self._owed = END_EPOCH * progress["ends"] | QUIET_EPOCH * progress["quiet"]
        self._owes_epoch_end = (
            not progress["ended"] and not progress["ends"] and progress["done"] == length
        )
        self._put_back = self._restore_structure(snapshot).put_back
        now = self._environment()
        if snapshot["environment"]["backend"] != now["backend"]:
            # From here on it is one of this backend, should it be asked for or taken up again.
            self._snapshot = port(snapshot, self.backend, self._step, now)
            return
        report_differences(snapshot["environment"], now)
        load_step(self._step, snapshot["step"])
        if self.backend is not None:
            self.backend.load_state_dict(snapshot["backend"])

    def _restore_structure(self, snapshot: Mapping[str, Any]) -> Restored:
        """Puts back what no state_dict holds; tells nothing yet."""
        if self.checks.structure == "off" or "structure" not in snapshot:
            return Restored()
        objects = named(self.objects, self.saved_beside)
        return self._structure.restore(snapshot["structure"], objects)

    def set_data(self, data: Iterable[Any]) -> None:
        """Takes the next batch, and all after it, from other data, as another pass of the run.

        A state that is written after this says so: resume it with this data, given to `run` or set
        by the same handler.

        Args:
            data: what `run` takes.

        Raises:
            TypeError: if it is not iterable.
        """
        snapshot = self._snapshot
        if snapshot is None:
            self._cursor.exchange()
        elif self._in_epoch and "format" in snapshot and snapshot["progress"]["ended"]:
            # A handler of this epoch's beginning: the run that was saved did the same after it.
            self._cursor.exchange(snapshot["position"])
            self._snapshot = None
        self._defers = self._session is None or self._snapshot is not None
        super().set_data(data)

    def _open_data(self) -> Any:
        if self._defers:
            # set_data() before the run has come to its data: it is opened then.
            self._defers = False
            return iter(()) if self._session is None else None
        data, snapshot = self.state.dataloader, self._snapshot
        if snapshot is not None:
            # Once more: handlers of the run's and the epoch's beginning have fired again.
            found = self._restore_structure(snapshot)
            found.put_back = list(dict.fromkeys(self._put_back + found.put_back))
            found.tell(self.proof, self.checks.structure)
        if snapshot is None:
            self._cursor.open(data, self._key)
        elif "format" not in snapshot:
            self._open_foreign(snapshot)
        elif snapshot["position"] is None:
            # It was written before the run had come to its data.
            self._cursor.open(data, self._key)
        else:
            # At an epoch's beginning they were restored before its EPOCH_STARTED, whose handlers
            # may have drawn; within an epoch that event fired once more, and its draws do not
            # count.
            beginning = _at_beginning(snapshot)
            with random_states_kept(self.backend) if beginning else nullcontext():
                self._cursor.go_to(
                    snapshot["position"], data, self._key, self.proof, self.checks.batch_before
                )
            if not beginning:
                restore_random_states(snapshot["rng_states"], self.backend)
            if self._reseeds:
                self._cursor.seed_anew(self._key)
        # Not before: if this was the wrong data, the next run still goes on from the state.
        self._snapshot = None
        if snapshot is not None:
            self.logger.info("Resumed at iteration %s. %s.", self.state.iteration, self.proof)
        return self._cursor

    def _reopen_data(self) -> Iterator[Any]:
        self._cursor.open_next_pass(self.state.dataloader, self._key)
        return self._cursor

    @property
    def _key(self) -> StreamKey:
        seed = self.state.seed
        assert seed is not None, "the seed is drawn when a run starts"
        return StreamKey(seed, 0, self._streams)

    def _open_foreign(self, snapshot: Mapping[str, Any]) -> None:
        """Opens the data where a state of pytorch-ignite's form says."""
        iteration = self.state.iteration
        length = data_length(self.state.dataloader) or iteration + 1
        number, batch = divmod(iteration, length)
        self._cursor.go_to_pass(number, batch, self.state.dataloader, self._key)
        if snapshot["rng_states"] is not None and batch:
            restore_random_states(snapshot["rng_states"], self.backend)


def _tracked(
    process_function: Callable[[Any, Any], Any], cursor: Cursor
) -> Callable[[Any, Any], Any]:
    @functools.wraps(process_function, updated=())
    def step(engine: Any, batch: Any) -> Any:
        output = process_function(engine, batch)
        cursor.consumed = cursor.fetched
        engine._completed = engine.state.iteration
        return output

    return step


def _at_beginning(snapshot: Mapping[str, Any]) -> bool:
    progress = snapshot["progress"]
    return bool(progress["ended"]) or progress["done"] == 0


def _on_started(engine: Any) -> None:
    engine.state.seed = agreed_seed(engine.state.seed, engine.backend)


def _on_epoch_started(engine: Any) -> None:
    engine._epoch_began = engine.state.iteration - (engine._epoch_offset or 0)
    snapshot = engine._snapshot
    if snapshot is not None and "format" in snapshot and _at_beginning(snapshot):
        restore_random_states(snapshot["rng_states"], engine.backend)


def _on_epoch_completed(engine: Any) -> None:
    engine._last_ended_epoch = engine.state.epoch


def _on_completed(engine: Any) -> None:
    snapshot = engine._snapshot
    if snapshot is not None and "format" in snapshot:
        # Nothing was left to do: the run ends as the one that was saved did.
        restore_random_states(snapshot["rng_states"], engine.backend)


def _warn_inexact(what: str) -> None:
    warn_user(
        f"The run will not resume bit for bit: {what}, and the random states at its beginning are "
        "not known. Save at ITERATION_COMPLETED or EPOCH_COMPLETED.",
        ResumeWarning,
    )
