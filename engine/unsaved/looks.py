"""When a run looks for what a resumed one would begin without or draw otherwise, and what it tells.

What the step and handlers refer to is compared with what it was when the run's first epoch began.
The user is told of each thing once, when a state is taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from crosstrain.engine.data.own_data import own_data
from crosstrain.engine.data.plain_values import plain_or_none
from crosstrain.engine.events import Events
from crosstrain.engine.proof import Proof
from crosstrain.engine.structure import Structure, named

from .added_attributes import Holders
from .changed_values import Forgotten
from .contents_of_states import Saved
from .drawn_from import functions_of, unnamed_sources
from .handlers_and_hooks import Attached
from .loaders_in_handlers import Fetched, who_fetches
from .made_again import LOOKS, MadeAgain, names_of_states
from .users_functions import functions_held, functions_of_trained, hooks_of_all

if TYPE_CHECKING:
    from crosstrain.engine.data.cursor import Cursor
    from crosstrain.engine.engine import Engine

_UNNAMED = (
    "A resumed run will draw other values from {}: that has a position or random states of its "
    "own, and no checkpoint holds them. Wrap it in ResumableSource and name that in to_save, or "
    "draw from the global generators. If what it gives is not used in training"
)
_FORGOTTEN = (
    "A resumed run will begin without what has changed of {}: the run reads it, and no checkpoint "
    "holds it. Name what has a state_dict, such as a scheduler or an average of the weights, in "
    "to_save; keep other things in an object that has one, or in trainer.state, with their names "
    "in trainer.state_dict_user_keys. If what is trained does not depend on it"
)
_ATTACHED = (
    "A resumed run will begin with the handlers, hooks and modules that the script sets up, and "
    "this one has changed {}. Attach handlers and hooks before the run, and have them ask how far "
    "it is (Events.X(after=...), trainer.state), or change the same in a handler of STARTED when "
    "trainer.state.iteration says so. If what is trained does not depend on it, or such a handler "
    "is there"
)
_NOT_MADE_AGAIN = (
    "The run that was saved had made hooks, as {} told, and this one has not made them again. "
    "Register them before the run. If what is trained does not depend on it"
)
_MADE_OTHERWISE = (
    "The run that was saved had made something for itself that no checkpoint holds, and this one "
    "has made it again with other contents: {}. Keep it in an object that is named in to_save, or "
    "make it before the run. If what is trained does not depend on it"
)
_NOT_MADE_BY_STEP = (
    "The first step of the run that was saved had made {}, and that of this one has not. Make it "
    "before the run. If what is trained does not depend on it"
)
_FOUND_BY_RESUMED = (_NOT_MADE_AGAIN, _MADE_OTHERWISE, _NOT_MADE_BY_STEP)
_LOST = (
    "A resumed run will begin without what has changed of {}: it is too large to be a part of the "
    "trainer's state. Keep it in an object that is named in to_save, or let a handler of "
    "EPOCH_STARTED make it anew. If what is trained on does not depend on it"
)
_RACED = (
    "A run gives other batches each time, because {} has been changed while workers fetch: that is "
    "memory which they share, and which batches have it as it was follows from how far ahead they "
    "are. Change it between two passes, in a handler of EPOCH_STARTED or EPOCH_COMPLETED. If what "
    "is fetched does not depend on it"
)
_FETCHED = (
    "A resumed run may draw other values once {}, has been iterated over: {}. Go on with that "
    "number of workers, or iterate there over a loader that keeps its num_workers. If nothing is "
    "fetched there: checks=Checks(unnamed='off')."
)


class Unsaved:
    """Finds, and tells, what a run uses that no checkpoint has; with unnamed='off', nothing.

    Wherever objects are asked for: modules and optimizers that are trained or saved, by name.
    """

    def __init__(self, engine: Engine) -> None:
        self._of = weakref.ref(engine)
        self._looked_for_sources = False
        # What the step and handlers refer to, as the run's first epoch begins.
        self._begun: Forgotten | None = None
        self._attached = Attached()
        self._made_again = MadeAgain()
        # Whether this process's first step is to come, and after how many it looks once more.
        self._first_step, self._looks = False, 0
        self._told: set[str] = set()
        # The data, and which loaders handlers fetch from, it or others.
        self._fetches: tuple[Any, Fetched] | None = None

    @property
    def _engine(self) -> Engine:
        engine = self._of()
        assert engine is not None, "it is called by its engine alone"
        return engine

    # ------------------------------------------------------------ in the course of a run

    def begin(self) -> None:
        """Forgets the run before."""
        self._begun = self._fetches = None
        self._attached.begin()
        self._made_again.begin()
        self._first_step = True

    def epoch_begins(self, objects: Mapping[str, Any]) -> None:
        """Notes what there is before the handlers of EPOCH_STARTED are called."""
        if self._engine.checks.unnamed == "off":
            return
        if self._begun is None:
            self._begun = self._forgotten(objects).without_values()
        self._attached.epoch_begins(self._called(), objects)

    def batches_begin(self, objects: Mapping[str, Any]) -> None:
        """Notes what there is after them."""
        engine = self._engine
        if engine.checks.unnamed != "off" and engine.has_users_handler(Events.EPOCH_STARTED):
            self._attached.batches_begin(self._called(), objects)

    @property
    def looks_after_steps(self) -> bool:
        """Whether something is to be looked at after the next step."""
        looks = self._first_step or (self._looks > 0 and self._made_again.expects)
        return looks and self._engine.checks.unnamed != "off"

    def step_done(self, objects: Mapping[str, Any], structure: Structure) -> None:
        """Looks at what the first steps of this process have made.

        At hooks and modules after the first; at what else a resumed run makes again after two.
        """
        now: Forgotten | None = None
        if self._first_step:
            self._first_step = False
            if self._attached.has_made(objects):
                now = self._forgotten(objects)
                # What a new hook refers to is there from then on.
                if self._attached.keep_made(objects, now.functions) and self._begun is not None:
                    self._begun.begin_new(now)
            self._tell(self._attached.not_made(objects), _NOT_MADE_BY_STEP)
            self._tell(structure.buffers_unlike(objects), _MADE_OTHERWISE)
        if self._looks > 0 and self._made_again.expects:
            self._looks -= 1
            now = now or self._forgotten(objects)
            self._tell(self._made_otherwise(now), _MADE_OTHERWISE)
            if self._looks == 0:
                self._made_again.settle(self._engine.proof)
                proof = self._engine.proof
                self._engine.logger.info("After %s resumed iterations: %s.", LOOKS, proof)

    # ------------------------------------------------------------ when a state is taken

    def tell(
        self, objects: Mapping[str, Any], ended: bool, structure: Structure, cursor: Cursor
    ) -> dict[str, Any]:
        """Tells what a state that is taken now does not hold, unless it was told before.

        Args:
            objects: modules and optimizers, by name.
            ended: whether the epoch has ended.
            structure: knows which hooks have not been made again.
            cursor: knows what of the dataset is too large to save.

        Returns:
            What the other engines that the run uses, such as an evaluator, have found last.
        """
        if not self._looked_for_sources:
            self._looked_for_sources = True
            named, saved = self._named_elsewhere(), self._saved()
            held = self._holders(objects).values_used_by
            found = unnamed_sources(self._functions(objects), named | saved.held, held)
            found += [where for one, where in saved.sources.items() if one not in named]
            self._tell(found, _UNNAMED)
        engines: dict[str, Any] = {}
        if self._begun is not None:
            now = self._forgotten(objects)
            self._tell(self._made_otherwise(now), _MADE_OTHERWISE)
            changed = self._made_again.sift(now, self._begun, self._told)
            self._tell(self._new([*changed, *now.left_out]), _FORGOTTEN)
            engines = now.engines
        attached = self._attached.changed(self._called(), objects, ended)
        self._tell(self._new(attached), _ATTACHED)
        self._tell(structure.not_made_again(objects), _NOT_MADE_AGAIN)
        lost = self._made_again.sift_data(self._dataset(), cursor.lost())
        self._tell(lost, _LOST)
        # Between two passes no worker fetches.
        self._tell(self._new([] if ended else cursor.raced()), _RACED)
        return {name: plain_or_none(one.state.metrics) or {} for name, one in engines.items()}

    def made(self) -> dict[str, Any]:
        """Returns what a resumed run is to make again, for the state."""
        return {"again": self._made_again.record(), "by the first step": self._attached.made}

    def _made_otherwise(self, now: Forgotten) -> list[str]:
        found = self._made_again.differences(now)
        return self._new([*found, *self._made_again.differences_of_data(self._dataset())])

    def _dataset(self) -> Any:
        return getattr(own_data(self._engine.state.dataloader), "dataset", None)

    def _new(self, found: Iterable[str]) -> list[str]:
        new = [what for what in found if what not in self._told]
        self._told.update(new)
        return new

    def _tell(self, found: list[str], message: str) -> None:
        if found:
            told = f"{message.format('; '.join(found))}: checks=Checks(unnamed='off')."
            # What a resumed run has found of itself stands in its proof.
            proof = self._engine.proof if message in _FOUND_BY_RESUMED else Proof()
            proof.differs(told, self._engine.checks.unnamed)

    # ------------------------------------------------------------ when a run goes on

    def go_on(self, snapshot: Mapping[str, Any], objects: Mapping[str, Any]) -> None:
        """Gives loaders and engines that handlers use what a state has of them."""
        made = snapshot.get("made", {"again": {}, "by the first step": []})
        self._made_again.expect(made["again"])
        self._attached.expect(made["by the first step"])
        self._looks = LOOKS
        if snapshot["position"] is not None:
            # Before any handler fires that iterates over one of them.
            self.fetched(objects).go_on(snapshot["position"].get("loaders", {}))
        if shown := snapshot.get("shown", {}).get("engines"):
            # What an evaluator has found last is read until it runs again.
            for name, engine in self._forgotten(objects).engines.items():
                engine.state.metrics = {**shown.get(name, {}), **engine.state.metrics}

    def fetched(self, objects: Mapping[str, Any]) -> Fetched:
        """Returns which loaders handlers may iterate over, the training's own among them."""
        engine = self._engine
        if engine.checks.unnamed == "off":
            return Fetched()
        data = own_data(engine.state.dataloader)
        if self._fetches is None or self._fetches[0] is not data:
            self._fetches = data, who_fetches(self._functions(objects), data, {id(engine)})
        return self._fetches[1]

    def tell_of_workers(
        self, objects: Mapping[str, Any], position: Mapping[str, Any], cursor: Cursor
    ) -> None:
        """Says that a handler fetches, and draws otherwise with other workers than then."""
        fetched = self.fetched(objects)
        found = fetched.differences(position.get("loaders", {}))
        if (why := cursor.draws_by_workers()) is not None and fetched.training is not None:
            why = f"it is a loader of the dataset that is trained on, and {why}"
            found.insert(0, (fetched.training, why))
        for where, why in found:
            self._engine.proof.differs(_FETCHED.format(where, why), "warn")

    # ------------------------------------------------------------ what the run uses

    def _called(self) -> Iterator[tuple[str, Any, bool]]:
        """Yields the step and the handlers, what to call each, and whether it lasts."""
        yield "the step", self._engine._process_function, True
        yield from self._engine._handlers.all_handlers()

    def _functions(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the run calls of the user's, by what to call it.

        The step, handlers, what fetches the data, and what named objects and models hold.
        """
        engine = self._engine
        functions: dict[str, Any] = {"the step": engine._process_function}
        for called, function in engine._handlers.all_functions():
            # Lambdas of one function are called alike.
            count = 1 + sum(one.startswith(called) for one in functions)
            functions[called if count == 1 else f"{called}, number {count}"] = function
        functions.update(functions_of(engine.state.dataloader))
        for value in engine.named_beside:
            functions.update(functions_held(value))
        return {**functions, **functions_of_trained(objects), **hooks_of_all()}

    def _named_elsewhere(self) -> set[int]:
        """Returns what a checkpoint has, by `id`."""
        engine = self._engine
        known = {id(engine.state.dataloader), id(engine)}
        saved = named(engine.objects, engine.saved_beside)
        for value in (*engine.named_beside, *saved.values()):
            if id(value) in known:
                continue
            known.add(id(value))
            if isinstance(value, torch.nn.Module):
                parts = (*value.modules(), *value.parameters(), *value.buffers())
                known |= {id(part) for part in parts}
        return known

    def _saved(self) -> Saved:
        """Divides what named objects hold into what goes on with them and what may not."""
        engine = self._engine
        return Saved([*engine.named_beside, *named(engine.objects, engine.saved_beside).values()])

    def _holders(self, objects: Mapping[str, Any]) -> Holders:
        """Returns what handlers get or refer to, and on which users keep things of their own."""
        engine = self._engine
        holders = {**objects, "trainer": engine, "trainer.state": engine.state}
        return Holders(holders, engine.state_dict_user_keys, _recorded(objects))

    def _forgotten(self, objects: Mapping[str, Any]) -> Forgotten:
        saved, functions = self._saved(), self._functions(objects)
        known = self._named_elsewhere() | saved.held
        holders, recorded = self._holders(objects), _recorded(objects)
        found = Forgotten(functions, known, holders, recorded, saved)
        found.states = lambda: names_of_states(objects)
        return found


def _recorded(objects: Mapping[str, Any]) -> set[int]:
    """Returns the modules and optimizers whose numbers and words are recorded, by `id`."""
    return {
        id(one)
        for value in objects.values()
        for one in (value.modules() if isinstance(value, torch.nn.Module) else [value])
    }
