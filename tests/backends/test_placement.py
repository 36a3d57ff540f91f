"""`put` moves every tensor of a batch, whatever holds it, and changes nothing else."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crosstrain import backends
from crosstrain.backends.placement import map_tensors

# A device that is on every machine and is not the CPU: a move to it shows.
META = torch.device("meta")


def moved(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.to(META))


class Pair(NamedTuple):
    x: Any
    y: Any


Point = namedtuple("Point", ["x", "y"])


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    name: str = "a"
    parts: list[torch.Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    count: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: torch.Tensor
    double: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "double", self.x * 2)


class Titled(dict[str, Any]):
    title = "none"


class Stored(Mapping[str, Any]):
    """A mapping with a store of its own, which a shallow copy would share."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self.store = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class Awkward(Stored):
    def __init__(self, size: int, items: Mapping[str, Any]) -> None:
        super().__init__(items)
        self.size = size


class Boxed(tuple[Any, ...]):
    __slots__ = ()


def one() -> torch.Tensor:
    return torch.ones(2)


def is_moved(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device == META


@pytest.mark.parametrize("value", ["text", b"bytes", 3, 2.5, True, None, 1j, object, torch.Tensor])
def test_what_is_no_container_comes_back_itself(value: Any) -> None:
    assert moved(value) is value


def test_plain_containers() -> None:
    batch = {"x": [one(), (one(), "label")], 3: one(), "none": None}
    result = moved(batch)
    assert list(result) == ["x", 3, "none"]
    assert type(result["x"]) is list
    assert type(result["x"][1]) is tuple
    assert is_moved(result["x"][0])
    assert is_moved(result["x"][1][0])
    assert result["x"][1][1] == "label"
    assert is_moved(result[3])
    assert not is_moved(batch["x"][0]), "the batch itself was changed"


@pytest.mark.parametrize("kind", [Pair, Point])
def test_named_tuples(kind: Any) -> None:
    result = moved(kind(one(), [one()]))
    assert type(result) is kind
    assert is_moved(result.x)
    assert is_moved(result.y[0])


def test_subclasses_of_containers() -> None:
    assert type(moved(Boxed([one()]))) is Boxed
    assert moved(torch.Size([2, 3])) == torch.Size([2, 3])
    assert isinstance(moved(torch.Size([2, 3])), torch.Size)
    values = torch.max(torch.ones(2, 2), dim=0)
    assert type(moved(values)) is type(values)
    assert is_moved(moved(values).indices)


def test_mappings_keep_their_kind_and_what_else_they_hold() -> None:
    ordered = moved(OrderedDict(b=one(), a=1))
    assert type(ordered) is OrderedDict
    assert list(ordered) == ["b", "a"]
    default: defaultdict[str, Any] = defaultdict(list, x=one())
    assert moved(default)["missing"] == []
    titled = Titled(x=one())
    titled.title = "mine"
    result = moved(titled)
    assert type(result) is Titled
    assert result.title == "mine"
    assert is_moved(result["x"])
    assert not is_moved(titled["x"])
    user = UserDict(x=one())
    assert type(moved(user)) is UserDict
    assert is_moved(moved(user)["x"])
    assert not is_moved(user["x"])
    proxy = MappingProxyType({"x": one()})
    assert type(moved(proxy)) is MappingProxyType
    assert is_moved(moved(proxy)["x"])


def test_a_mapping_of_another_library_is_made_anew() -> None:
    stored = Stored({"x": one(), "n": 1})
    result = moved(stored)
    assert type(result) is Stored
    assert is_moved(result["x"])
    assert not is_moved(stored["x"]), "the copy shares its store with the batch"


def test_a_mapping_that_cannot_be_made_anew_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"a Awkward, which is a mapping.*method `to\(device\)`"):
        moved({"inner": Awkward(1, {"x": one()})})


@pytest.mark.parametrize("kind", [Sample, Frozen, Slotted])
def test_dataclasses(kind: Any) -> None:
    original = kind(one())
    result = moved(original)
    assert type(result) is kind
    assert is_moved(result.x)
    assert not is_moved(original.x)


def test_fields_of_a_dataclass_that_no_argument_sets() -> None:
    assert is_moved(moved(Slotted(one())).double)


def test_a_nested_dataclass() -> None:
    result = moved([Sample(one(), "b", [one()])])
    assert result[0].name == "b"
    assert is_moved(result[0].parts[0])


def test_a_packed_sequence_moves_as_one() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    result = moved([packed])[0]
    assert type(result) is type(packed)
    assert is_moved(result.data)
    # Lengths stay on the CPU, where torch wants them.
    assert not is_moved(result.batch_sizes)


def test_any_object_with_a_method_to_moves_itself() -> None:
    class Graph:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def to(self, device: torch.device) -> Graph:
            return Graph(device)

    result = moved((Graph(torch.device("cpu")),))[0]
    assert result.device == META


def test_put_keeps_values_and_aliases_nothing_that_it_need_not() -> None:
    batch = {"x": torch.arange(3), "y": [torch.tensor(1.5)]}
    put = backends.get("cpu").open().put(batch)
    assert torch.equal(put["x"], torch.arange(3))
    assert put["y"][0].item() == 1.5
    assert put is not batch


leaves = st.one_of(st.just("tensor"), st.integers(), st.text(), st.none(), st.booleans())
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=12,
)


def plant(value: Any) -> Any:
    """Puts a tensor where the drawn nest says `tensor`."""
    if value == "tensor":
        return one()
    if isinstance(value, Pair):
        return Pair(plant(value.x), plant(value.y))
    if isinstance(value, (list, tuple)):
        return type(value)(plant(item) for item in value)
    if isinstance(value, dict):
        return {key: plant(item) for key, item in value.items()}
    return value


def uproot(value: Any) -> Any:
    """Undoes `plant`, if every tensor is where it should be."""
    if isinstance(value, torch.Tensor):
        assert value.device == META
        return "tensor"
    if isinstance(value, Pair):
        return Pair(uproot(value.x), uproot(value.y))
    if isinstance(value, (list, tuple)):
        return type(value)(uproot(item) for item in value)
    if isinstance(value, dict):
        return {key: uproot(item) for key, item in value.items()}
    return value


@given(nests)
def test_any_nest_keeps_its_structure(nest: Any) -> None:
    assert uproot(moved(plant(nest))) == nest
