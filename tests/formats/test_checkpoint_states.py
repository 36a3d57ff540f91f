"""What a state may hold: whatever is written is read again with weights_only=True, bit for bit."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crosstrain.engine import CheckpointContentError, DiskSaver
from crosstrain.engine.formats.safe_load import load_file

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    - {dtype for dtype in vars(torch).values() if str(dtype).startswith("torch.q")},
    key=str,
)


def through_disk(folder: Path, state: Any, *, background: bool = False) -> Any:
    """Writes a state, reads it by ours and by a bare torch.load, and returns it."""
    with DiskSaver(folder, require_empty=False, background=background) as saver:
        saver(state, "state.pt")
    loaded = load_file(folder / "state.pt").state
    assert identical(torch.load(folder / "state.pt", weights_only=True), loaded)
    return loaded


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns what makes a tensor: type, shape, and the bytes of its elements."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype)
    dense.copy_(tensor)
    raw = bytes(dense.untyped_storage())
    return tensor.dtype, tuple(tensor.shape), raw


def identical(one: Any, other: Any) -> bool:
    """Tells whether two plain states are the same, types and bits included."""
    if type(one) is bytearray and type(other) is bytes:
        # The one plain value that cannot be written as it is: empty bytes.
        return not one and not other
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return bits(one) == bits(other)
    if isinstance(one, dict):
        keys = list(one) == list(other) and list(map(type, one)) == list(map(type, other))
        return keys and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return bool(one == other)


KEYS = st.one_of(
    st.text(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.binary(min_size=1),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**2000), 2**2000),
    st.floats(),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(),
    st.binary().map(bytearray),
    st.sets(st.one_of(st.text(), st.integers()), max_size=5),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.Size([2, 3])]),
    st.lists(st.integers(0, 4), max_size=3).map(lambda shape: torch.randn(shape)),
)
NESTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(st.text(), inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=25,
)


@given(state=NESTS, background=st.booleans())
@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_nest_of_plain_types(
    tmp_path_factory: pytest.TempPathFactory, state: Any, background: bool
) -> None:
    folder = tmp_path_factory.mktemp("states")
    loaded = through_disk(folder, {"state": state}, background=background)
    assert identical(loaded, {"state": state})


@pytest.mark.parametrize("background", [False, True])
def test_each_dtype_and_layout(tmp_path: Path, background: bool) -> None:
    assert len(DTYPES) >= 20
    state: dict[str, Any] = {}
    for dtype in DTYPES:
        try:
            tensor = torch.empty(12, dtype=torch.uint8).random_(0, 2).to(dtype)
        except (RuntimeError, NotImplementedError):
            # Types of a few bits, which torch has the names of and nothing else.
            continue
        state[str(dtype)] = tensor
    assert len(state) >= 20
    matrix = torch.arange(24.0).reshape(4, 6)
    state |= {
        "transposed": matrix.t(),
        "strided": matrix[::2, ::3],
        "expanded": torch.ones(3, 1).expand(3, 5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "nan": torch.tensor([math.nan, -0.0, math.inf]),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "subclass": torch.ones(2).as_subclass(type("Named", (torch.Tensor,), {})),
    }
    loaded = through_disk(tmp_path, state, background=background)
    for name, tensor in state.items():
        assert bits(loaded[name]) == bits(tensor.detach().as_subclass(torch.Tensor)), name
        assert type(loaded[name]) is torch.Tensor
        assert not loaded[name].requires_grad
    # An optimizer's states keep the order of the parameter's memory.
    assert loaded["channels last"].stride() == state["channels last"].stride()


@pytest.mark.parametrize("background", [False, True])
def test_a_slice_does_not_drag_along_what_it_is_cut_of(tmp_path: Path, background: bool) -> None:
    large = torch.zeros(1_000_000)
    loaded = through_disk(tmp_path, {"part": large[5:10]}, background=background)
    assert loaded["part"].tolist() == [0.0] * 5
    assert (tmp_path / "state.pt").stat().st_size < 20_000


@pytest.mark.parametrize("background", [False, True])
def test_what_is_shared_stays_shared(tmp_path: Path, background: bool) -> None:
    tied = torch.randn(1000)
    inner = [1]
    state = {"a": tied, "b": tied, "flat": tied.view(10, 100), "x": inner, "y": inner}
    loaded = through_disk(tmp_path, state, background=background)
    loaded["a"][0] = 99.0
    assert loaded["b"][0] == loaded["flat"][0, 0] == 99.0
    assert loaded["x"] is loaded["y"]
    assert (tmp_path / "state.pt").stat().st_size < 10_000


def test_what_is_turned_into_something_plain(tmp_path: Path) -> None:
    point = namedtuple("point", "x y")
    array = np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1]
    state = {
        "array": array,
        "frozen array": np.ones(2),
        "float": np.float32(1.5),
        "int": np.int64(7),
        "bool": np.bool_(True),
        "named": point(1, [2]),
        "default": defaultdict(list, a=[1]),
        "proxy": MappingProxyType({"a": 1}),
        "deque": deque([1, 2], maxlen=5),
        "frozen": frozenset({1, 2}),
        "path": Path("/a/b"),
        "counter": Counter("aab"),
        np.int64(3): "key",
        "numpy": np.random.default_rng(0).bit_generator.state,
        "legacy": np.random.get_state(),
        "python": random.getstate(),
    }
    state["frozen array"].flags.writeable = False
    loaded = through_disk(tmp_path, state)
    assert torch.equal(loaded["array"], torch.from_numpy(array.copy()))
    plain = {name: loaded[name] for name in ("float", "int", "bool", "named", "default", "proxy")}
    assert identical(
        plain,
        {
            "float": 1.5,
            "int": 7,
            "bool": True,
            "named": (1, [2]),
            "default": {"a": [1]},
            "proxy": {"a": 1},
        },
    )
    assert loaded["deque"] == [1, 2]
    assert loaded["frozen"] == {1, 2}
    assert loaded["path"] == "/a/b"
    assert loaded["counter"] == Counter("aab")
    assert loaded[3] == "key"
    assert loaded["python"] == state["python"]
    assert loaded["legacy"][0] == "MT19937"
    generator = np.random.default_rng(1)
    generator.bit_generator.state = loaded["numpy"]
    assert generator.random() == np.random.default_rng(0).random()


def test_a_modules_metadata_is_kept(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    loaded = through_disk(tmp_path, state)
    assert loaded._metadata == state._metadata
    assert loaded._metadata[""]["version"] == 2


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


LOOP: list[Any] = []
LOOP.append(LOOP)

REFUSED: list[tuple[str, Any, str]] = [
    ("object", object(), "store those"),
    ("function", print, "it is code"),
    ("lambda", lambda: 1, "it is code"),
    ("class", Settings, "it is code"),
    ("dataclass", Settings(), "asdict"),
    ("enum", Colour.RED, "its value or its name"),
    ("range", range(3), "store those"),
    ("date", datetime.date(2026, 1, 1), "isoformat"),
    ("huge integer", 2**3000, "3001 bits"),
    ("itself", LOOP, "contains itself"),
    ("sparse", torch.eye(2).to_sparse(), "to_dense"),
    ("meta", torch.empty(2, device="meta"), "no data yet"),
    ("lazy", torch.nn.UninitializedParameter(), "no data yet"),
    ("nested", torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "unbind"),
    ("quantized", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
    ("module", torch.nn.Linear(1, 1), "name it in to_save"),
    ("generator", torch.Generator(), "get_state"),
    ("array of objects", np.array([print], dtype=object), "torch has no type"),
    ("array of text", np.array(["a"]), "torch has no type"),
    ("masked array", np.ma.array([1, 2], mask=[0, 1]), "getmaskarray"),
    ("numpy date", np.datetime64("2026-01-01"), "plain form"),
    ("key", {Colour.RED: 1}, "key of a dictionary"),
    ("in a set", {Colour.RED}, "in a set"),
]


@pytest.mark.parametrize(("name", "value", "advice"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_has_no_plain_form_is_refused_by_its_place(
    tmp_path: Path, name: str, value: Any, advice: str
) -> None:
    saver = DiskSaver(tmp_path)
    with pytest.raises(CheckpointContentError, match=r"\['model'\]\[1\]") as error:
        saver({"model": [torch.ones(2), value]}, "x.pt")
    assert advice in str(error.value)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("kind", [">f8", "<f8", ">i2", ">c16"])
def test_arrays_of_either_order_of_bytes_keep_their_values(tmp_path: Path, kind: str) -> None:
    array = np.arange(6).reshape(2, 3).T.astype(kind)
    with DiskSaver(tmp_path, atomic=True) as saver:
        saver({"array": array}, "x.pt")
    found = load_file(tmp_path / "x.pt").state["array"]
    assert found.numpy().tolist() == array.tolist()


def test_deep_nests_are_refused_before_python_gives_up(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CheckpointContentError, match="nested over"):
        DiskSaver(tmp_path)({"deep": deep}, "x.pt")


def test_many_shared_containers_take_no_time(tmp_path: Path) -> None:
    laugh: list[Any] = []
    for _ in range(60):
        laugh = [laugh, laugh]
    # Converted in no time; refused, since whoever walks it would not come to an end.
    with DiskSaver(tmp_path) as saver, pytest.raises(Exception, match="share each other"):
        saver({"laugh": laugh}, "x.pt")
    torch.save({"laugh": laugh}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="share each other"):
        load_file(tmp_path / "x.pt")
