"""What a run has made where it was missing: whether a resumed run makes it again, and equal.

A mask, a table, a cache that the first `forward` makes is in no checkpoint, and a resumed run makes
it once more. To warn of it would be in vain, to trust it would be a guess. So a state has digests
of such things, by where they are found, and a resumed run looks after its first and its second
iteration, and whenever it is saved, at what it has made: what is equal is proved, what is not is
told. What changes from one look to the next is not of this kind, and is told when it is saved.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Container, Iterable, Mapping
from functools import cached_property
from typing import Any, Final

import numpy
from torch.utils.data import DataLoader, Dataset, Sampler

from crosstrain.engine.digest import digest
from crosstrain.engine.events import Events
from crosstrain.engine.guards import is_a, is_others, module_of, own_attributes
from crosstrain.engine.nests import NESTS
from crosstrain.engine.proof import Proof
from crosstrain.engine.source.functions import is_installed, is_users_file, layers_of, methods_in
from crosstrain.engine.source.made_where_missing import is_made_lazily, is_read_by_key
from crosstrain.engine.source.makers import is_written_into
from crosstrain.engine.source.set_first import (
    is_variable_set_first,
    is_written_where_read,
    may_read,
)
from crosstrain.engine.source.tree import words_in

from .changed_values import Begun, Place, Values
from .contents_of_states import is_plain
from .set_anew import called_before, set_at
from .signatures import PLAIN, signature_of
from .used import Used

#: After so many iterations it is known whether what was made again stays what it is.
LOOKS: Final = 2
_KEYS: Final = 4096
# Digests, by the keys of a mapping or the places of a list; of anything else there is one.
_Digests = dict[str, str]


class MadeAgain:
    """Keeps digests of what is made where it was missing, and compares those of a run before."""

    def __init__(self) -> None:
        self._kept: dict[str, _Digests] = {}
        # By what they were taken, so that each is taken once.
        self._taken: dict[str, tuple[Any, _Digests]] = {}
        self._expected: dict[str, _Digests] = {}
        self._equal: set[str] = set()
        # What handlers of EPOCH_STARTED have set, by whose it is and its name.
        self._set: dict[tuple[int, str], Any] = {}
        # Of what they have set, and a run that goes on within the epoch sets once more, digests.
        self._anew: dict[str, str] = {}

    def begin(self) -> None:
        """Forgets what the run before in this process has made."""
        self._kept, self._taken, self._set, self._anew = {}, {}, {}, {}

    def expect(self, record: Mapping[str, Mapping[str, str]]) -> None:
        """Takes what the run had made whose state is gone on from, as of `record`."""
        self._expected = {name: dict(found) for name, found in record.items()}
        self._equal = set()

    @property
    def expects(self) -> bool:
        """Whether something was made that this run has not made again, or not looked at yet."""
        return bool(self._expected or self._equal)

    def record(self) -> dict[str, _Digests]:
        """Returns the digests of what was made, by name, for a state."""
        return {**self._expected, **{name: dict(found) for name, found in self._kept.items()}}

    def batches_begin(self, used: Used) -> None:
        """Notes what handlers of EPOCH_STARTED have set."""
        self._set = {
            (id(holder), name): signature_of(own[name])
            for holder, name in set_at(used, Events.EPOCH_STARTED)
            if name in (own := own_attributes(holder) or {})
        }

    def set_otherwise(self, expected: Mapping[str, str], now: Values) -> list[str]:
        """Returns the names of what they have set, and that is other than `set_anew` had it."""
        found = {named(place): value for place, value in now.values.items()}
        return [
            name for name, then in expected.items() if name in found and digest(found[name]) != then
        ]

    @property
    def set_anew(self) -> dict[str, str]:
        """Digests of what a run that goes on within this epoch sets once more, by name."""
        return dict(self._anew)

    def sift(
        self, now: Values, begun: Begun, told: Container[str], ended: bool = False
    ) -> list[str]:
        """Keeps the digests of what was made where it was missing; returns what is to be told.

        What was told before is not looked at, nor what is set before it is read.
        """
        left: list[str] = []
        self._anew = {}
        is_set = _SetAnew(now, self._set, ended)
        for place in now.changed(begun):
            if (name := named(place)) in told or _is_written_first(now, begun, place):
                continue
            if _is_made_by_data(now, place):
                continue
            if is_set.anew(place):
                if not ended and is_set.with_epoch(place):
                    self._anew[name] = digest(now.values[place])
                continue
            held = now.holder_of(place)
            if is_variable_set_first(held, now.functions) or now.is_only_shown(place):
                continue
            before, found = self._kept.pop(name, {}), self._digests_of(now, place)
            if found is None or not _goes_with(before, found) or not before.keys() <= found.keys():
                left.append(name)
                continue
            self._kept[name] = found
        return left

    def differences(self, now: Values) -> list[str]:
        """Returns the names of what was made again, and is other than it was."""
        differ: list[str] = []
        for place in now.values:
            if (then := self._expected.get(name := named(place))) is None:
                continue
            value = now.values[place]
            if value is None or (isinstance(value, NESTS) and not value):
                continue
            found = self._digests_of(now, place)
            if found is None or not _goes_with(then, found):
                differ.append(name)
                del self._expected[name]
                self._equal.discard(name)
            elif then.keys() & found.keys():
                self._equal.add(name)
        return differ

    def sift_data(self, datasets: Mapping[str, Any], lost: Iterable[str]) -> list[str]:
        """Does what `sift` does for what has changed of datasets and is in no state.

        Each of these names, such as `dataset.index`, is given once; what follows its comma says of
        which dataset it is.
        """
        left: list[str] = []
        for name in lost:
            found = _digests_of_data(datasets, name)
            if found is None:
                left.append(name)
            else:
                self._kept[name] = found
        return left

    def differences_of_data(self, datasets: Mapping[str, Any]) -> list[str]:
        """Does what `differences` does for datasets; what is equal is not looked at again."""
        differ: list[str] = []
        for name, then in list(self._expected.items()):
            found = _digests_of_data(datasets, name)
            if found is None:
                continue
            del self._expected[name]
            if found == then:
                self._kept[name] = found
                self._equal.add(name)
            else:
                differ.append(name)
        return differ

    def settle(self, proof: Proof) -> None:
        """Notes in a proof what was made again and is equal, and what was not made yet."""
        if self._equal:
            proof.checked.append(f"made again, and equal: {'; '.join(sorted(self._equal))}")
        if left := sorted(self._expected.keys() - self._equal):
            proof.unchecked.append(f"{'; '.join(left)}: not made again yet")

    def _digests_of(self, now: Values, place: Place) -> _Digests | None:
        """Returns the digests of what is made lazily; None for anything else."""
        value, signature, name = now.values.get(place), now.signatures.get(place), named(place)
        if place not in now.values or not isinstance(value, (*PLAIN, *NESTS)):
            return None
        if not is_made_lazily(place[1], now.functions, now.used.states):
            return None
        taken = self._taken.get(name)
        if taken is None or taken[0] != signature:
            if isinstance(value, (dict, list)) and 0 < len(value) <= _KEYS:
                items = value.items() if isinstance(value, dict) else enumerate(value)
                # A place of a list that nothing has been put into yet is none.
                filled = [one for one in items if isinstance(value, dict) or one[1] is not None]
                found = {f"[{key!r}]": digest(one) for key, one in filled}
            else:
                # Of a file that is mapped, some.
                mapped = isinstance(value, numpy.memmap)
                found = {"": digest(signature_of(value) if mapped else value)}
            taken = self._taken[name] = signature, found
        return taken[1]


class _SetAnew:
    """Tells what is set before it is read, wherever a run goes on from where it is now.

    Args:
        now: what there is.
        by_epoch: what handlers of EPOCH_STARTED have set in this epoch, by whose it is and its
            name: what they are compared by.
        ended: whether the epoch has ended.
    """

    def __init__(self, now: Values, by_epoch: Mapping[tuple[int, str], Any], ended: bool) -> None:
        self._now, self._by_epoch, self._ended = now, by_epoch, ended

    @cached_property
    def _with_iterations(self) -> set[tuple[int, str]]:
        return self._set_at(Events.ITERATION_STARTED)

    @cached_property
    def _with_epochs(self) -> set[tuple[int, str]]:
        return self._set_at(Events.EPOCH_STARTED)

    def _set_at(self, event: Events) -> set[tuple[int, str]]:
        used = self._now.used
        before = called_before(used, event) if (found := set_at(used, event)) else []
        return {
            (id(held[0]), held[1])
            for held in found
            if not any(may_read(one, held) for one in before)
        }

    def with_epoch(self, place: Place) -> bool:
        """Tells whether it is what the handlers of this epoch's beginning have set."""
        holder, name = self._now.holder_of(place)
        key = id(holder), name
        value = self._now.values.get(place, holder)
        if key not in self._with_epochs or not (isinstance(value, PLAIN) or is_plain(value)):
            return False
        return self._ended or self._by_epoch.get(key) == self._now.signatures[place]

    def anew(self, place: Place) -> bool:
        """Tells whether it is set before it is read."""
        holder, name = held = self._now.holder_of(place)
        if holder is None:
            return False
        if is_written_where_read(held, self._now.functions):
            return True
        return (id(holder), name) in self._with_iterations or self.with_epoch(place)


def _is_written_first(now: Values, begun: Begun, place: Place) -> bool:
    """Tells whether something was an empty mapping that is read by keys that have to be there."""
    if type(now.values.get(place)) is not dict or begun.signatures.get(place) != signature_of({}):
        return False
    return is_read_by_key(place[1], now.functions)


def _is_made_by_data(now: Values, place: Place) -> bool:
    """Tells whether data has made an object with a sample, such as a tokenizer or a reader.

    What data of an installed package keeps, and no user's function names, is that one's matter.
    """
    holder, name = now.holder_of(place)
    if not isinstance(holder, (DataLoader, Dataset, Sampler)):
        return False
    kind: Any = type(holder)
    if not (is_others(kind) or is_users_file(sys.modules.get(module_of(kind)))):
        users = (one for one in now.functions if not is_installed(one.__globals__))
        return not any(name in words_in(one.__code__) for one in users)
    if place in now.values:
        return False
    return is_made_lazily(place[1], now.functions, now.used.states)


def _digests_of_data(datasets: Mapping[str, Any], name: str) -> _Digests | None:
    """Returns the digest of a dataset's list or mapping that is made lazily; None if it is not.

    Of another mapping than a dictionary, such as a file that is opened with the first sample, it is
    that of the keys: the numbers are not read. One that is written into is another matter.
    """
    place, comma, where = name.partition(",")
    if not place.startswith("dataset."):
        return None
    dataset = datasets.get(comma + where)
    _, *path, own = place.split(".")
    for part in path:
        dataset = (own_attributes(dataset) or {}).get(part)
    value = (own_attributes(dataset) or {}).get(own)
    is_file = is_a(value, Mapping) and not is_a(value, dict)
    if not is_file and not isinstance(value, (list, dict)):
        return None
    functions = [one for each in methods_in(type(dataset)).values() for one in layers_of(each)]
    if not is_made_lazily(f"self.{own}", functions):
        return None
    if is_file and any(is_written_into(one.__code__, own) for one in functions):
        return None
    with contextlib.suppress(Exception):  # What is of another package may raise anything.
        return {"": digest(sorted(map(repr, value)) if is_file else value)} if value else None
    return None


def named(place: Place) -> str:
    """Returns what to call something that a function refers to."""
    owner, name = place
    return f"{owner}.{name}" if owner == "trainer.state" else f"{owner}, its {name!r}"


def _goes_with(then: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return all(now[key] == one for key, one in then.items() if key in now)
