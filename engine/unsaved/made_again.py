"""What a run has made where it was missing: whether a resumed run makes it again, and equal.

A mask, a table, a cache that the first `forward` makes is in no checkpoint, and a resumed run makes
it once more. To warn of it would be in vain, to trust it would be a guess. So a state has digests
of such things, by where they are found, and a resumed run looks after its first and its second
iteration, and whenever it is saved, at what it has made: what is equal is proved, what is not is
told. What changes from one look to the next is not of this kind, and is told when it is saved.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, Final

from crosstrain.engine.digest import digest
from crosstrain.engine.guards import own_attributes
from crosstrain.engine.proof import Proof

from .changed_values import Begun, Place, Values
from .functions import layers_of, methods_in
from .made_where_missing import is_made_lazily, is_read_by_key
from .signatures import NESTS, PLAIN, signature_of

#: After so many iterations it is known whether what was made again stays what it is.
LOOKS: Final = 2
_KEYS: Final = 4096
# Digests, by the keys of a mapping; of anything else there is one.
_Digests = dict[str, str]


class MadeAgain:
    """Keeps digests of what is made where it was missing, and compares those of a run before."""

    def __init__(self) -> None:
        self._kept: dict[str, _Digests] = {}
        # By what they were taken, so that each is taken once.
        self._taken: dict[str, tuple[Any, _Digests]] = {}
        self._expected: dict[str, _Digests] = {}
        self._equal: set[str] = set()

    def begin(self) -> None:
        """Forgets what the run before in this process has made."""
        self._kept, self._taken = {}, {}

    def expect(self, record: Mapping[str, Mapping[str, str]]) -> None:
        """Takes what the run had made whose state is gone on from, as of `record`."""
        self._expected = {name: dict(found) for name, found in record.items()}
        self._equal = set()

    @property
    def expects(self) -> bool:
        """Whether something was made that this run has not made again, or not looked at yet."""
        return bool(self._expected)

    def record(self) -> dict[str, _Digests]:
        """Returns the digests of what was made, by name, for a state."""
        return {**self._expected, **{name: dict(found) for name, found in self._kept.items()}}

    def sift(self, now: Values, begun: Begun, told: Container[str]) -> list[str]:
        """Keeps the digests of what was made where it was missing; returns what is to be told.

        What was told before is not looked at.
        """
        left: list[str] = []
        for place in now.changed(begun):
            if (name := named(place)) in told or _is_written_first(now, begun, place):
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

    def sift_data(self, dataset: Any, lost: Iterable[str]) -> list[str]:
        """Does what `sift` does for what has changed of a dataset and is too large to save.

        Each of these names, such as `dataset.index`, is given once.
        """
        left: list[str] = []
        for name in lost:
            found = _digests_of_data(dataset, name)
            if found is None:
                left.append(name)
            else:
                self._kept[name] = found
        return left

    def differences_of_data(self, dataset: Any) -> list[str]:
        """Does what `differences` does for a dataset; what is equal is not looked at again."""
        differ: list[str] = []
        for name, then in list(self._expected.items()):
            found = _digests_of_data(dataset, name)
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
            if isinstance(value, dict) and 0 < len(value) <= _KEYS:
                found = {f"[{key!r}]": digest(one) for key, one in value.items()}
            else:
                found = {"": digest(value)}
            taken = self._taken[name] = signature, found
        return taken[1]


def _is_written_first(now: Values, begun: Begun, place: Place) -> bool:
    """Tells whether something was an empty mapping that is read by keys that have to be there."""
    if type(now.values.get(place)) is not dict or begun.signatures.get(place) != signature_of({}):
        return False
    return is_read_by_key(place[1], now.functions)


def _digests_of_data(dataset: Any, name: str) -> _Digests | None:
    """Returns the digest of a dataset's list or mapping that is made lazily; None if it is not."""
    head, _, own = name.rpartition(".")
    value = (own_attributes(dataset) or {}).get(own) if head == "dataset" else None
    if not isinstance(value, (list, dict)) or not value:
        return None
    functions = [one for each in methods_in(type(dataset)).values() for one in layers_of(each)]
    return {"": digest(value)} if is_made_lazily(f"self.{own}", functions) else None


def named(place: Place) -> str:
    """Returns what to call something that a function refers to."""
    owner, name = place
    return f"{owner}.{name}" if owner == "trainer.state" else f"{owner}, its {name!r}"


def _goes_with(then: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return all(now[key] == one for key, one in then.items() if key in now)
