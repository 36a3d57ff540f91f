"""One digest for any nest: equal for equal bits, and what differs is named by its path."""

from __future__ import annotations

import dataclasses
from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosstrain.engine.digest import differences, digest, leaves

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    name: str = "a"


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Loop:
    def __init__(self, x: Any) -> None:
        self.x, self.itself = x, self


def nests() -> list[tuple[Any, Any]]:
    """A nest, and one that differs in one place."""
    x, y = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).clone()
    y[1, 2] = 7
    return [
        (x, y),
        (x, x.view(3, 2)),
        (x, x.double()),
        (x, x.numpy()),
        ([x, 1], [x, 2]),
        ({"a": x, "b": [x]}, {"a": x, "b": [y]}),
        ({"a": x}, {"c": x}),
        (Pair(x, 1), Pair(y, 1)),
        (Sample(x), Sample(x, "b")),
        (Slots(x), Slots(y)),
        (Loop(x), Loop(y)),
        (UserDict(a=x), UserDict(a=y)),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([x, "a"], dtype=object), np.array([y, "a"], dtype=object)),
        (np.array("2020", "M8[D]"), np.array("2021", "M8[D]")),
        (x.to_sparse(), y.to_sparse()),
        (x.to_sparse_csr(), y.to_sparse_csr()),
        (x.to(torch.complex64).conj(), x.to(torch.complex64).conj() * 1j),
        (torch.nested.as_nested_tensor([x, x]), torch.nested.as_nested_tensor([x, y])),
        ({1, 2}, {1, 3}),
        (True, 1),
        (0.0, -0.0),
        ([], {}),
        (None, "None"),
    ]


@pytest.mark.filterwarnings("ignore:.*[Nn]ested.*", "ignore:Sparse CSR")
def test_equal_nests_have_equal_digests_and_others_have_not() -> None:
    for (one, other), (again, _) in zip(nests(), nests(), strict=True):
        assert digest(one) == digest(again)
        assert digest(one) != digest(other), (one, other)
        assert list(differences(leaves(one), leaves(other)))
        assert not list(differences(leaves(one), leaves(again)))


def test_what_differs_is_named_by_its_path() -> None:
    x = torch.zeros(2)
    found = differences(
        leaves({"image": [x, x], "ids": [1, 2], "sample": Sample(x), "gone": x}),
        leaves({"image": [x, x + 1], "ids": [1, 2, 3], "sample": Sample(x.int()), "new": x}),
    )
    assert list(found) == [
        "['ids'] was 2 values and is 3 values",
        "['image'][1] (float32 (2,)) has other contents",
        "['new'] was not there",
        "['sample'].x was float32 (2,) and is int32 (2,)",
        "['gone'] is not there any more",
    ]


def test_layout_in_memory_is_no_difference() -> None:
    x = torch.arange(12.0).view(3, 4)
    assert digest(x.t().contiguous().t()) == digest(x)
    assert digest(x.numpy()[::-1][::-1]) == digest(x.numpy())
    empty = digest(torch.empty(0, 3)), digest(np.empty((0, 3))), digest(torch.empty(3, 0))
    assert len(set(empty)) == 3


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(VALUES, VALUES)
def test_plain_nests_are_told_apart(one: Any, other: Any) -> None:
    # repr tells 1 from 1.0 and True, which == does not.
    assert (digest(one) == digest(other)) == (_sorted(one) == _sorted(other))


def _sorted(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_sorted(value[k])}' for k in sorted(value))}}}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_sorted, value))})"
    return repr(value)
