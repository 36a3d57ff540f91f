"""Kinds of data: which dataflow opens what a run is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from crosstrain.backends import World

from .flows import Dataflow, Iterate, NoData, ReplayedFlow, SequenceFlow
from .mapflow import MapFlow
from .own_data import is_map_style, is_own, not_dealt_out, own_data
from .own_states import is_stateful
from .sampling import is_loader
from .shares import Shards
from .stateful import StatefulFlow


def dataflow_of(data: Any, iterate: Iterate, world: World, shards: Shards | None) -> Dataflow:
    """Returns the dataflow for what `run` is given, dealt out to processes or logical shards.

    Args:
        data: what `run` takes.
        iterate: how the backend iterates over what can be fetched ahead.
        world: which process of how many this is.
        shards: those of this process; None: batches are dealt out to the processes.

    Raises:
        ValueError: if data cannot be dealt out to them.
    """
    if data is None:
        return NoData(data)
    if shards is not None:
        if is_own(data, world) or not is_map_style(data):
            raise ValueError(
                f"Data of type {type(data).__name__} cannot be dealt out to logical shards, which "
                "takes positions. Give run() a DataLoader over a map-style dataset, without a "
                "DistributedSampler."
            )
        return MapFlow(data, iterate, shards)
    if world.size == 1:
        return _whole(own_data(data), iterate)
    if is_own(data, world):
        flow = _whole(own_data(data), iterate)
        flow.owners = world.size
        return flow
    if not is_map_style(data):
        raise ValueError(not_dealt_out(data, world))
    return MapFlow(data, iterate, world)


def _whole(data: Any, iterate: Iterate) -> Dataflow:
    if is_map_style(data):
        return MapFlow(data, iterate)
    if is_stateful(data):
        return StatefulFlow(data, data)
    if is_loader(data) and data.num_workers == 0 and is_stateful(data.dataset):
        return StatefulFlow(data, data.dataset)
    if isinstance(data, (Sequence, torch.Tensor, numpy.ndarray)):
        return SequenceFlow(data, iterate)
    return ReplayedFlow(data)
