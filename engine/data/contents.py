"""Puts saved contents back into the object that had them, so that whoever else refers to it sees.

A handler writes into a list or a tensor that a dataset refers to as well; a number in memory that
processes share is read by all of them. Another object in its place would be the dataset's alone.
"""

from __future__ import annotations

import ctypes
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy
import torch

from crosstrain.engine.digest import same
from crosstrain.engine.guards import is_a

__all__ = ["is_shared_memory", "numbers_in", "write_into"]


def is_shared_memory(value: object) -> bool:
    """Tells whether a value is memory as of `multiprocessing.Value` and `Array`."""
    return is_a(_memory(value), ctypes._SimpleCData, ctypes.Array)


def numbers_in(value: Any, every: int = 1) -> list[Any]:
    """Returns what such memory holds, of an array each of so many numbers."""
    memory = _memory(value)
    return list(memory[::every]) if isinstance(memory, ctypes.Array) else [memory.value]


def _memory(value: Any) -> Any:
    return value.get_obj() if is_a(value, SynchronizedBase) else value


def write_into(target: Any, value: Any) -> bool:
    """Makes an object hold what a plain value does; False if it cannot, and has not been changed.

    The value for shared memory is what `numbers_in` returned.
    """
    if is_shared_memory(target):
        memory = _memory(target)
        if isinstance(memory, ctypes.Array):
            memory[:] = value
        else:
            memory.value = value[0]
        return True
    if isinstance(target, (torch.Tensor, numpy.ndarray)):
        if fits := _fits(target, value):
            target[...] = value
        return fits
    if type(target) is not type(value):
        return False
    return _write_into_collection(target, value)


def _write_into_collection(target: Any, value: Any) -> bool:
    if type(target) is tuple:
        # What it is made of cannot be exchanged.
        if len(target) != len(value) or not all(map(_can_hold, target, value)):
            return False
        for one, other in zip(target, value, strict=True):
            write_into(one, other)
        return True
    if type(target) is list:
        if len(target) == len(value):
            pairs = zip(target, value, strict=True)
            value = [one if write_into(one, new) else new for one, new in pairs]
        target[:] = value
        return True
    if type(target) is dict:
        made = {
            key: target[key] if key in target and write_into(target[key], new) else new
            for key, new in value.items()
        }
        target.clear()
        target.update(made)
        return True
    return False


def _can_hold(target: Any, value: Any) -> bool:
    """Tells whether something in a tuple can be made to hold a value, or does."""
    return _fits(target, value) or type(target) in (list, dict) or same(target, value)


def _fits(target: Any, value: Any) -> bool:
    """Tells whether a value can be written into a tensor or an array."""
    if type(target) is not type(value):
        return False
    if isinstance(target, torch.Tensor):
        written = not target.requires_grad and not target.is_inference()
    else:
        written = isinstance(target, numpy.ndarray) and target.flags.writeable
    return written and bool(target.shape == value.shape and target.dtype == value.dtype)
