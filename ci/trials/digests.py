"""Digests of nests of tensors: short words that are the same for the same bits only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

__all__ = ["digest", "leaf_digests", "leaves"]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of a nest of mappings, lists and tuples with its path, such as `.a[0]`."""
    if isinstance(value, Mapping):
        named: Mapping[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        # The order of keys is no part of a state: one that was loaded may have another.
        for key in sorted(named, key=str):
            yield from leaves(named[key], f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(cast("Sequence[Any]", value)):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def digest(value: Any) -> str:
    """Returns 16 hexadecimal digits that differ wherever two nests differ in a bit or a type.

    Args:
        value: any nest of mappings, lists and tuples; tensors may be on any device. One whose
            parts lie in several processes is gathered, so all of these call it together; it has the
            digest of the whole.
    """
    found = hashlib.sha256()
    for path, leaf in leaves(value):
        found.update(path.encode())
        if isinstance(leaf, torch.Tensor):
            content = _whole(leaf.detach()).cpu().contiguous().view(-1).view(torch.uint8)
            found.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            found.update(content.numpy().data)
        else:
            found.update(f"{type(leaf).__name__}{leaf!r}".encode())
    return found.hexdigest()[:16]


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def leaf_digests(value: Any, name: str) -> dict[str, str]:
    """Returns the digest of each leaf of a nest by its path, the first part of which is a name."""
    return {f"{name}{path}": digest(leaf) for path, leaf in leaves(value)}
