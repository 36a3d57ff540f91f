"""Made with: the settings that a script makes its objects with, so that a changed one is told.

A learning rate stands in the script and in the checkpoint, whose is laid over the script's; dropout
or a layer's class stand in the script alone. Whoever changes one of them between two starts sees
the first change nothing and the second change the run, and no state_dict tells either. So a state
has what the script had made before anything was loaded, and a resume compares the script with that.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .guards import is_a, own_attributes
from .machine import is_own_number
from .proof import Proof, Strictness
from .structure import parts_of

#: What was set, by the object's name and, in it, the setting's.
Settings = dict[str, dict[str, Any]]
_CLASS: Final = "class"
_LONGEST: Final = 16
_SHOWN: Final = 8
# How an optimizer computes, which a backend may choose, and what a scheduler keeps beside `lr`.
_NO_SETTINGS: Final = frozenset({"params", "foreach", "fused", "capturable", "initial_lr"})
# What a schedule counts, wherever a script has it begin.
_COUNTED: Final = frozenset(
    {"last_epoch", "T_cur", "T_i", "best", "num_bad_epochs", "cooldown_counter", "base_lrs"}
)


def settings_of(objects: Mapping[str, Any], step: Any = None, *, live: bool = False) -> Settings:
    """Returns the settings of modules, optimizers, what holds an optimizer, and a training step.

    Args:
        objects: by name.
        step: a factory's training step; of another, no settings are known.
        live: whether learning rates are those of the moment, and not what schedules begin with.
    """
    found: Settings = {}
    for name, value in objects.items():
        if isinstance(value, Optimizer):
            found |= _of_optimizer(name, value, live)
        elif isinstance(value, Module):
            for path, part in parts_of(value).items():
                found[f"{name}.{path}" if path else name] = _of_module(part)
        elif is_schedule(value):
            found |= _of_schedule(name, value)
    options = getattr(step, "options", None)
    if options is not None:
        found["the training step"] = {
            "gradient_accumulation_steps": options.accumulation_steps,
            "max_norm": options.max_norm,
        }
        if not isinstance(step.loss_fn, Module):
            found["loss_fn"] = _of_function(step.loss_fn)
    return found


def packed(settings: Settings) -> list[list[Any]]:
    """Returns settings for a state: each kind of them once, with all the names that have it."""
    kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for where, values in settings.items():
        kinds.setdefault(repr(values), (values, []))[1].append(where)
    return [[values, "\n".join(names)] for values, names in kinds.values()]


def unpacked(kinds: list[list[Any]]) -> Settings:
    """Returns what `packed` was given."""
    return {where: values for values, names in kinds for where in names.split("\n")}


def tell_changes(
    then: Settings,
    script: Settings,
    loaded: Settings,
    now: Settings,
    proof: Proof,
    strictness: Strictness,
    processes: tuple[int, int],
) -> None:
    """Notes in a proof what a script sets otherwise than the one that a run was saved by.

    Args:
        then: what that one had made.
        script: what this one has made, before anything was loaded.
        loaded: what there was right after that.
        now: what there is as the run goes on. What the script has set in between is as it says.
        proof: takes it.
        strictness: how strictly it is meant.
        processes: how many there were then, and are now. That is told elsewhere.

    Raises:
        ResumeError: if there is such, and strictness is `error`.
    """
    overridden: dict[str, list[str]] = {}
    taken: dict[str, list[str]] = {}
    for where, name in _changed(then, script):
        old, new = (one.get(where, {}).get(name) for one in (then, script))
        if (old, new) == processes:
            continue
        as_loaded = loaded.get(where, {}).get(name, new)
        is_taken = name == _CLASS or _same(as_loaded, new)
        if _same(now.get(where, {}).get(name, as_loaded), as_loaded) != is_taken:
            # It was loaded and left, or the script's until what handlers had changed was put back.
            text = f"{name} {new!r} in the script, {old!r} then"
            overridden.setdefault(text, []).append(where)
        elif is_taken:
            taken.setdefault(f"{name} {old!r} then, {new!r} now", []).append(where)
    if overridden:
        proof.differs(
            "The script sets other values than when the run was saved, and those of the "
            f"checkpoint go on: {_phrases(overridden)}. To go on with the script's, set them after "
            f"they were loaded, a scheduler's too, and before the run goes on. {_OFF}",
            strictness,
        )
    if taken:
        proof.differs(
            f"The run goes on with other settings than it was saved with: {_phrases(taken)}. "
            f"{_OFF}",
            strictness,
        )


_OFF: Final = "It is told once, when it changes; checks=Checks(settings='off') compares nothing."


def _changed(then: Settings, script: Settings) -> Iterator[tuple[str, str]]:
    """Yields what differs, by where it is and its name."""
    both = then.keys() & script.keys()
    for where in {**script, **then}:
        if where not in both and where.partition(".")[0] not in both:
            # Of another object, which is told by its name.
            continue
        old, new = then.get(where, {}), script.get(where, {})
        if old.get(_CLASS) != new.get(_CLASS):
            # The rest are another class's.
            yield where, _CLASS
            continue
        for name in new:
            if name in old and not _same(old[name], new[name]):
                yield where, name


def _phrases(found: Mapping[str, list[str]]) -> str:
    texts = [
        f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}: {text}"
        for text, places in found.items()
    ]
    more = len(texts) - _SHOWN
    return "; ".join(texts[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# ------------------------------------------------------------------ what is a setting


def _of_optimizer(name: str, optimizer: Optimizer, live: bool) -> Settings:
    found: Settings = {}
    for index, group in enumerate(optimizer.param_groups):
        lr = group.get("lr") if live else group.get("initial_lr", group.get("lr"))
        settings = {**{key: group[key] for key in group if key not in _NO_SETTINGS}, "lr": lr}
        # A rate that a graph of the device reads is a tensor.
        settings = {
            key: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            for key, value in settings.items()
        }
        where = name if len(optimizer.param_groups) == 1 else f"group {index} of {name}"
        found[where] = {_CLASS: _class_of(optimizer), **_numbers_of(settings)}
    return found


def is_schedule(value: Any) -> bool:
    """Tells whether an object is made with an optimizer, as schedulers are, whoever wrote them."""
    if isinstance(value, (Module, Optimizer)):
        return False
    own = own_attributes(value) or {}
    return isinstance(value, LRScheduler) or any(is_a(v, Optimizer) for v in own.values())


def _of_schedule(name: str, schedule: Any) -> Settings:
    own = own_attributes(schedule) or {}
    settings = {n: v for n, v in own.items() if n not in _COUNTED and not n.startswith("_")}
    # An object of the user's may know when it was made, and by which process.
    numbers = {n: v for n, v in _numbers_of(settings).items() if not is_own_number(v)}
    found = {name: {_CLASS: _class_of(schedule), **numbers}}
    for key, value in own.items():
        for index, part in enumerate(value if type(value) is list else ()):
            where = f"{name}.{key.strip('_')}[{index}]"
            if is_a(part, LRScheduler):
                found |= _of_schedule(where, part)
            elif callable(part):
                found[where] = _of_function(part)
    return found


def _of_module(module: Module) -> dict[str, Any]:
    """Returns a module's class, and the numbers and words in it that decide what it computes."""
    kind, own = type(module), vars(module)
    if _module_of(kind) == "torch":
        words = {n: v for n, v in own.items() if type(v) is str}
        settings = {**_numbers_of(own), **words}
        read = {name for name in settings if not name.startswith("_")} - {"training"}
    else:
        # Of the user's own, words may say where a run is logged, or on which device it is.
        settings, read = _numbers_of(own), _read_by_forward(kind) - {"training"}
    return {_CLASS: _class_of(module), **{n: v for n, v in settings.items() if n in read}}


def _read_by_forward(kind: type[Module]) -> set[str]:
    """Returns the names that a module's `forward` mentions, and the methods that it calls."""
    names, left = set[str](), ["forward"]
    while left:
        code = getattr(getattr(kind, left.pop(), None), "__code__", None)
        mentioned = set(_names_in(code)) if isinstance(code, CodeType) else set[str]()
        left += mentioned - names
        names |= mentioned
    return names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def _of_function(function: Any) -> dict[str, Any]:
    """Returns what a function is called, and the numbers that it was made with."""
    found: dict[str, Any] = {}
    while is_a(function, partial):
        found |= _numbers_of(
            {**dict(zip("0123", function.args, strict=False)), **function.keywords}
        )
        function = function.func
    if is_a(function, MethodType):
        function = function.__func__
    if not is_a(function, FunctionType):
        found |= _numbers_of(own_attributes(function) or {})
        named = function if is_a(function, BuiltinFunctionType) else type(function)
        return {_CLASS: named.__name__, **found}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            found |= _numbers_of({name: cell.cell_contents})
    return {_CLASS: function.__name__, **found}


def _class_of(value: Any) -> str:
    # Where a model is spread over processes, its modules are of classes that are made of theirs.
    for kind in type(value).__mro__:
        if not kind.__module__.startswith("torch.distributed"):
            return kind.__name__
    return type(value).__name__


def _module_of(kind: type[Any]) -> str:
    return kind.__module__.partition(".")[0]


def _numbers_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those values that are numbers, rows of numbers or None, in plain types."""
    return {name: plain for name, value in values.items() if (plain := _number(value)) is not _NONE}


_NONE: Final = object()


def _number(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    # Of other classes, a value may answer anything, or never end.
    if type(value) is Counter:
        value = [*value]
    if type(value) in (list, tuple, torch.Size) and len(value) <= _LONGEST:
        items = [*value]
        if all(type(item) in (bool, int, float) for item in items):
            return items
    return _NONE


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, (int, float)):
        # A rate that is a tensor has fewer digits.
        return math.isclose(one, other, rel_tol=1e-6) or (one != one and other != other)
    return bool(one == other)
