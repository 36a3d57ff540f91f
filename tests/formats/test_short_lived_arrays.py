"""What `state_dict()` makes anew at each call, and nobody keeps, is saved with its own contents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosstrain.engine import Checkpoint, DiskSaver, Engine, read_checkpoint

COUNT = 1000
MODES = ("sync", "background", "overlap", "parts", "parts in the background")


class Fresh(Mapping[str, Any]):
    """A mapping that makes each value when it is asked for it, and keeps none."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __getitem__(self, key: str) -> Any:
        return self._make(int(key))

    def __iter__(self) -> Any:
        return map(str, range(COUNT))

    def __len__(self) -> int:
        return COUNT


def _array(number: int) -> Any:
    return np.full(8, number, dtype=np.float64)


def _value(number: int) -> Any:
    """Values of one size in bytes, of kinds that a saver treats in different ways."""
    kinds = [
        lambda: _array(number),
        lambda: torch.full((8,), number, dtype=torch.float64),
        lambda: torch.from_numpy(_array(number)),
        lambda: [{"nested": _array(number)}, _array(-number)],
        lambda: _array(number)[::-1],
        lambda: torch.full((16,), number, dtype=torch.int32),
        lambda: bytearray(number.to_bytes(4, "little") * 16),
    ]
    return kinds[number % len(kinds)]()


class Table:
    """An object whose state is made at each call, and changes with `step`."""

    def __init__(self) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "parameter": self.parameter,
            "array": Fresh(_array),
            "mixed": Fresh(_value),
            "listed": [_value(number) for number in range(COUNT)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def _same(loaded: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return len(loaded) == len(expected) and all(map(_same, loaded, expected))
    if isinstance(expected, dict):
        return list(loaded) == list(expected) and all(_same(loaded[k], expected[k]) for k in loaded)
    if isinstance(expected, bytearray):
        return bool(loaded == expected)
    wanted = expected if isinstance(expected, torch.Tensor) else torch.from_numpy(expected.copy())
    return loaded.dtype == wanted.dtype and torch.equal(loaded, wanted)


def _saver(folder: Path, mode: str) -> Any:
    if mode.startswith("parts"):
        return DiskSaver(folder, background=mode != "parts", parts=True)
    return DiskSaver(folder, background=mode != "sync", overlap=mode == "overlap")


@pytest.mark.parametrize("mode", MODES)
def test_short_lived_arrays_of_one_size(tmp_path: Path, mode: str) -> None:
    table = Table()
    optimizer = torch.optim.Adam([table.parameter], 1e-2)
    objects = {"table": table, "optimizer": optimizer}
    engine = Engine(lambda engine, batch: None)
    with _saver(tmp_path, mode) as saver:
        checkpoint = Checkpoint(objects, saver, n_saved=None)
        for iteration in (1, 2):
            # The second save uses the first one's memory again.
            engine.state.iteration = iteration
            table.parameter.grad = torch.ones_like(table.parameter)
            optimizer.step()
            checkpoint(engine)
            checkpoint.wait()
            assert checkpoint.last_checkpoint is not None
            path = Path(checkpoint.last_checkpoint)
            reread = read_checkpoint(path) if mode.startswith("parts") else torch.load(path)
            state = reread["table"]
            assert torch.equal(state["parameter"], table.parameter)
            for number in range(COUNT):
                assert _same(state["array"][str(number)], _array(number)), (number, iteration)
                assert _same(state["mixed"][str(number)], _value(number)), (number, iteration)
                assert _same(state["listed"][number], _value(number)), (number, iteration)


@pytest.mark.parametrize("background", [False, True])
def test_views_of_one_memory_with_lengths_of_their_own(tmp_path: Path, background: bool) -> None:
    memory = np.arange(1000.0)
    state = {
        "begin": torch.from_numpy(memory[:600]),
        "whole": torch.from_numpy(memory),
        "array": memory,
    }
    with DiskSaver(tmp_path, background=background) as saver:
        saver(state, "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert torch.equal(loaded["begin"], torch.arange(600.0, dtype=torch.float64))
    assert torch.equal(loaded["whole"], torch.arange(1000.0, dtype=torch.float64))
    assert torch.equal(loaded["array"], loaded["whole"])


def test_what_changes_after_the_call_is_saved_as_it_was(tmp_path: Path) -> None:
    array, text, tensor = np.zeros(100_000), bytearray(b"before"), torch.zeros(100_000)
    with DiskSaver(tmp_path, background=True) as saver:
        saver({"array": array, "text": text, "tensor": tensor}, "state.pt")
        array += 1
        tensor += 1
        text[:] = b"after!"
    loaded = torch.load(tmp_path / "state.pt")
    assert not loaded["array"].any()
    assert not loaded["tensor"].any()
    assert loaded["text"] == b"before"
