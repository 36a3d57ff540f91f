"""Resumption: a resume under way, from the state that was loaded to the data that is opened there.

What a state holds is given back piece by piece, each where the run comes to it, since handlers that
fire in between may change it or draw random numbers. `DeterministicEngine` has one of these from
`load_state_dict` on, and calls its methods in this order:

1. `take_up`, when `run` goes on: the place, what handlers read, the step's and backend's state.
2. `run_begins`, before STARTED.
3. `epoch_begins`, before EPOCH_STARTED: what this event's handlers see, and draw from.
4. `open_data`, before the first batch: the data at the state's position, compared with what the
   state tells of it. Then the resume is done, and dropped.

Where nothing is left to do, no epoch begins: `run_ends` and `run_has_ended` come after 2, and
another run takes it up. So it does where an exception ends the run before its data is opened.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from crosstrain.backends import World
from crosstrain.engine.exact.laid_over import LaidOver
from crosstrain.engine.exact.left_gradients import restore_left
from crosstrain.engine.exact.porting import port
from crosstrain.engine.exact.rank_states import own_part
from crosstrain.engine.exact.snapshot import (
    KEYS,
    OPTIONAL_KEYS,
    load_step,
    report_differences,
    step_state,
)

from .errors import ResumeWarning, warn_user
from .events import Events
from .made_with import settings_of, tell_changes, unpacked
from .progress import data_length, is_done
from .proof import Strictness
from .random_states import random_states, random_states_kept, restore_random_states
from .recording import RecordingEngine
from .requests import END_EPOCH, NO_BATCHES, QUIET_EPOCH, RUN_ENDS
from .structure import Restored


class Resumption:
    """Goes on from a state of pytorch-ignite's form, which has progress and random states only.

    Args:
        snapshot: the state.
        engine: whose run goes on; it has taken the counters and limits already.
    """

    def __init__(self, snapshot: Mapping[str, Any], engine: RecordingEngine) -> None:
        #: The state, changed where a run that ended before its data was opened has gone on with it.
        self.snapshot: dict[str, Any] = dict(snapshot)
        self._of = weakref.ref(engine)

    @property
    def _engine(self) -> RecordingEngine:
        engine = self._of()
        assert engine is not None, "it is called by its engine alone"
        return engine

    @property
    def is_of_ended_epoch(self) -> bool:
        """Whether the state was taken when its epoch had ended, as far as it tells."""
        return False

    def state(self) -> dict[str, Any]:
        """Returns what a state that is taken before the resume is done has of the one loaded."""
        known = KEYS | set(OPTIONAL_KEYS)
        values = {key: item for key, item in self.snapshot.items() if key in known}
        if "format" in values and "structure" not in values:
            # A run that had nothing left to do has let go of it.
            engine = self._engine
            values["structure"] = engine._structure.record(engine._recorded_objects())
        return values

    def take_up(self) -> None:
        """Restores what comes before the data: the step's and the backend's state, the place."""

    def run_begins(self) -> None:
        """Restores what handlers of STARTED use."""

    def epoch_begins(self) -> None:
        """Restores what handlers of EPOCH_STARTED see and draw from."""

    def open_data(self, data: Any) -> None:
        """Opens the data where the state says, and restores the random states there."""
        engine, cursor = self._engine, self._engine._cursor
        iteration = engine.state.iteration
        length = data_length(data) or iteration + 1
        number, batch = divmod(iteration, length)
        cursor.go_to_pass(number, batch, data, engine._key)
        if self.snapshot["rng_states"] is not None and batch:
            restore_random_states(self.snapshot["rng_states"], engine.backend)

    def run_ends(self) -> None:
        """Restores what handlers of COMPLETED draw from, if the run had nothing left to do."""

    def run_has_ended(self) -> None:
        """Keeps what handlers have done in a run that had nothing left to do, for the next one."""


class ExactResumption(Resumption):
    """Goes on from a state that a `DeterministicEngine` wrote, and proves it.

    Args:
        state: what `state_dict` returned.
        engine: whose run goes on; it has taken the counters and limits already.
    """

    def __init__(self, state: Mapping[str, Any], engine: RecordingEngine) -> None:
        super().__init__(own_part(state, engine.backend), engine)
        # Whether this rank has no random states to go on with, and is seeded where it goes on.
        self._reseeds = self.snapshot["rng_states"] is None
        if self._reseeds:
            self.snapshot["rng_states"] = random_states(engine.backend)
        # What was loaded, as it was when runs were passed by that the state has behind it.
        self._before_its_run: LaidOver | None = None
        # Whether the state's own run was passed by, too: all of it was done already.
        self._another_run = False
        # What was loaded, as it was before handlers of a beginning that fires once more.
        self._before_handlers: LaidOver | None = None
        # What of the structure was put back before these.
        self._put_back: list[str] = []
        # What there was as the state was loaded, of the settings of what is trained.
        self._loaded = settings_of(engine._made, engine._step, live=True)
        world = World() if engine.backend is None else engine.backend.world
        self._processes = state["environment"]["world size"], world.size
        # Whether the batch before was compared before these, since they may change the data.
        self._compared = False

    @property
    def is_of_ended_epoch(self) -> bool:
        """Whether the state was taken when its epoch had ended."""
        return bool(self.snapshot["progress"]["ended"])

    @property
    def _at_beginning(self) -> bool:
        return self.is_of_ended_epoch or self.snapshot["progress"]["done"] == 0

    # ------------------------------------------------------------ 1. the run goes on

    def take_up(self) -> None:
        """Restores what comes before the data: the step's and the backend's state, the place."""
        engine, snapshot = self._engine, self.snapshot
        self._pass_by()
        self._restore_place()
        shown = snapshot.get("shown", {"output": None, "metrics": {}})
        engine.state.raw_output = shown["output"]
        engine.state.metrics = {**shown["metrics"], **engine.state.metrics}
        for name, count in shown.get("counts", {}).items():
            setattr(engine.state, name, count)
        self._before_handlers = None
        # In another run than the state's, what its handlers of STARTED do has not been done.
        if not self._another_run and any(
            map(engine.has_users_handler, (Events.STARTED, Events.EPOCH_STARTED))
        ):
            self._before_handlers = LaidOver(engine.loaded_with)
        self._put_back = self._restore_structure().put_back
        now = engine._environment()
        if snapshot["environment"]["backend"] != now["backend"]:
            # From here on it is one of this backend, should it be asked for or taken up again.
            self.snapshot = port(snapshot, engine.backend, engine._step, now)
        else:
            report_differences(snapshot["environment"], now)
            load_step(engine._step, snapshot["step"])
            if engine.backend is not None:
                engine.backend.load_state_dict(snapshot["backend"])
        restore_left(shown.get("gradients", {}), engine._recorded_objects())

    def _pass_by(self) -> None:
        """Keeps what was loaded, or lays it over what the script has changed since.

        Of several runs with a limit each, the script does again what it does between them. Where
        the state is a later run's, what was done before that has been done to what it holds.
        """
        engine, snapshot = self._engine, self.snapshot
        state = engine.state
        own = all(snapshot.get(name) == vars(state)[name] for name in ("max_epochs", "max_iters"))
        if is_done(state) and not own:
            self._before_its_run = self._before_its_run or LaidOver(engine.loaded_with)
            return
        loaded, self._before_its_run = self._before_its_run, None
        if loaded is None:
            return
        self._restore_user_keys()
        if changed := loaded.lay():
            engine.proof.checked.append(
                f"{', '.join(changed)}: put back after the script had changed it between its runs"
            )

    def _restore_user_keys(self) -> None:
        """Sets the attributes of the engine's state that are saved by name."""
        for key in self._engine.state_dict_user_keys:
            setattr(self._engine.state, key, self.snapshot[key])

    def _restore_place(self) -> None:
        engine, progress = self._engine, self.snapshot["progress"]
        place = engine._place
        place.ended = progress["ended"]
        place.within = 0 if progress["ended"] else progress["done"]
        place.owed &= RUN_ENDS
        place.owed |= END_EPOCH * progress["ends"] | QUIET_EPOCH * progress["quiet"]
        if not (progress["ended"] or progress["ends"]):
            place.owed |= NO_BATCHES * (progress["done"] == engine.state.epoch_length)

    def _restore_structure(self, again: bool = False) -> Restored:
        """Puts back what no state_dict holds; tells nothing yet."""
        engine, snapshot = self._engine, self.snapshot
        if engine.checks.structure == "off" or "structure" not in snapshot:
            return Restored()
        objects = engine._recorded_objects()
        return engine._structure.restore(snapshot["structure"], objects, again)

    # ------------------------------------------------------------ 2. before STARTED

    def run_begins(self) -> None:
        """Gives loaders and engines of handlers what the state has of them."""
        engine, snapshot = self._engine, self.snapshot
        engine._unsaved.go_on(snapshot, engine._recorded_objects())
        if engine.restartable and engine._place.owed & RUN_ENDS:
            # It ends as it had ended: another run, of this process, would begin another epoch.
            engine.state.epoch = snapshot["progress"]["epoch"]
            left = {**snapshot["progress"], "ended": True, "ends": False, "quiet": False}
            self.snapshot = {**snapshot, "progress": left}
            restore_random_states(snapshot["rng_states"], engine.backend)

    # ------------------------------------------------------------ 3. before EPOCH_STARTED

    def epoch_begins(self) -> None:
        """Restores what handlers of EPOCH_STARTED see and draw from."""
        engine, position = self._engine, self.snapshot["position"]
        if not self._at_beginning:
            self._restore_beginning()
            return
        self._lay_over()
        self._settle_structure()
        if position is not None:
            self._compare_before_handlers(position)
            engine._cursor.prepare(position, engine.state.dataloader)
        restore_random_states(self.snapshot["rng_states"], engine.backend)

    def _restore_beginning(self) -> None:
        """Restores the random states that the epoch within which the run goes on began with."""
        engine, states = self._engine, self.snapshot.get("epoch_rng_states")
        if states is not None:
            restore_random_states(states, engine.backend)
        elif engine.has_users_handler(Events.EPOCH_STARTED):
            warn_user(
                "The run goes on within an epoch, and the state does not hold the random states "
                "that the epoch began with on this rank: an older version wrote it, or another "
                "number of processes. Handlers of EPOCH_STARTED that draw random numbers, such as "
                "negatives for the epoch, draw others than before.",
                ResumeWarning,
            )

    def _lay_over(self) -> None:
        """Gives named objects back what the handlers of a resumed beginning have changed."""
        loaded, self._before_handlers = self._before_handlers, None
        if loaded is None:
            return
        self._restore_user_keys()
        if changed := loaded.lay():
            self._engine.proof.checked.append(
                f"{', '.join(changed)}: put back after handlers of the beginning had changed it"
            )

    def _settle_structure(self) -> None:
        """Puts it back over what handlers that fired again have changed, and tells."""
        found = self._restore_structure(again=True)
        found.put_back = list(dict.fromkeys(self._put_back + found.put_back))
        engine = self._engine
        found.tell(engine.proof, engine.checks.structure)
        self._compare_settings()

    def _compare_settings(self) -> None:
        """Tells what the script sets otherwise than when the run was saved."""
        engine = self._engine
        record, script = self.snapshot.get("structure", {}), engine._structure.made_with
        if engine.checks.settings == "off" or not script or not record.get("made with"):
            return
        now = settings_of(engine._made, engine._step, live=True)
        then = unpacked(record["made with"])
        tell_changes(
            then,
            unpacked(script),
            self._loaded,
            now,
            engine.proof,
            engine.checks.settings,
            self._processes,
        )

    def _compare_before_handlers(self, position: Mapping[str, Any]) -> None:
        """Compares the batch before now, if handlers of EPOCH_STARTED may change the data."""
        engine = self._engine
        self._compared = False
        handled = engine.has_users_handler(Events.EPOCH_STARTED) and not self._another_run
        # Data that was exchanged once may be, by them, once more: compared where it is not.
        if not handled or position["exchanges"]:
            return
        data, strictness = engine.state.dataloader, engine.checks.batch_before
        strictness = "warn" if strictness == "error" else strictness
        with random_states_kept(engine.backend):
            self._compared = engine._cursor.check_before(
                position, data, engine._key, engine.proof, strictness
            )

    # ------------------------------------------------------------ 4. before the first batch

    def open_data(self, data: Any) -> None:
        """Opens the data where the state says, and restores the random states there."""
        engine = self._engine
        self._lay_over()
        if not self._at_beginning:
            self._settle_structure()
        if self.snapshot["position"] is None:
            # It was written before the run had come to its data.
            engine._cursor.open(data, engine._key)
            return
        if self._at_beginning:
            self._open_at_beginning(data)
        else:
            # EPOCH_STARTED fired once more, and what its handlers drew does not count.
            # The batch is for handlers of EPOCH_COMPLETED, if that is what comes next.
            engine.state.batch = self._go_to(data, engine.checks.batch_before)
            restore_random_states(self.snapshot["rng_states"], engine.backend)
        if self._reseeds:
            engine._cursor.seed_anew()

    def _open_at_beginning(self, data: Any) -> None:
        engine, position = self._engine, self.snapshot["position"]
        # They were restored before EPOCH_STARTED, whose handlers may have drawn.
        with random_states_kept(engine.backend):
            if self._another_run and not engine._cursor.fits(position, data):
                engine._cursor.go_on_with(position, data, engine._key)
                return
            strictness, why = engine.checks.batch_before, self._why_other_batch()
            if self._compared:
                strictness = "off"
            elif why is not None and position["exchanges"] and not self._another_run:
                strictness, why = "warn" if strictness == "error" else strictness, None
            self._go_to(data, strictness, why)

    def _why_other_batch(self) -> str | None:
        """Returns why the last batch of an epoch that has ended may differ now, if it may."""
        if self._another_run:
            return "it was another run's"
        if self._engine.has_users_handler(Events.EPOCH_STARTED):
            return "it is of the epoch before, and handlers of EPOCH_STARTED may change the data"
        return None

    def _go_to(self, data: Any, strictness: Strictness, other: str | None = None) -> Any:
        engine, position = self._engine, self.snapshot["position"]
        cursor, key, proof = engine._cursor, engine._key, engine.proof
        batch = cursor.go_to(position, data, key, proof, strictness, other)
        engine._unsaved.tell_of_workers(engine._recorded_objects(), position, cursor.flow)
        return batch

    # ------------------------------------------------------------ or nothing was left to do

    def run_ends(self) -> None:
        """Has the run end as the one that was saved did, if nothing was left to do."""
        if not self._engine.should_terminate:
            restore_random_states(self.snapshot["rng_states"], self._engine.backend)

    def run_has_ended(self) -> None:
        """Keeps what handlers have done in a run that had nothing left to do, for the next one."""
        engine = self._engine
        if engine._place.open or self._before_its_run is not None:
            return
        # What it tells of the structure was put back: what the script changes now is right. So is
        # what it makes anew, or has another trainer train, before the next run.
        made = self.snapshot.get("made")
        self.snapshot = {
            **{key: item for key, item in self.snapshot.items() if key != "structure"},
            "rng_states": random_states(engine.backend),
            "step": step_state(engine._step),
            "backend": None if engine.backend is None else engine.backend.state_dict(),
            **({} if made is None else {"made": {**made, "before the run": {}}}),
        }
        self._another_run = engine.restartable
