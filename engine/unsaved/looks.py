"""The order of looks: when a run looks for what no checkpoint holds, and what it tells then.

The user is told of each thing once, when a state is taken; what a resumed run finds of itself, as
soon as it finds it.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from crosstrain.engine.data.own_data import own_data
from crosstrain.engine.data.plain_values import plain_or_none
from crosstrain.engine.digest import attributes_of
from crosstrain.engine.events import Events
from crosstrain.engine.proof import Proof
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.structure import Structure

from .changed_values import Begun, Values
from .constants import Constants
from .drawn_from import unnamed_sources
from .gradients_read import reads_gradients
from .handlers_and_hooks import Attached
from .ignored import check_ignored, is_ignored, to_ignore, to_ignore_all
from .loaders_in_handlers import Fetched, who_fetches
from .made_again import LOOKS, MadeAgain, named
from .messages import (
    ATTACHED,
    CLOSED,
    FETCHED,
    FORGOTTEN,
    FOUND_BY_RESUMED,
    LOST,
    MADE_ANEW,
    MADE_OTHERWISE,
    NOT_MADE_AGAIN,
    NOT_MADE_BY_STEP,
    RACED,
    UNNAMED,
)
from .used import Used

if TYPE_CHECKING:
    from crosstrain.engine.data.flows import Dataflow
    from crosstrain.engine.engine import Engine


class Unsaved:
    """Finds, and tells, what a run uses that no checkpoint has; with unnamed='off', nothing.

    Wherever objects are asked for: modules and optimizers that are trained or saved, by name.
    """

    def __init__(self, engine: Engine) -> None:
        self._of = weakref.ref(engine)
        self._looked_for_sources = False
        # What the step and handlers refer to, as the run's first epoch begins.
        self._begun: Begun | None = None
        self._attached = Attached()
        self._made_again = MadeAgain()
        self._constants = Constants()
        # Whether this process's first step is to come, and after how many it looks once more.
        self._first_step, self._looks = False, 0
        self._told: set[str] = set()
        self._checked_ignored = False
        # The data, and which loaders handlers fetch from, it or others.
        self._fetches: tuple[Any, Fetched] | None = None
        # What a resumed run is to set once more as its epoch begins.
        self._set_by_epoch: dict[str, str] = {}

    @property
    def _engine(self) -> Engine:
        engine = self._of()
        assert engine is not None, "it is called by its engine alone"
        return engine

    @property
    def _off(self) -> bool:
        return self._engine.checks.unnamed == "off"

    def used(self, objects: Mapping[str, Any]) -> Used:
        """Returns what the run uses now, for the looks that are taken at once."""
        return Used(self._engine, objects)

    # ------------------------------------------------------------ in the course of a run

    def begin(self) -> None:
        """Forgets the run before."""
        self._begun = self._fetches = None
        self._attached.begin()
        self._made_again.begin()
        self._first_step = True

    def epoch_begins(self, objects: Mapping[str, Any]) -> None:
        """Notes what there is before the handlers of EPOCH_STARTED are called."""
        if self._off:
            return
        used = self.used(objects)
        if self._begun is None:
            now = Values(used)
            self._begun = now.begun()
            self._tell(self._new(self._constants.begin(now)), MADE_ANEW)
        self._attached.epoch_begins(used)

    def batches_begin(self, objects: Mapping[str, Any]) -> None:
        """Notes what there is after them."""
        expected, self._set_by_epoch = self._set_by_epoch, {}
        if self._off:
            return
        used = self.used(objects)
        if self._engine.has_users_handler(Events.EPOCH_STARTED):
            self._attached.batches_begin(used)
            self._made_again.batches_begin(used)
        if expected:
            found = self._made_again.set_otherwise(expected, Values(used))
            self._tell(self._new(found), MADE_OTHERWISE)

    @property
    def looks_after_steps(self) -> bool:
        """Whether something is to be looked at after the next step."""
        return (self._first_step or self._looks_again) and not self._off

    @property
    def _looks_again(self) -> bool:
        return self._looks > 0 and self._made_again.expects

    def step_done(self, objects: Mapping[str, Any], structure: Structure) -> None:
        """Looks at what the first steps of this process have made.

        At hooks and modules after the first; at what else a resumed run makes again after two.
        """
        used, now = self.used(objects), None
        if self._first_step:
            self._first_step = False
            if self._attached.has_made(used):
                now = Values(used)
                # What a new hook refers to is there from then on.
                if self._attached.keep_made(used, now.functions) and self._begun is not None:
                    self._begun.begin_new(now)
            self._tell(self._attached.not_made(used), NOT_MADE_BY_STEP)
            self._tell(structure.buffers_unlike(objects), MADE_OTHERWISE)
        if self._looks_again:
            self._looks -= 1
            self._tell(self._made_otherwise(now or Values(used)), MADE_OTHERWISE)
            if self._looks == 0:
                self._made_again.settle(self._engine.proof)
                proof = self._engine.proof
                self._engine.logger.info("After %s resumed iterations: %s.", LOOKS, proof)

    # ------------------------------------------------------------ when a state is taken

    def tell(
        self, used: Used, ended: bool, structure: Structure, flow: Dataflow | None
    ) -> dict[str, Any]:
        """Tells what a state that is taken now does not hold, unless it was told before.

        Args:
            used: what the run uses now.
            ended: whether the epoch has ended.
            structure: knows which hooks have not been made again.
            flow: knows what of the dataset is too large to save, if the data was opened.

        Returns:
            What the other engines that the run uses, such as an evaluator, have found last.
        """
        sources: list[str] = []
        if not self._looked_for_sources:
            self._looked_for_sources = True
            self._tell(sources := unnamed_sources(used), UNNAMED)
        engines: dict[str, Any] = {}
        now = None if self._begun is None else Values(used)
        if now is not None and self._begun is not None:
            self._tell(self._made_otherwise(now), MADE_OTHERWISE)
            self._constants.sift(now, self._begun)
            changed = self._made_again.sift(now, self._begun, self._told, ended)
            self._tell(self._new([*changed, *used.saved.left_out]), FORGOTTEN)
            engines = now.engines
        closed = (_closed(named(at), error) for at, error in used.closed.items())
        self._tell(self._new(closed), CLOSED)
        self._tell(self._new(self._attached.changed(used, ended)), ATTACHED)
        self._tell(structure.not_made_again(used.objects), NOT_MADE_AGAIN)
        lost: list[str] = []
        if flow is not None:
            flows = {"": flow, **{where: one.flow for where, one in used.sources.items()}}
            lost = [f"{name}{at}" for at, one in flows.items() if one for name in one.lost()]
            self._tell(self._made_again.sift_data(_datasets(used), lost), LOST)
            # Between two passes no worker fetches.
            if ended:
                del flows[""]
            raced = [f"{name}{at}" for at, one in flows.items() if one for name in one.raced()]
            self._tell(self._new(raced), RACED)
        if now is not None:
            self._check_ignored(used, now, [*sources, *lost])
        return {name: plain_or_none(one.state.metrics) or {} for name, one in engines.items()}

    def _check_ignored(self, used: Used, now: Values, found: Iterable[str]) -> None:
        """Refuses names of `Checks.ignored` that nothing has; once, and on rank 0.

        Other ranks may call less, such as no handler that logs.
        """
        ignored = self._engine.checks.ignored
        if ignored and not self._checked_ignored and this_rank() == 0:
            places = [*now.signatures, *now.objects]
            of_data = (
                f"{of}.{own}{comma}{source}"
                for (of, comma, source), part in _partitioned(used.data)
                for own in attributes_of(part)
            )
            known = [*found, *map(named, places), *map(named, used.closed), *of_data]
            known += [*self._attached.names(used), *self.fetched(used.objects).loaders]
            known += [*self._made_again.record(), *self._constants.unchanged, *used.states]
            check_ignored(ignored, [*known, *self._told])
        self._checked_ignored = True

    def reads_gradients(self, used: Used, within: Container[Any]) -> bool:
        """Tells whether a handler, but those of some events, or the data looks at gradients."""
        if self._off:
            return False
        handlers = (function for _, function in self._engine._handlers.all_functions(within))
        others = {**used.of_data, **used.held}
        return reads_gradients(used, (*handlers, *others.values()))

    def made(self) -> dict[str, Any]:
        """Returns what a resumed run is to make again, for the state."""
        return {
            "again": self._made_again.record(),
            "by the first step": self._attached.made,
            "as the epoch began": self._made_again.set_anew,
            "before the run": self._constants.unchanged,
        }

    # ------------------------------------------------------------ when a run goes on

    def go_on(self, snapshot: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
        """Gives loaders and engines that handlers use what a state has of them."""
        made = snapshot.get("made", {"again": {}, "by the first step": []})
        self._made_again.expect(made["again"])
        self._constants.expect(made.get("before the run", {}))
        self._attached.expect(made["by the first step"])
        self._set_by_epoch = dict(made.get("as the epoch began", {}))
        self._looks = LOOKS
        if snapshot["position"] is not None:
            # Before any handler fires that iterates over one of them.
            self.fetched(objects).go_on(snapshot["position"].get("loaders", {}))
        if shown := snapshot.get("shown", {}).get("engines"):
            # What an evaluator has found last is read until it runs again.
            for name, engine in Values(self.used(objects)).engines.items():
                engine.state.metrics = {**shown.get(name, {}), **engine.state.metrics}

    def fetched(self, objects: Mapping[str, Any]) -> Fetched:
        """Returns which loaders handlers may iterate over, the training's own among them."""
        if self._off:
            return Fetched()
        data = own_data(self._engine.state.dataloader)
        if self._fetches is None or self._fetches[0] is not data:
            self._fetches = data, who_fetches(self.used(objects), data)
        return self._fetches[1]

    def tell_of_workers(
        self, objects: Mapping[str, Any], position: Mapping[str, Any], flow: Dataflow | None
    ) -> None:
        """Says that a handler fetches, and draws otherwise with other workers than then."""
        fetched = self.fetched(objects)
        found = fetched.differences(position.get("loaders", {}))
        why = None if flow is None else flow.draws_by_workers()
        if why is not None and fetched.training is not None:
            why = f"it is a loader of the dataset that is trained on, and {why}"
            found.insert(0, (fetched.training, why))
        for where, why in found:
            if not is_ignored(where, self._engine.checks.ignored):
                told = FETCHED.format(where, why, [to_ignore(where)])
                self._engine.proof.differs(told, "warn")

    # ------------------------------------------------------------ telling

    def _made_otherwise(self, now: Values) -> list[str]:
        found = self._made_again.differences(now)
        return self._new([*found, *self._made_again.differences_of_data(_datasets(now.used))])

    def _new(self, found: Iterable[str]) -> list[str]:
        new = [what for what in found if what not in self._told]
        self._told.update(new)
        return new

    def _tell(self, found: list[str], message: str) -> None:
        checks = self._engine.checks
        if found := [what for what in found if not is_ignored(what, checks.ignored)]:
            names = to_ignore_all(found)
            told = f"{message.format(_listed(found))}: checks=Checks(ignored={names!r})."
            proof = self._engine.proof if message in FOUND_BY_RESUMED else Proof()
            proof.differs(told, checks.unnamed)


def _datasets(used: Used) -> dict[str, Any]:
    """Returns those of the loaders that a position is kept of."""
    loaders = {"": own_data(used.engine.state.dataloader)}
    loaders |= {where: one.source for where, one in used.sources.items()}
    return {where: getattr(one, "dataset", None) for where, one in loaders.items()}


def _partitioned(parts: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], Any]]:
    return ((name.partition(","), part) for name, part in parts.items())


def _listed(found: Iterable[str]) -> str:
    """Returns what is told in one text, in which each owner stands once before what it uses."""
    of_owner: dict[str, list[str]] = {}
    for what in found:
        owner, its, used = what.rpartition(", its ")
        of_owner.setdefault(owner or what, []).extend([used] if its else [])
    return "; ".join(", its ".join([owner, *used]) for owner, used in of_owner.items())


def _closed(name: str, error: Exception) -> str:
    """Returns what could not be looked into, and why."""
    why = traceback.format_exception_only(error)[-1].strip()
    return f"{name} ({why[:200]})"
