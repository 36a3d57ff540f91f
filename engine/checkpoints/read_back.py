"""Compares what an object says of its state with what was loaded into it, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from crosstrain.engine.digest import same, same_bits
from crosstrain.engine.formats.plain import to_plain
from crosstrain.engine.spread import has_spread, is_spread
from crosstrain.engine.storage.tree_hash import in_threads

_SHOWN = 3
# Bytes. A thread that compares takes the time in which 1 MiB is compared only to be asked.
_WORTH_A_THREAD = 1 << 20


class Difference(NamedTuple):
    """One thing that differs: in words, and whether the value is the saved one in another dtype."""

    text: str
    is_cast: bool


class _Pair(NamedTuple):
    """Two tensors of one shape and dtype whose bits are still to be compared, and their place."""

    where: str
    saved: torch.Tensor
    own: torch.Tensor


def differences(saved: Any, own: Any) -> tuple[list[Difference], list[str]]:
    """Compares a state that was loaded with the one that the object has then.

    Returns:
        The first things that differ, those first that are no casts; and what the object has and
        the checkpoint has not.

    Raises:
        CheckpointContentError: if the object's state holds what no checkpoint can carry.
    """
    extra: list[str] = []
    walked = list(_walk(_plain(saved), _plain(own), "", extra))
    pairs = [each for each in walked if isinstance(each, _Pair)]
    # Other devices' libraries need not bear threads; what takes no time is not worth one.
    apart = [each for each in pairs if each.own.is_cpu and each.own.nbytes >= _WORTH_A_THREAD]
    told = dict(zip(map(id, apart), in_threads(_compare, apart), strict=True))
    found: list[Difference] = []
    for each in walked:
        if isinstance(each, Difference):
            found.append(each)
        elif not (told[id(each)] if id(each) in told else _compare(each)):
            found.append(Difference(f"{each.where} has other values than were saved", False))
    found.sort(key=lambda each: each.is_cast)
    return found[:_SHOWN], extra


def _compare(pair: _Pair) -> bool:
    return same_bits(pair.saved, pair.own)


def _plain(state: Any) -> Any:
    """Returns a state as a checkpoint holds it: NumPy's arrays as tensors, deques as lists."""
    return to_plain(_local_nest(state) if has_spread(state) else state, lambda tensor, _: tensor)


def _local_nest(state: Any) -> Any:
    """Returns a nest with this process's part in the place of each spread tensor."""
    if is_spread(state):
        return _local(state)
    if isinstance(state, Mapping):
        return {key: _local_nest(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_local_nest(value) for value in state]
    return state


def _walk(saved: Any, own: Any, where: str, extra: list[str]) -> Iterator[Difference | _Pair]:
    if isinstance(saved, torch.Tensor):
        if (found := _tensors(saved, own, where or "the state")) is not None:
            yield found
    elif isinstance(saved, Mapping):
        yield from _mappings(saved, own, where, extra)
    elif isinstance(saved, (list, tuple)):
        if not isinstance(own, (list, tuple)) or len(own) != len(saved):
            yield Difference(f"{where or 'the state'} has another length or form", False)
            return
        for index, (one, other) in enumerate(zip(saved, own, strict=True)):
            yield from _walk(one, other, f"{where}[{index}]", extra)
    elif not same(saved, own):
        text = f"{where or 'the state'} was saved as {_short(saved)} and is {_short(own)}"
        yield Difference(text, False)


def _mappings(
    saved: Mapping[Any, Any], own: Any, where: str, extra: list[str]
) -> Iterator[Difference | _Pair]:
    if not isinstance(own, Mapping):
        yield Difference(f"{where or 'the state'} is a {type(own).__name__}, no mapping", False)
        return
    for key, value in saved.items():
        place = f"{where}[{key!r}]"
        if key in own:
            yield from _walk(value, own[key], place, extra)
        else:
            yield Difference(f"{place} was saved and is not there", False)
    extra += [f"{where}[{key!r}]" for key in own if key not in saved]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _tensors(saved: torch.Tensor, own: Any, where: str) -> Difference | _Pair | None:
    if not isinstance(own, torch.Tensor):
        return Difference(f"{where} was saved as a tensor and is {_short(own)}", False)
    one, other = _local(saved), _local(own)
    if one.is_meta or other.is_meta:
        return None
    if one.shape != other.shape:
        shapes = f"{tuple(one.shape)} and has shape {tuple(other.shape)}"
        return Difference(f"{where} was saved with shape {shapes}", False)
    if one.dtype != other.dtype:
        cast = same_bits(one.to(other.dtype), other)
        return Difference(f"{where} was saved as {one.dtype} and is {other.dtype}", cast)
    return _Pair(where, one, other)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if is_spread(tensor) else tensor
    return local.detach()
