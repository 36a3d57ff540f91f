"""RecordingEngine: an engine that writes down all that the bits of its run follow from.

It is the half of a `DeterministicEngine` that saves. What a state is made of has files of its own
in `data`, `exact` and `unsaved`; here it is put together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.engine.data.cursor import Cursor
from crosstrain.engine.data.own_data import own_data
from crosstrain.engine.data.plain_values import plain_or_none
from crosstrain.engine.data.shares import BatchShare, Shards, check_shards, world_of
from crosstrain.engine.data.streams import ALL_STREAMS, StreamKey
from crosstrain.engine.exact.left_gradients import left_gradients
from crosstrain.engine.exact.rank_states import SHARDS, gathered
from crosstrain.engine.exact.snapshot import FORMAT, environment, settings, step_state
from crosstrain.engine.ranks.line import Line, has_ranks
from crosstrain.engine.source.made_where_missing import is_made_beside
from crosstrain.engine.training.own_step import OwnStep
from crosstrain.engine.training.step import StepEvents, TrainingStep
from crosstrain.engine.unsaved import Unsaved, Used

from .digest import digest, sketch
from .engine import Engine
from .errors import ResumeWarning, warn_user
from .events import Events
from .made_with import is_schedule, packed, settings_of
from .nests import walk_objects
from .progress import Place
from .proof import Checks
from .random_states import random_states
from .requests import END_EPOCH, QUIET_EPOCH
from .state import State
from .structure import Structure, named

if TYPE_CHECKING:
    from crosstrain.backends import Backend


class RecordingEngine(Engine):
    """Knows its data's position, its step, what it trains and its conditions, and saves them.

    Its arguments are those of `DeterministicEngine`, but for `warn_only`.
    """

    resumes_data = True

    def __init__(
        self,
        process_function: Callable[[Any, Any], Any],
        backend: Backend | None,
        *,
        seed: int | None,
        streams: Iterable[str],
        checks: Checks | None,
        shards: int | None,
    ) -> None:
        super().__init__(process_function, backend)
        world = world_of(backend)
        #: The number of logical shards, whatever the number of processes; None without any.
        self.shards = None if shards is None else check_shards(shards, world)
        self.checks = checks or Checks()
        self._streams = tuple(streams)
        if unknown := sorted(set(self._streams) - set(ALL_STREAMS)):
            raise ValueError(f"streams has {unknown}; legal values: {', '.join(ALL_STREAMS)}.")
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed is an integer from 0 to 2**63 - 1, got {seed}.")
        self._given_seed = seed
        has_state = hasattr(process_function, "state_dict")
        self._step: Any = process_function if has_state else OwnStep(process_function, self)
        self._cursor = Cursor(backend, None if shards is None else Shards.of(shards, world))
        self._step_done = self._cursor.step_done
        self._structure = Structure()
        # What it trains and what is saved beside it, by name, whose settings are noted.
        self._made: dict[str, Any] = {}
        self._unsaved = Unsaved(self)
        # The random states that the epoch that was begun last began with.
        self._epoch_states: dict[str, Any] | None = None
        # What does not change of the conditions, once they were asked for.
        self._conditions: dict[str, Any] | None = None

    def introduce(self, others: Mapping[str, Any]) -> None:
        """Takes note of what is saved beside it, and of what the script has made it all with."""
        super().introduce(others)
        if not self._made and self.state.iteration == 0:
            schedules = {name: one for name, one in walk_objects(others) if is_schedule(one)}
            self._made = {**self._recorded_objects(), **schedules}
            self._structure.made_with = packed(settings_of(self._made, self._step))

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
        """Returns this process's part of the state."""
        values = super().state_dict()
        exact = self._cursor.between_batches
        if not exact:
            warn_inexact("state_dict() was called in the middle of an iteration")
            values["iteration"] = self._place.stepped
        objects = self._recorded_objects()
        values["format"] = FORMAT
        values["seed"] = self.state.seed
        values["streams"] = list(self._streams)
        progress = values["progress"] = self._progress(values["iteration"])
        position = values["position"] = self._cursor.position()
        if position is not None:
            fetched = self._unsaved.fetched(objects)
            position["loaders"] = fetched.record()
            if fetched.training is not None:
                position["workers"] = own_data(self.state.dataloader).num_workers
        values["rng_states"] = random_states(self.backend)
        values["epoch_rng_states"] = None if progress["ended"] else self._epoch_states
        values["backend"] = None if self.backend is None else self.backend.state_dict()
        values["step"] = step_state(self._step)
        values["shown"] = self._shown()
        used = self._unsaved.used(objects)
        if self.checks.unnamed != "off":
            values["shown"]["engines"] = self._unsaved.tell(
                used, progress["ended"], self._structure, self._cursor.flow
            )
        # A window's are in the state of the step.
        if not (isinstance(self._step, TrainingStep) and values["step"]["gradients"]):
            looks = partial(self._looks_at_gradients, used)
            values["shown"]["gradients"] = left_gradients(objects, looks)
        values["made"] = self._unsaved.made()
        values["structure"] = self._structure.record(objects, is_made_beside)
        values["environment"] = self._environment()
        values["exact"] = exact
        return values

    def _looks_at_gradients(self, used: Used, ever: bool) -> bool:
        """Tells whether a handler looks at gradients: between two steps, or ever."""
        within = () if ever else (Events.ITERATION_COMPLETED, *StepEvents)
        return self._unsaved.reads_gradients(used, within)

    def iteration_marks(self) -> dict[str, str]:
        """Returns digests of what an iteration has come to: batch, random states, weights, rates.

        Call it at ITERATION_COMPLETED. Of each parameter some numbers are copied to the host;
        buffers may be tables that a resumed run makes anew.
        """
        trained = self._recorded_objects().values()
        modules = [value for value in trained if isinstance(value, torch.nn.Module)]
        # A rate that a handler has set shows in no weight before the next iteration.
        rates = [
            group.get("lr")
            for value in trained
            if isinstance(value, torch.optim.Optimizer)
            for group in value.param_groups
        ]
        weights = sketch(one for module in modules for one in module.parameters())
        return {
            "conditions": digest(self._environment()),
            "batch": digest(self._cursor.last_batch()),
            "random": digest(random_states(self.backend)),
            "weights": digest([weights, rates]),
        }

    def _progress(self, iteration: int) -> dict[str, Any]:
        """Returns where in its epoch the run is, after an iteration."""
        epoch = self.state.epoch
        ended = self._place.ended or epoch == 0
        return {
            "epoch": epoch,
            "done": iteration - self._place.began,
            "ended": ended,
            # Whichever event was the last: handlers of a save fire some of their own.
            "ends": self.asked & END_EPOCH > 0 and not ended,
            "quiet": bool(self.asked & QUIET_EPOCH),
        }

    def _shown(self) -> dict[str, Any]:
        """Returns what handlers read of the state, as far as it is plain."""
        state = self.state
        return {
            "output": plain_or_none(state.output),
            "metrics": plain_or_none(state.metrics) or {},
            # What counts events of the user's, by which their filters compare.
            "counts": {
                name: vars(state)[name]
                for name in sorted({*state.event_to_attr.values()} & vars(state).keys())
                if name not in _COUNTED and type(vars(state)[name]) is int
            },
        }

    # ------------------------------------------------------------ what it is put together of

    def _recorded_objects(self) -> dict[str, Any]:
        """Returns what structure is recorded of: what is saved, and the loss, which need not be."""
        found = named(self.objects, self.saved_beside)
        loss = getattr(self._step, "loss_fn", None)
        if isinstance(loss, torch.nn.Module) and all(loss is not one for one in found.values()):
            found.setdefault("loss_fn", loss)
        return found

    def _environment(self) -> dict[str, Any]:
        """Returns what decides the bits besides the state: device, versions, threads, shards."""
        if self._conditions is None:
            # Once: some backends' probes take long.
            self._conditions = environment(self.backend)
        now = {**self._conditions, **settings()}
        return now if self.shards is None else {**now, SHARDS: self.shards}

    @property
    def _key(self) -> StreamKey:
        """What keys the random streams of the data."""
        seed = self.state.seed
        assert seed is not None, "the seed is drawn when a run starts"
        return StreamKey(seed, 0, self._streams)

    # ------------------------------------------------------------ noted in the course of a run

    def _begin_anew(self) -> None:
        self._cursor.reset()
        self._structure.begin(self._recorded_objects())
        self.state.seed = self._given_seed

    def _begins(self) -> None:
        self._unsaved.begin()
        self.state.seed = _agreed_seed(self.state.seed, self.backend)
        OwnStep(self._process_function, self).lay_out()
        self._cursor.watch(self.state.dataloader)

    def _epoch_begins(self) -> None:
        self._unsaved.epoch_begins(self._recorded_objects())
        self._epoch_states = random_states(self.backend)

    def _run_batches(self, place: Place) -> Generator[None, None, None]:
        objects = self._recorded_objects()
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
            self._unsaved.step_done(self._recorded_objects(), self._structure)


# They are in the state by themselves.
_COUNTED = {*vars(State()), "applied_steps", "skipped_steps"}


def warn_inexact(what: str) -> None:
    """Warns that a state was taken where the random states are not those to go on with."""
    warn_user(
        f"The run will not resume bit for bit: {what}, and the random states at its beginning are "
        "not known. Save at ITERATION_COMPLETED or EPOCH_COMPLETED.",
        ResumeWarning,
    )


def _agreed_seed(given: int | None, backend: Backend | None) -> int:
    """Returns the seed of a run: the one given, or one drawn from torch's global generator.

    In several processes it is rank 0's that counts where it is drawn. It is a collective operation
    there: all of them have to start the run, and to have been given the same.
    """
    seed = int(torch.randint(0, int(1e9), (1,)).item()) if given is None else given
    if backend is None or backend.world.size == 1 or not has_ranks():
        return seed
    with Line() as line:
        found = line.meet("agreeing on the run's seed", (given, seed), of=line.everyone)
    for rank, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise ValueError(
                f"The processes of a run have to have one seed: rank 0 was given {found[0][0]}, "
                f"rank {rank} {other}. Give all of them the same, or none: then rank 0's is drawn "
                "and taken by all."
            )
    agreed: int = found[0][1]
    return agreed
