"""Deterministic training: the same data for a seed, and runs that resume bit for bit anywhere.

One class in one file: saving a state, taking it and going on from it are three sides of one
contract, and whoever changes one has to see the others. What each needs has its own file in `data`
and `exact`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from crosstrain.backends import random_state
from crosstrain.engine.data.attributes import plain_or_none
from crosstrain.engine.data.cursor import Cursor
from crosstrain.engine.data.own_data import own_data
from crosstrain.engine.data.sampling import ReproducibleBatchSampler, update_dataloader
from crosstrain.engine.data.shares import BatchShare, Shards, check_shards, world_of
from crosstrain.engine.data.streams import ALL_STREAMS, StreamKey
from crosstrain.engine.exact.laid_over import LaidOver
from crosstrain.engine.exact.porting import port
from crosstrain.engine.exact.rank_states import SHARDS, check_same_shards, gathered, own_part
from crosstrain.engine.exact.snapshot import (
    FORMAT,
    KEYS,
    OPTIONAL_KEYS,
    check_keys,
    environment,
    load_step,
    report_differences,
    settings,
    step_state,
)
from crosstrain.engine.ranks.agreed_seed import agreed_seed
from crosstrain.engine.ranks.of_each import RANKS
from crosstrain.engine.training.own_step import OwnStep
from crosstrain.engine.unsaved import Unsaved, is_made_beside

from .engine import Engine
from .errors import ResumeWarning, warn_user
from .events import Events
from .place import Place
from .progress import data_length, is_done
from .proof import Checks
from .random_states import random_states, random_states_kept, restore_random_states
from .requests import END_EPOCH, NO_BATCHES, QUIET_EPOCH, RUN_ENDS
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

F = TypeVar("F", bound=Callable[..., Any])


def manual_seed(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators (torch's on each device it knows).

    Args:
        seed: an integer of at least 0.

    Raises:
        ValueError: if it is negative.
    """
    random_state.seed(seed)


def keep_random_state(function: F) -> F:
    """Decorates a function so that it leaves the host's random states as it found them.

    Args:
        function: a handler, or any function; what it returns is returned.
    """
    return random_state.preserved()(function)


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
        before = {*vars(self)}
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
        self._step_done = self._cursor.step_done
        self._given_seed = seed
        self._warn_only = warn_only
        # The random states that the epoch that was begun last began with.
        self._epoch_states: dict[str, Any] | None = None
        # The state that was loaded, until the data is opened.
        self._snapshot: dict[str, Any] | None = None
        self._reseeds = False  # It has no random states of this rank.
        # It was left behind by set_data(), before the data was compared.
        self._unproven = False
        # The batch before was compared at the epoch's beginning, before its handlers ran.
        self._compared = False
        # A run of the training was passed by since: all of it was done when the state was written.
        self._passed_by = False
        # What was loaded beside it, to be laid over what handlers change before the data is opened.
        self._laid_over: LaidOver | None = None
        # The same, while runs are passed by that were done before the one it is of began.
        self._later: LaidOver | None = None
        self._defers = False
        self._put_back: list[str] = []
        self._unsaved = Unsaved(self)
        self._conditions: dict[str, Any] | None = None
        self.made_with = frozenset(vars(self).keys() - before)

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
            if "structure" not in values:
                values["structure"] = self._structure.record(self._structured())
            return values
        exact = self._cursor.between_batches
        if not exact:
            _warn_inexact("state_dict() was called in the middle of an iteration")
            values["iteration"] = self._place.stepped
        state, place, objects = self.state, self._place, self._structured()
        ended = place.ended or state.epoch == 0
        values["format"] = FORMAT
        values["seed"] = state.seed
        values["streams"] = list(self._streams)
        values["progress"] = {
            "epoch": state.epoch,
            "done": values["iteration"] - place.began,
            "ended": ended,
            # Whichever event was the last: handlers of a save fire some of their own.
            "ends": self.asked & END_EPOCH > 0 and not ended,
            "quiet": bool(self.asked & QUIET_EPOCH),
        }
        position = values["position"] = self._cursor.position()
        if position is not None:
            fetched = self._unsaved.fetched(objects)
            position["loaders"] = fetched.record()
            if fetched.training is not None:
                position["workers"] = own_data(self.state.dataloader).num_workers
        values["rng_states"] = random_states(self.backend)
        values["epoch_rng_states"] = None if values["progress"]["ended"] else self._epoch_states
        values["backend"] = None if self.backend is None else self.backend.state_dict()
        values["step"] = step_state(self._step)
        values["shown"] = {
            "output": plain_or_none(state.output),
            "metrics": plain_or_none(state.metrics) or {},
            # What counts events of the user's, by which their filters compare.
            "counts": {
                name: vars(state)[name]
                for name in sorted({*state.event_to_attr.values()} & vars(state).keys())
                if name not in _COUNTED and type(vars(state)[name]) is int
            },
        }
        if self.checks.unnamed != "off":
            values["shown"]["engines"] = self._unsaved.tell(
                objects, ended, self._structure, self._cursor
            )
        values["made"] = self._unsaved.made()
        values["structure"] = self._structure.record(objects, is_made_beside)
        values["environment"] = self._environment()
        values["exact"] = exact
        return values

    def _structured(self) -> dict[str, Any]:
        """Returns what structure is recorded of: what is saved, and the loss, which need not be."""
        found = named(self.objects, self.saved_beside)
        loss = getattr(self._step, "loss_fn", None)
        if isinstance(loss, torch.nn.Module) and all(loss is not one for one in found.values()):
            found.setdefault("loss_fn", loss)
        return found

    def _environment(self) -> dict[str, Any]:
        if self._conditions is None:
            # Once: some backends' probes take long.
            self._conditions = environment(self.backend)
        now = {**self._conditions, **settings()}
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
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            )
        own = {"epoch_length", "iteration", "epoch", "max_epochs", "max_iters", "terminated"}
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
        for key in self.state_dict_user_keys:
            setattr(self.state, key, self._snapshot[key])
        self._passed_by, self._later = False, None
        self._reseeds = full and self._snapshot["rng_states"] is None
        if self._reseeds:
            self._snapshot["rng_states"] = random_states(self.backend)
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
        self._structure.begin(self._structured())
        self._snapshot = self._laid_over = self._later = None
        self.state.seed = self._given_seed

    def _continue(self) -> State:
        if self._session is None:
            # Data that was set before the run: it is opened when the run has come to it.
            self._data_iter = None
            if isinstance(self._step, OwnStep):
                self._step.watch()
            if (snapshot := self._full_snapshot()) is not None:
                self._pass_by(snapshot)
                self._take_up(snapshot)
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
                self._keep_for_another_run()

    def _pass_by(self, snapshot: Mapping[str, Any]) -> None:
        """Keeps what was loaded, or lays it over what the script has changed since.

        Of several runs with a limit each, the script does again what it does between them. Where
        the state is a later run's, what was done before that has been done to what it holds.
        """
        state = self.state
        own = all(snapshot.get(name) == vars(state)[name] for name in ("max_epochs", "max_iters"))
        if is_done(state) and not own:
            self._later = self._later or LaidOver(self.loaded_with)
            return
        later, self._later = self._later, None
        if later is None:
            return
        for key in self.state_dict_user_keys:
            setattr(state, key, snapshot[key])
        if changed := later.lay():
            self.proof.checked.append(
                f"{', '.join(changed)}: put back after the script had changed it between its runs"
            )

    def _keep_for_another_run(self) -> None:
        """Keeps what handlers have done in a run that had nothing left to do."""
        snapshot = self._full_snapshot()
        if snapshot is None or self._place.open or self._later is not None:
            return
        # What it tells of the structure was put back: what the script changes now is right.
        self._snapshot = {
            **{key: item for key, item in snapshot.items() if key != "structure"},
            "rng_states": random_states(self.backend),
            "step": step_state(self._step),
            "backend": None if self.backend is None else self.backend.state_dict(),
        }
        self._passed_by = self.restartable

    def _take_up(self, snapshot: Mapping[str, Any]) -> None:
        """Restores what comes before the data: the step's and the backend's state, the place."""
        progress, place = snapshot["progress"], self._place
        place.ended = progress["ended"]
        place.within = 0 if progress["ended"] else progress["done"]
        place.owed &= RUN_ENDS
        place.owed |= END_EPOCH * progress["ends"] | QUIET_EPOCH * progress["quiet"]
        if not (progress["ended"] or progress["ends"]):
            place.owed |= NO_BATCHES * (progress["done"] == self.state.epoch_length)
        shown = snapshot.get("shown", {"output": None, "metrics": {}})
        self.state.raw_output = shown["output"]
        self.state.metrics = {**shown["metrics"], **self.state.metrics}
        for name, count in shown.get("counts", {}).items():
            setattr(self.state, name, count)
        self._laid_over = None
        if any(map(self.has_users_handler, (Events.STARTED, Events.EPOCH_STARTED))):
            self._laid_over = LaidOver(self.loaded_with)
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

    def _restore_structure(self, snapshot: Mapping[str, Any], again: bool = False) -> Restored:
        """Puts back what no state_dict holds; tells nothing yet."""
        if self.checks.structure == "off" or "structure" not in snapshot:
            return Restored()
        return self._structure.restore(snapshot["structure"], self._structured(), again)

    def _settle_structure(self, snapshot: Mapping[str, Any]) -> None:
        """Puts it back over what handlers that fired again have changed, and tells."""
        found = self._restore_structure(snapshot, again=True)
        found.put_back = list(dict.fromkeys(self._put_back + found.put_back))
        found.tell(self.proof, self.checks.structure)

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
        elif self._place.open and "format" in snapshot and snapshot["progress"]["ended"]:
            # A handler of this epoch's beginning: the run that was saved did the same after it.
            self._cursor.exchange(snapshot["position"])
            self._snapshot, self._unproven = None, True
        self._defers = self._session is None or self._snapshot is not None
        super().set_data(data)

    def _open_data(self) -> Any:
        if self._defers:
            # set_data() before the run has come to its data: it is opened then.
            self._defers = False
            return iter(()) if self._session is None else None
        self._lay_over()
        data, snapshot = self.state.dataloader, self._snapshot
        if snapshot is not None and "format" in snapshot and not _at_beginning(snapshot):
            self._settle_structure(snapshot)
        if snapshot is None:
            if self._unproven:
                self._prove(data)
            self._cursor.open(data, self._key)
        elif "format" not in snapshot:
            self._open_foreign(snapshot)
        elif snapshot["position"] is None:
            # It was written before the run had come to its data.
            self._cursor.open(data, self._key)
        else:
            self._go_on_in(data, snapshot)
        # Not before: if this was the wrong data, the next run still goes on from the state.
        self._snapshot, self.loaded_with = None, {}
        if snapshot is not None:
            self.logger.info("Resumed at iteration %s. %s.", self.state.iteration, self.proof)
        return self._cursor

    def _go_on_in(self, data: Any, snapshot: Mapping[str, Any]) -> None:
        """Opens data where a state says, and restores the random states there."""
        # At an epoch's beginning they were restored before its EPOCH_STARTED, whose handlers may
        # have drawn; within an epoch that event fired once more, and its draws do not count.
        beginning = _at_beginning(snapshot)
        another = self._passed_by and beginning
        cursor, position, strictness = self._cursor, snapshot["position"], self.checks.batch_before
        with random_states_kept(self.backend) if beginning else nullcontext():
            if another and not cursor.fits(position, data):
                cursor.go_on_with(position, data, self._key)
            else:
                other = self._other_beginning(another) if beginning else None
                if beginning and self._compared:
                    strictness = "off"
                cursor.go_to(position, data, self._key, self.proof, strictness, other)
                self._unsaved.tell_of_workers(self._structured(), position, cursor)
        if not beginning:
            restore_random_states(snapshot["rng_states"], self.backend)
        if self._reseeds:
            cursor.seed_anew(self._key)

    def _prove(self, data: Any) -> None:
        """Has data that was set at a resumed epoch's beginning fetched twice, and compared."""
        self._unproven = False
        if self.checks.batch_before == "off":
            return
        self.proof.unchecked.append("the batch before: set_data() has left its pass")
        with random_states_kept(self.backend):
            self._cursor.rehearse(data, self._key, self.proof, self.checks.batch_before)
        self.logger.info("Resumed at iteration %s. %s.", self.state.iteration, self.proof)

    def _check_before(self, position: Mapping[str, Any]) -> None:
        """Compares the batch before now, if handlers of EPOCH_STARTED may change the data."""
        self._compared = False
        handled = self.has_users_handler(Events.EPOCH_STARTED) and not self._passed_by
        if self.checks.batch_before == "off" or not handled:
            return
        data = self.state.dataloader
        with random_states_kept(self.backend):
            self._compared = self._cursor.check_before(position, data, self._key, self.proof)

    def _other_beginning(self, another: bool) -> str | None:
        """Returns why the last batch of an epoch that has ended may differ now, if it may."""
        if another:
            return "it was another run's"
        if self.has_users_handler(Events.EPOCH_STARTED):
            return "it is of the epoch before, and handlers of EPOCH_STARTED may change the data"
        return None

    def _reopen_data(self) -> Iterator[Any]:
        self._cursor.open_next_pass(self.state.dataloader, self._key)
        return self._cursor

    @property
    def _key(self) -> StreamKey:
        seed = self.state.seed
        assert seed is not None, "the seed is drawn when a run starts"
        return StreamKey(seed, 0, self._streams)

    def _begins(self) -> None:
        self._unsaved.begin()
        self.state.seed = agreed_seed(self.state.seed, self.backend)
        self._cursor.watch(self.state.dataloader)
        snapshot = self._full_snapshot()
        if snapshot is not None:
            self._unsaved.go_on(snapshot, self._structured())
        if snapshot is not None and self.restartable and self._place.owed & RUN_ENDS:
            # It ends as it had ended: another run, of this process, would begin another epoch.
            self.state.epoch = snapshot["progress"]["epoch"]
            left = {**snapshot["progress"], "ended": True, "ends": False, "quiet": False}
            self._snapshot = {**snapshot, "progress": left}
            restore_random_states(snapshot["rng_states"], self.backend)

    def _epoch_begins(self) -> None:
        snapshot = self._full_snapshot()
        if snapshot is not None:
            if _at_beginning(snapshot):
                self._lay_over()
                self._settle_structure(snapshot)
                if snapshot["position"] is not None:
                    self._check_before(snapshot["position"])
                    self._cursor.prepare(snapshot["position"], self.state.dataloader)
                restore_random_states(snapshot["rng_states"], self.backend)
            else:
                self._repeat_beginning(snapshot)
        self._unsaved.epoch_begins(self._structured())
        self._epoch_states = random_states(self.backend)

    def _run_batches(self, place: Place) -> Generator[None, None, None]:
        objects = self._structured()
        self._structure.batches_begin(objects)
        self._unsaved.batches_begin(objects)
        yield from super()._run_batches(place)

    def _after_each_step(self) -> list[Callable[[], None]] | None:
        calls = super()._after_each_step()
        if not self._unsaved.looks_after_steps:
            return calls
        return [*(calls or ()), self._look_at_made]

    def _look_at_made(self) -> None:
        if self._unsaved.looks_after_steps:
            self._unsaved.step_done(self._structured(), self._structure)

    def _ends(self) -> None:
        snapshot = self._full_snapshot()
        if snapshot is not None and not self.should_terminate:
            # Nothing was left to do: the run ends as the one that was saved did.
            restore_random_states(snapshot["rng_states"], self.backend)

    def _full_snapshot(self) -> dict[str, Any] | None:
        snapshot = self._snapshot
        return None if snapshot is None or "format" not in snapshot else snapshot

    def _repeat_beginning(self, snapshot: Mapping[str, Any]) -> None:
        """Restores the random states that the epoch within which the run goes on began with."""
        states = snapshot.get("epoch_rng_states")
        if states is not None:
            restore_random_states(states, self.backend)
        elif self.has_users_handler(Events.EPOCH_STARTED):
            warn_user(
                "The run goes on within an epoch, and the state does not hold the random states "
                "that the epoch began with on this rank: an older version wrote it, or another "
                "number of processes. Handlers of EPOCH_STARTED that draw random numbers, such as "
                "negatives for the epoch, draw others than before.",
                ResumeWarning,
            )

    def _lay_over(self) -> None:
        """Gives named objects back what the handlers of a resumed beginning have changed."""
        laid_over, self._laid_over = self._laid_over, None
        if laid_over is not None and (changed := laid_over.lay()):
            self.proof.checked.append(
                f"{', '.join(changed)}: put back after handlers of the beginning had changed it"
            )

    def _open_foreign(self, snapshot: Mapping[str, Any]) -> None:
        """Opens the data where a state of pytorch-ignite's form says."""
        iteration = self.state.iteration
        length = data_length(self.state.dataloader) or iteration + 1
        number, batch = divmod(iteration, length)
        self._cursor.go_to_pass(number, batch, self.state.dataloader, self._key)
        if snapshot["rng_states"] is not None and batch:
            restore_random_states(snapshot["rng_states"], self.backend)


# They are in the state by themselves.
_COUNTED = {*vars(State()), "applied_steps", "skipped_steps"}


def _at_beginning(snapshot: Mapping[str, Any]) -> bool:
    progress = snapshot["progress"]
    return bool(progress["ended"]) or progress["done"] == 0


def _warn_inexact(what: str) -> None:
    warn_user(
        f"The run will not resume bit for bit: {what}, and the random states at its beginning are "
        "not known. Save at ITERATION_COMPLETED or EPOCH_COMPLETED.",
        ResumeWarning,
    )
