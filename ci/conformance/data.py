"""Conformance of `put` and `batches`: a batch arrives whole, once, in order, on the device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch

from crosstrain.backends import Backend

from .case import Case, error_of, expect


class _Pair(NamedTuple):
    x: torch.Tensor
    y: Any


@dataclasses.dataclass(frozen=True)
class _Sample:
    image: torch.Tensor
    name: str
    boxes: list[torch.Tensor]


def _nest() -> dict[str, Any]:
    return {
        "pair": _Pair(torch.ones(2, 3), (torch.zeros(1), "label")),
        "sample": _Sample(torch.full((2,), 3.0), "a", [torch.arange(4)]),
        "ordered": OrderedDict(b=torch.ones(1), a=2),
        "list": [torch.tensor(1.5), None, 7, 2.5, True, b"raw"],
        "packed": torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]),
        "empty": [(), [], {}],
    }


def _compare(ours: Any, theirs: Any, device: torch.device, path: str) -> None:
    untyped: Any = theirs  # as what it is, not as what a check of its type makes of it
    # The tensors of a device that is written in Python are of a class of their own.
    both = (ours, untyped)
    same = all(isinstance(one, torch.Tensor) for one in both) and type(untyped) is torch.Tensor
    expect(
        same or type(ours) is type(theirs),
        f"put() made a {type(ours).__name__} of the {type(theirs).__name__} at batch{path}.",
    )
    inside = _inside(untyped)
    if isinstance(theirs, torch.Tensor):
        expect(
            ours.device.type == device.type,
            f"put() left the tensor at batch{path} on {ours.device}; the device is {device}.",
        )
        expect(
            torch.equal(ours.cpu(), theirs),
            f"put() changed the values of the tensor at batch{path}.",
        )
    elif inside is None:
        expect(ours == theirs, f"put() changed {theirs!r} at batch{path} to {ours!r}.")
    else:
        mine = _inside(ours)
        expect(list(mine) == list(inside), f"put() changed the length or the keys of batch{path}.")
        for place, other in inside.items():
            _compare(mine[place], other, device, f"{path}{place}")


def _inside(value: Any) -> Any:
    """Returns what a part of a batch holds, by its place as Python writes it; None of a leaf."""
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        # The sizes stay on the host.
        return {".data": value.data, ".batch_sizes": value.batch_sizes.tolist()}
    if isinstance(value, (tuple, list)):
        return {f"[{index}]": item for index, item in enumerate(value)}
    if isinstance(value, dict):
        return {f"[{key!r}]": item for key, item in value.items()}
    return (
        {f".{name}": x for name, x in vars(value).items()} if isinstance(value, _Sample) else None
    )


def check_put(case: Case) -> None:
    """It puts every tensor of a nest on the device and leaves all else as it is."""
    with case.opened() as backend:
        batch = _nest()
        _compare(backend.put(batch), _nest(), backend.device, "")
        _compare(batch, _nest(), torch.device("cpu"), "")


def check_put_is_exact(case: Case) -> None:
    """It puts tensors of any type and layout with the same values."""
    values = [
        torch.tensor([0, 1, 255], dtype=torch.uint8),
        torch.tensor([-(2**62), 2**62]),
        torch.tensor([True, False]),
        torch.tensor([1.0, -0.0, float("inf"), 1e-40]),
        torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
        torch.tensor([1.5, 2.5], dtype=torch.float16),
        torch.arange(6).reshape(2, 3).t(),
        torch.ones(2, 3)[:, 1],
        torch.zeros(0, 3),
        torch.tensor(3),
    ]
    with case.opened() as backend:
        for index, value in enumerate(values):
            put = backend.put(value)
            expect(put.dtype is value.dtype, f"put() made {put.dtype} of {value.dtype}.")
            _compare(put, value, backend.device, f" (number {index} of put_is_exact)")


def check_batches(case: Case) -> None:
    """It yields each batch once and in order, reads no more than it must, and hides no error."""
    with case.opened() as backend:
        _check_order(backend)
        _check_laziness(backend)
        _check_errors(backend)


def _check_order(backend: Backend) -> None:
    for count in (0, 1, 2, 5):
        data = [{"x": torch.full((4,), float(n)), "n": n} for n in range(count)]
        # All are kept until the end: none may be overwritten by one that comes later.
        got = [backend.put(batch) for batch in backend.batches(data)]
        expect(len(got) == count, f"batches() made {len(got)} batches of {count}.")
        for number, batch in enumerate(got):
            expect(
                batch["n"] == number and bool((batch["x"].cpu() == number).all()),
                f"batches() gave batch {batch['n']} with {batch['x'].cpu()} in place {number}.",
            )


def _check_laziness(backend: Backend) -> None:
    taken: list[int] = []

    def endless() -> Generator[torch.Tensor, None, None]:
        while True:
            taken.append(len(taken))
            yield torch.tensor(float(taken[-1]))

    source = endless()
    batches = backend.batches(source)
    for number in range(3):
        expect(
            float(backend.put(next(batches))) == number, "batches() loses the order of a generator."
        )
    ahead = len(taken) - 3
    expect(ahead <= 16, f"batches() read {ahead} batches ahead of the one that was asked for.")
    source.close()


def _check_errors(backend: Backend) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.ones(1)
        raise KeyError("the data's own error")

    batches = backend.batches(failing())
    error = error_of(
        lambda: [backend.put(batch) for batch in batches], "batches() hid an error of the data."
    )
    expect("the data's own error" in str(error), "batches() replaced the data's error.")
