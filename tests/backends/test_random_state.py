"""The host's random states go into plain values and come back to the bit."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

from crosstrain.backends import random_state


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    generator = numpy.random.get_bit_generator()
    with random_state.preserved():
        yield
        numpy.random.set_bit_generator(generator)


def draws() -> list[Any]:
    """Draws from all three generators, odd numbers of halves included."""
    return [
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(3).tolist(),
        numpy.random.randint(0, 2**31, dtype=numpy.int32),
        numpy.random.standard_normal(),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    ]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("drawn", [0, 1, 2, 700])
def test_round_trip_through_a_safe_file(drawn: int) -> None:
    random_state.seed(7)
    for _ in range(drawn):
        draws()
    state = saved_and_loaded(random_state.capture())
    expected = [draws() for _ in range(3)]
    random_state.restore(state)
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("name", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_every_generator_of_numpy(name: str) -> None:
    numpy.random.set_bit_generator(getattr(numpy.random, name)(2**40 + 3))
    draws()
    state = saved_and_loaded(random_state.capture())
    expected = [draws() for _ in range(3)]
    random_state.restore(state)
    assert [draws() for _ in range(3)] == expected


def test_a_state_of_another_kind_of_generator_is_refused_and_changes_nothing() -> None:
    state = random_state.capture()
    numpy.random.set_bit_generator(numpy.random.PCG64(1))
    random.random()
    before = random.getstate()
    with pytest.raises(ValueError, match="a PCG64 here, and the state is that of a MT19937"):
        random_state.restore(state)
    assert random.getstate() == before


@pytest.mark.parametrize("name", ["python", "numpy", "torch"])
def test_a_state_that_lacks_a_generator_is_refused(name: str) -> None:
    state = random_state.capture()
    del state[name]
    with pytest.raises(ValueError, match=name):
        random_state.restore(state)


def test_capture_is_no_view_of_what_goes_on() -> None:
    state = random_state.capture()
    expected = draws()
    random_state.restore(state)
    assert draws() == expected
    random_state.restore(state)
    assert draws() == expected


def test_seed_sets_all_three() -> None:
    random_state.seed(11)
    first = draws()
    random_state.seed(12)
    assert all(a != b for a, b in zip(first, draws(), strict=True))
    random_state.seed(11)
    assert draws() == first


def test_seed_is_that_of_the_libraries_themselves() -> None:
    random_state.seed(5)
    mine = draws()
    random.seed(5)
    numpy.random.seed(5)
    torch.manual_seed(5)
    assert draws() == mine


@pytest.mark.parametrize("value", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=str(value)):
        random_state.seed(value)


@pytest.mark.parametrize("value", [0, 2**32, 2**63 - 1])
def test_a_seed_at_the_edge(value: int) -> None:
    random_state.seed(value)
    first = draws()
    random_state.seed(value)
    assert draws() == first


def test_preserved_leaves_no_mark_whatever_happens_inside() -> None:
    random_state.seed(1)

    def disturb() -> None:
        draws()
        random_state.seed(99)
        raise KeyError

    expected = draws()
    random_state.seed(1)
    with pytest.raises(KeyError), random_state.preserved():
        disturb()
    assert draws() == expected
