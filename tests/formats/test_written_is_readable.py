"""The writer is held to the reader: what real programs hold loads, or is refused at once."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from crosstrain.engine import (
    Checkpoint,
    CheckpointContentError,
    CheckpointWarning,
    DiskSaver,
    Engine,
)
from crosstrain.engine.formats.safe_load import load_file
from crosstrain.engine.proof import Checks


def _shared_layers() -> dict[str, Any]:
    weight = torch.randn(512, 512)
    return {
        f"layer{n}": {"weight": weight, "transposed": weight.t(), "flat": weight.view(-1)}
        for n in range(24)
    }


LARGE: dict[str, Callable[[], Any]] = {
    "keys that are tuples": lambda: Counter({(x, y): x for x in range(150) for y in range(150)}),
    "keys that are bytes": lambda: {b"key %d" % n: n for n in range(20_000)},
    "keys that are floats": lambda: {n / 7: n for n in range(20_000)},
    "keys that are large integers": lambda: {n << 40: n for n in range(20_000)},
    "sets of pairs": lambda: [{(n, n + 1), (n, "a")} for n in range(5_000)],
    "integers": lambda: list(range(300_000)),
    "truth values": lambda: [True, False, None] * 100_000,
    "floats": lambda: [n / 3 for n in range(100_000)],
    "empty lists": lambda: [[] for _ in range(70_000)],
    "small dictionaries": lambda: [{"a": n} for n in range(70_000)],
    "small tuples": lambda: [(n, str(n)) for n in range(70_000)],
    "layers that share weights": _shared_layers,
    "small tensors": lambda: [torch.full((4,), float(n)) for n in range(5_000)],
    "text": lambda: ["(]})" * 300_000, "t(" * 100_000],
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        if any(isinstance(value, (dict, torch.Tensor)) for value in one.values()):
            return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    elif isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("kind", LARGE)
def test_what_real_programs_hold_loads(tmp_path: Path, kind: str) -> None:
    state = LARGE[kind]()
    with DiskSaver(tmp_path, background=True) as saver:
        saver({"object": state}, "state.pt")
    for loaded in (load_file(tmp_path / "state.pt").state, torch.load(tmp_path / "state.pt")):
        assert _same(state, loaded["object"])


def test_tensors_of_two_types_over_one_memory(tmp_path: Path) -> None:
    floats = torch.randn(100)
    state = {"bits": floats.view(torch.int32), "floats": floats, "bytes": floats.view(torch.uint8)}
    for background in (False, True):
        name = f"state{background}.pt"
        with DiskSaver(tmp_path, background=background, require_empty=False) as saver:
            saver(state, name)
        loaded = torch.load(tmp_path / name)
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def _laugh(depth: int = 60) -> list[Any]:
    laugh: list[Any] = []
    for _ in range(depth):
        laugh = [laugh, laugh]
    return laugh


def _colliding() -> dict[int, int]:
    return {n * (2**61 - 1): n for n in range(1, 1500)}


class Holder:
    """An object with a state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def _save(checkpoint: Checkpoint, engine: Engine) -> None:
    checkpoint(engine)
    checkpoint.wait()


@pytest.mark.parametrize(
    ("background", "parts"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("make", [_laugh, _colliding])
def test_what_could_not_be_loaded_is_refused_by_name(
    tmp_path: Path, make: Callable[[], Any], background: bool, parts: bool
) -> None:
    to_save = {"good": Holder(1), "bad": Holder(make())}
    engine = Engine(lambda engine, batch: None)
    with DiskSaver(tmp_path, background=background, parts=parts) as saver:
        checkpoint = Checkpoint(to_save, saver)
        with pytest.raises(CheckpointContentError, match=r"state of 'bad'\..*not saved"):
            _save(checkpoint, engine)
        assert not list(tmp_path.glob("[!.]*"))
        assert not list(tmp_path.glob("*.tmp"))
        assert checkpoint.last_checkpoint is None
        # The next save is as good as if nothing had happened.
        to_save["bad"].state = 2
        checkpoint(engine)
        checkpoint.wait()
    assert Checkpoint.latest(tmp_path)


def test_how_strict_it_is(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    for number, strictness in enumerate(("warn", "off")):
        engine.checks = Checks(writer=strictness)  # type: ignore[arg-type]
        engine.state.iteration = number
        with DiskSaver(tmp_path / strictness) as saver:
            checkpoint = Checkpoint({"bad": Holder(_laugh()), "more": Holder(1)}, saver)
            if strictness == "warn":
                with pytest.warns(CheckpointWarning, match="could not be loaded again"):
                    checkpoint(engine)
            else:
                checkpoint(engine)
        assert list((tmp_path / strictness).glob("*.pt"))


class Mode(enum.StrEnum):
    FAST = "fast"


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    """Text that answers otherwise than text."""

    __slots__ = ()

    def __str__(self) -> str:
        return "something else"

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class Number(int):
    """A number that answers otherwise than a number."""

    def __int__(self) -> int:
        return -1

    __index__ = __int__


def test_subclasses_of_plain_types_become_plain(tmp_path: Path) -> None:
    class Half(float):
        pass

    class Raw(bytes):
        pass

    state = {
        Mode.FAST: Level.HIGH,
        Level.HIGH: Mode.FAST,
        "name": Name("given"),
        Name("key"): Number(7),
        "more": [
            Half(0.5),
            Raw(b"raw"),
            np.float64(1.5),
            np.str_("numpy"),
            {Mode.FAST, Level.HIGH},
        ],
        (Mode.FAST, Level.HIGH): 1,
    }
    with DiskSaver(tmp_path) as saver:
        saver({"state": state}, "state.pt")
    loaded = load_file(tmp_path / "state.pt").state["state"]
    assert loaded == {
        "fast": 3,
        3: "fast",
        "name": "given",
        "key": 7,
        "more": [0.5, b"raw", 1.5, "numpy", {"fast", 3}],
        ("fast", 3): 1,
    }
    found = [*loaded, *loaded.values(), *loaded["more"]]
    assert {type(value) for value in found} <= {str, int, float, bytes, list, set, tuple}


class AnswersAll:
    """An object that has every attribute that anybody asks for."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self


@pytest.mark.parametrize("value", [AnswersAll(), mock.MagicMock()])
def test_objects_that_answer_every_name_are_told_by_their_type(tmp_path: Path, value: Any) -> None:
    with DiskSaver(tmp_path) as saver, pytest.raises(CheckpointContentError) as error:
        saver({"state": [value]}, "state.pt")
    assert "date" not in str(error.value)
    assert "asdict" not in str(error.value)


def test_keys_have_the_bounds_of_a_load(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(8):
        deep = (deep,)
    with DiskSaver(tmp_path, require_empty=False) as saver:
        saver({"state": {deep: 1}}, "deep.pt")
        assert load_file(tmp_path / "deep.pt").state == {"state": {deep: 1}}
        for _ in range(3000):
            deep = (deep,)
        for key in (deep, tuple(range(20_000))):
            with pytest.raises(CheckpointContentError, match=r"\['state'\].*shorter key"):
                saver({"state": {key: 1}}, "deeper.pt")


def test_a_clock_that_ran_ahead_stops_no_later_save(tmp_path: Path) -> None:
    with mock.patch("time.time_ns", return_value=2**63 - 1), DiskSaver(tmp_path) as saver:
        saver({"a": 1}, "checkpoint_1.pt")
    with DiskSaver(tmp_path, require_empty=False) as saver:
        saver({"a": 2}, "checkpoint_2.pt")
    newest = Checkpoint.latest(tmp_path)
    assert newest.path == tmp_path / "checkpoint_2.pt"
    assert "far future" in newest.describe()
