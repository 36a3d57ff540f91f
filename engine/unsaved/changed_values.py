"""Values that the step and handlers change, and read again, and that no checkpoint has.

A scheduler, an average of the weights, a counter in a closure, a best loss, an attribute of
`trainer.state`: whatever is changed in the course of a run, and looked at later, is what a resumed
run begins without, unless it is named. What is only appended to, added to or printed is taken for a
log, also where its length or its values decide no more than what it takes next. Of an object that a
function reaches, what it uses is looked at, and what the methods use that it calls. Changes are
found by comparing with what there was when the run's first epoch began: the handlers of STARTED,
which fire once more on a resume, have then done their part. What a clock has shown since decides no
weights, and is left out.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from crosstrain.engine.digest import attributes_of
from crosstrain.engine.dispatch import Dispatcher
from crosstrain.engine.guards import is_a, module_of
from crosstrain.engine.nests import SCALARS, is_module
from crosstrain.engine.source.functions import is_users_file, layers_of
from crosstrain.engine.source.only_shown import OnlyShown
from crosstrain.engine.source.set_first import Held
from crosstrain.engine.source.tree import words_in
from crosstrain.engine.source.uses import ALL, Use, attributes_used
from crosstrain.engine.spread import lasting_tensors
from crosstrain.engine.state import State
from crosstrain.engine.structure import keeps_groups

from .clocks import Clocks, ClocksSince
from .contents_of_states import tensors_in
from .functions import FETCHES, TRAINED
from .signatures import signature_of, state_signature_of
from .used import Used
from .walk import DEPTH, Walk

_FETCHES: Final = frozenset(Use((method,), True) for method in FETCHES)
#: Whose something is, a function's as a rule, and what that calls it.
Place = tuple[str, str]


@dataclass
class Begun:
    """What there was when a run began.

    Args:
        signatures: of what functions read, by where they find it.
        functions: what these were called.
        clocks: what the process's clocks showed.
    """

    signatures: dict[Place, Any]
    functions: set[str]
    clocks: Clocks

    def begin_new(self, now: Values) -> None:
        """Counts what functions refer to that are new now as there from the beginning."""
        new = tuple(now.used.functions.keys() - self.functions)
        self.functions |= now.used.functions.keys()
        for place, signature in now.signatures.items():
            if place[0].startswith(new):
                self.signatures.setdefault(place, signature)


class Values(Walk):
    """Finds the values that functions read, and tells which have changed; for one look only."""

    def __init__(self, used: Used) -> None:
        super().__init__(used)
        #: By where they are found: what they are compared by, and those that are plain themselves.
        self.signatures: dict[Place, Any] = {}
        self.values: dict[Place, Any] = {}
        #: Objects whose state is looked at, by where they are found.
        self.objects: dict[Place, Any] = {}
        #: Tensors of a module that no state has, where a part of it is saved.
        self.left_out: dict[Place, list[Any]] = {}
        self._holders_of: dict[Place, Held] = {}
        #: Other engines that the run uses, such as an evaluator, by where they were found.
        self.engines: dict[str, Any] = {}
        # Of what was found, what a named object's state has now.
        self._goes_on: set[Place] = set()
        # pytorch-ignite's: a state only where something reads what they come to.
        self._metrics: dict[Place, Any] = {}
        self.from_functions(used.functions)
        for place, part in used.data.items():
            kind: Any = type(part)
            # What those of installed packages keep, such as h5py's of a file, is theirs.
            if is_users_file(sys.modules.get(module_of(kind))):
                self._class(kind, f"the {place}", kind.__name__, DEPTH, _FETCHES)
            for name, value in attributes_of(part).items():
                if is_a(value, DataLoader, Dataset):
                    self.value(value, f"the {place}", name, DEPTH, ALL)
        for name, tensors in used.left_out.items():
            where: Place = name, "parameters and buffers that are not saved"
            self.signatures[where] = [(one.data_ptr(), one._version) for one in tensors]
            self.left_out[where] = tensors
        if self._reads_metrics():
            self.signatures |= self._metrics

    def begun(self) -> Begun:
        """Returns what a later look is compared with."""
        return Begun(self.signatures, {*self.used.functions}, Clocks())

    def changed(self, before: Begun) -> list[Place]:
        """Returns what is other than it was before: its owner, and what that calls it."""
        # What is reached by another way than then, such as another handler, need not have changed.
        known = [(name, signature) for (_, name), signature in before.signatures.items()]
        clocks = ClocksSince(before.clocks, self.functions)

        def is_as_before(place: tuple[str, str], signature: Any) -> bool:
            if isinstance(signature, _OneOf):
                # Another is missed where there was one; what was nothing yet is set when it is due.
                was = before.signatures.get(place)
                return was == signature or not isinstance(was, _OneOf)
            if place in before.signatures:
                return bool(before.signatures[place] == signature)
            return (place[1], signature) in known

        found = [
            self._object_of(place, before)
            for place, signature in self.signatures.items()
            if signature is not None
            and place not in self._goes_on
            and not is_as_before(place, signature)
            and not clocks.gave(self.values.get(place))
        ]
        return [one for one in dict.fromkeys(found) if not self._is_in_states(one, before)]

    def _is_in_states(self, place: Place, before: Begun) -> bool:
        """Tells whether what has changed there lies in what a named object's state holds."""
        value: Any = self.values.get(place, self.objects.get(place))
        if is_module(value):
            then = before.signatures.get(place) or ()
            now = zip(lasting_tensors(value), self.signatures[place], strict=True)
            return self._saved.hold([one for one, mark in now if mark not in then])
        return self._saved.hold(tensors_in(value))

    def _object_of(self, place: Place, before: Begun) -> Place:
        """Returns where an object is that has come instead of a plain value, for what it holds."""
        owner, name = place
        for index, letter in enumerate(name):
            outer = owner, name[:index]
            if letter == "." and outer in before.signatures and outer not in self.signatures:
                return outer
        return place

    def is_only_shown(self, place: Place) -> bool:
        """Tells whether a plain value is shown to somebody, and does nothing else."""
        return place in self.values and self._shown.tells(self.holder_of(place), self.values[place])

    @cached_property
    def _shown(self) -> OnlyShown:
        bindings = [one for slot in self.used.engine._handlers for one in slot.bindings()]
        handlers = _codes_of(handler for handler, _, _ in bindings)
        filters = _codes_of(
            extra[2][-1] for _, _, extra in bindings if extra is not None and extra[2] is not None
        )
        called = _codes_of(self.used.functions.values())
        roots = (called - handlers) | filters
        return OnlyShown(self.functions, self.kinds, handlers - filters, roots)

    def holder_of(self, place: Place) -> Held:
        """Returns whose attribute something is, and which; of a variable, nobody's."""
        return self._holders_of.get(place, (None, place[1]))

    # ------------------------------------------------------------ what is noted on the way

    def note_holder(self, holder: Any, attribute: str, owner: str, name: str) -> None:
        """Keeps whose attribute it is that is found there."""
        self._holders_of[owner, name] = holder, attribute

    def note(self, value: Any, owner: str, name: str) -> None:
        """Notes what a plain value, a collection or a function is now."""
        # A counter that is named lies in an object that is: its values are its own.
        if id(value) not in self._known:
            self.signatures[owner, name] = signature_of(value)
            self.values[owner, name] = value
            holder, _ = self._holders_of.get((owner, name), (None, name))
            if id(value) in self._saved.contents or self._has_number(holder, value):
                self._goes_on.add((owner, name))

    def _has_number(self, holder: Any, value: Any) -> bool:
        """Tells whether a number or word is one that the state of a named object has now."""
        named = id(holder) in self._known or id(holder) in self._saved.inside
        # What users set on these is in no state, whatever else is.
        named = named and not is_a(holder, *TRAINED, Dispatcher, State)
        return isinstance(value, SCALARS) and named and self._saved.has(holder, value)

    def note_one_of(self, value: Any, owner: str, name: str) -> None:
        """Notes which of the objects that are saved a variable stands for."""
        self.signatures[owner, name] = _OneOf(id(value))

    def note_state(self, value: Any, owner: str, name: str, depth: int) -> None:
        """Notes what the state of an object is now."""
        # Groups that are shared with one that is named are one no more once that has loaded a
        # state in a way of its own.
        parted = isinstance(value, Optimizer) and any(
            isinstance(one, Optimizer)
            and not (keeps_groups(one) or _hands_groups_on(one))
            and any(group is own for group in one.param_groups for own in value.param_groups)
            for one in self.used.named
        )
        self.signatures[owner, name] = state_signature_of(value, self._known, parted)
        self.objects[owner, name] = value

    def note_metric(self, value: Any, owner: str, name: str) -> None:
        """Notes what a metric has come to."""
        self._metrics[owner, name] = state_signature_of(value)

    def engine(self, engine: Any, where: str) -> None:
        """Notes another engine, and looks into what it calls."""
        self.engines[where] = engine
        # Its metrics begin with each of its runs.
        metrics, self._metrics = self._metrics, {}
        super().engine(engine, where)
        self._metrics = metrics

    def _reads_metrics(self) -> bool:
        """Tells whether a function that was looked into reads `state.metrics`."""
        return any(
            one.of == "state" and one.use.read
            for function in self.functions
            if self._metrics and "metrics" in words_in(function.__code__)
            for one in attributes_used(function.__code__).get("metrics", ())
        )


def _codes_of(functions: Iterable[Any]) -> set[types.CodeType]:
    return {layer.__code__ for one in functions for layer in layers_of(one)}


def _hands_groups_on(optimizer: Optimizer) -> bool:
    """Tells whether loading a state gives the groups to another, such as the one inside SAM."""
    does = dis.get_instructions(type(optimizer).load_state_dict)
    return any(one.opname == "STORE_ATTR" and one.argval == "param_groups" for one in does)


@dataclass(frozen=True)
class _OneOf:
    """Stands for one of several objects that are saved: which of them is what a variable tells."""

    #: Its `id`.
    identity: int
