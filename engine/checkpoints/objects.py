"""How objects give their states, take them back, and are found to hold what they were given."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from crosstrain.engine.engine import Engine
from crosstrain.engine.errors import warn_user
from crosstrain.engine.formats.mapped import Mapped
from crosstrain.engine.formats.safe_load import LoadedFile
from crosstrain.engine.guards import is_sequence
from crosstrain.engine.nests import (
    has,
    is_branch,
    is_module,
    map_objects,
    name_of,
    unwrap,
    walk_objects,
)
from crosstrain.engine.proof import Checks, Proof
from crosstrain.engine.ranks.world import this_rank
from crosstrain.engine.shown import shown
from crosstrain.engine.spread import spread
from crosstrain.engine.storage.errors import (
    CheckpointContentError,
    CheckpointMismatch,
    CheckpointWarning,
)
from crosstrain.engine.storage.manifest import Manifest
from crosstrain.engine.structure import keeps_groups, named, rebuild_groups

from .model_part import ModelPart
from .rank_objects import Pair, note_differences, own_state, with_own
from .read_back import Difference, differences

# The name under which a Checkpoint saves its own state (include_self).
OWN_NAME = "checkpointer"
_COMPILED = "_orig_mod"
_HOOKS_OF_OPTIMIZERS = (
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


# ------------------------------------------------------------------ what is saved


def check_objects(objects: Any, method: str, argument: str) -> None:
    """Makes sure that every object of a nest has a method.

    Args:
        objects: the nest.
        method: `state_dict` or `load_state_dict`.
        argument: what the nest was passed as, for the message.
    """
    if not isinstance(objects, Mapping):
        raise TypeError(f"Argument `{argument}` should be a dictionary, but given {type(objects)}")
    for name, value in walk_objects(objects):
        # Asked of the object: a proxy has it too.
        if not hasattr(value, method):
            raise TypeError(
                f"Object {type(value)} should have `{method}` method: it is {name!r} in "
                f"`{argument}`"
            )


def gather_states(objects: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Returns the states of a nest of objects, in a nest of the same form.

    An optimizer that is spread over processes is gathered on the rank that saves.
    """
    states = map_objects(lambda value, _: _state_of(unwrap(value), rank), objects)
    note_differences(list(_pairs(objects, states)), rank)
    return cast("dict[str, Any]", states)


def introduce(
    objects: Mapping[str, Any], states: Mapping[str, Any] | None = None
) -> list[tuple[Engine, str]]:
    """Tells each engine among objects what is saved beside it, or loaded.

    Args:
        objects: the objects by name.
        states: those that are about to be loaded: optimizers get the parameter groups that were
            added during the training.

    Returns:
        Each group that was added, as a phrase, with the engine that it was recorded with.
    """
    added: list[tuple[Engine, str]] = []
    for name, engine in objects.items():
        if not isinstance(engine, Engine):
            continue
        engine.introduce(objects)
        state = None if states is None else states.get(name)
        if isinstance(state, Mapping) and engine.checks.structure != "off":
            known = named(engine.objects, engine.saved_beside)
            added += [(engine, what) for what in rebuild_groups(state.get("structure"), known)]
    return added


def _is_spread_optimizer(value: Any) -> bool:
    """Tells whether an optimizer has its state in several processes, as torch's ZeRO has."""
    # Only where somebody has imported it can there be one; importing it here would take a while.
    optim = sys.modules.get("torch.distributed.optim")
    zero = getattr(optim, "ZeroRedundancyOptimizer", None)
    return zero is not None and isinstance(value, zero)


def _state_of(value: Any, rank: int) -> Any:
    if _is_spread_optimizer(value):
        value.consolidate_state_dict(to=rank)
        if this_rank() != rank:
            return {}
    # An engine whose state is gathered from all ranks: on that which saves.
    if has(value, "state_on"):
        return value.state_on(rank)
    return own_state(value, rank) if isinstance(value, Engine) else value.state_dict()


def unsaved_objects(trainer: Any, objects: Mapping[str, Any]) -> list[str]:
    """Names what a trainer trains and a nest of objects leaves out.

    A trainer tells what it trains by its `objects`, as the factories' engines do.
    """
    trained: Mapping[str, Any] = getattr(trainer, "objects", None) or {}
    values = (value for _, value in walk_objects(objects))
    known = {id(unwrap(v.model if isinstance(v, ModelPart) else v)) for v in values}
    return [name for name, value in trained.items() if id(unwrap(value)) not in known]


# ------------------------------------------------------------------ what is loaded


def restore(
    to_load: Mapping[str, Any],
    loaded: LoadedFile,
    kwargs: Mapping[str, Any],
    checks: Checks | None = None,
) -> Proof:
    """Gives objects their states: the engines last, since they go on from what all others are.

    Args:
        to_load: the objects.
        loaded: the states by name, or the state of the only object itself; if they lie in the
            memory of their file, none does afterwards that an object holds.
        kwargs: arguments for the `load_state_dict` of modules.
        checks: how strict it is; None: as strict as an engine among the objects is.

    Returns:
        What was checked; the proof of the first engine, if there is one.

    Raises:
        CheckpointCorrupt: if somebody has written to the file meanwhile.
        CheckpointMismatch: if names are missing or too many, or an object refuses its state.
        ResumeError: if an object does not hold what it was given.
    """
    source = "the checkpoint" if loaded.path is None else str(loaded.path)
    mapped = loaded.mapped
    engines = [value for _, value in walk_objects(to_load) if isinstance(value, Engine)]
    state = _by_name(to_load, loaded.state, loaded.manifest)
    pairs = _fitting(to_load, state, source, all_of_it=bool(engines) and kwargs.get("strict", True))
    if mapped is not None:
        mapped.own([its for _, one, its in pairs if not _takes_mapped(unwrap(one), kwargs)])
    for engine in engines:
        engine.proof = Proof()
        engine.checks = engine.checks if checks is None else checks
    rebuilt = introduce(to_load, state)
    strict = engines[0].checks if engines else checks or Checks()
    proof = engines[0].proof if engines else Proof()
    load = _Load(source, kwargs, strict, proof, goes_on=bool(engines), mapped=mapped)
    for name, value, its_state in sorted(pairs, key=lambda pair: isinstance(pair[1], Engine)):
        load.one(name, value, its_state)
    load.tell()
    if mapped is not None:
        mapped.check_unchanged()
    beside = {name: unwrap(one) for name, one, _ in pairs if not isinstance(one, Engine)}
    for engine in engines:
        engine.loaded_with = beside
        if engine.proof is not proof:
            # To load a state begins a proof of its own.
            for name in ("checked", "unchecked", "differences"):
                getattr(engine.proof, name)[:0] = getattr(proof, name)
    for engine, what in rebuilt:
        engine.proof.checked.append(f"put back: {what}")
    return engines[0].proof if engines else proof


def _fitting(to_load: Mapping[str, Any], state: Any, source: str, *, all_of_it: bool) -> list[Pair]:
    """Returns each object with the state that it gets here; raises if they do not fit.

    With `all_of_it`, the checkpoint must not hold more than that.
    """
    if not isinstance(state, Mapping):
        raise CheckpointMismatch(
            f"{source} holds a {type(state).__name__}, not objects by name. Nothing was loaded"
        )
    left = [name for name in state if name not in to_load and name != OWN_NAME]
    if left and all_of_it:
        # A run is to go on, and a part of what was saved with it would be left out.
        raise CheckpointMismatch(
            f"{source} also holds {', '.join(map(repr, left))}, which to_load leaves out; with an "
            "engine in to_load the run is to go on exactly. Nothing was loaded. Name them in "
            "to_load, or pass strict=False to go on without them"
        )
    try:
        return with_own(list(_pairs(to_load, state)))
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{source}: {error}. Nothing was loaded") from None


def to_own(
    to_load: Mapping[str, Any], kwargs: Mapping[str, Any], state: Any, manifest: Manifest | None
) -> list[Any]:
    """Returns the states, of those that are about to be loaded, that will need memory of their own.

    They are not verified yet.
    """
    found: list[Any] = []
    with contextlib.suppress(CheckpointMismatch):  # restore tells it, when the file is verified
        for _, value, its_state in _pairs(to_load, _by_name(to_load, state, manifest)):
            target = unwrap(value)
            # What an optimizer has is freed when it takes another state: it is read after that.
            fresh = isinstance(target, torch.optim.Optimizer) and not target.state
            if fresh or not _takes_mapped(target, kwargs):
                found.append(its_state)
    return found


def _by_name(to_load: Mapping[str, Any], state: Any, manifest: Manifest | None) -> Any:
    """Returns the states by name, also if there is one, of one object, that stands for itself."""
    if len(to_load) != 1:
        return state
    name = next(iter(to_load))
    named_so = isinstance(state, Mapping) and name in state
    by_name = named_so if manifest is None else not manifest.bare
    return state if by_name else {name: state}


def _takes_mapped(target: Any, kwargs: Mapping[str, Any]) -> bool:
    return _copies_its_state(target, kwargs) or _keeps_in_its_state(target)


def _pairs(value: Any, state: Any, path: tuple[Any, ...] = ()) -> Iterator[Pair]:
    """Yields each object of a nest with its name and its state, before any is loaded.

    Raises CheckpointMismatch where the states are no nest of the same form.
    """
    if not is_branch(value):
        yield name_of(path), value, state
        return
    if isinstance(value, Mapping):
        if not isinstance(state, Mapping):
            raise CheckpointMismatch(_other_form(path, "objects by name", state))
        missing = [key for key in value if key not in state]
        if missing:
            where = f" of {name_of(path)!r}" if path else ""
            raise CheckpointMismatch(
                f"Key {', '.join(map(repr, missing))}{where} from to_load is not found in the "
                f"checkpoint, which holds {list(state)}. Leave it out of to_load, or load a "
                "checkpoint that was saved with it"
            )
        keys = list(value)
    else:
        if not is_sequence(state):
            raise CheckpointMismatch(_other_form(path, "a list of objects", state))
        if len(state) != len(value):
            raise CheckpointMismatch(
                f"{name_of(path)!r} is a list of {len(value)} objects and the checkpoint holds "
                f"{len(state)}"
            )
        keys = list(range(len(value)))
    for key in keys:
        yield from _pairs(value[key], state[key], (*path, key))


def _other_form(path: tuple[Any, ...], expected: str, state: Any) -> str:
    return (
        f"{name_of(path)!r} should be {expected} and the checkpoint holds a "
        f"{type(state).__name__} there"
    )


@dataclass
class _Load:
    """Loads one object after the other, and reads back from each what it was given.

    `proof` takes what was found; `goes_on` says whether a run goes on from what is loaded.
    """

    source: str
    kwargs: Mapping[str, Any]
    checks: Checks
    proof: Proof
    goes_on: bool
    mapped: Mapped | None = None
    done: list[str] = field(default_factory=list[str])
    read: list[str] = field(default_factory=list[str])

    def one(self, name: str, value: Any, state: Any) -> None:
        """Loads one object."""
        target = unwrap(value)
        try:
            self._one(name, target, state)
        finally:
            if self.mapped is not None and isinstance(target, torch.optim.Optimizer):
                # It has taken the tensors themselves; its own of before are free by now.
                self.mapped.own([*target.state.values(), *target.param_groups])

    def _one(self, name: str, target: Any, state: Any) -> None:
        try:
            state = self._load(name, target, spread(target, state))
        except CheckpointMismatch:
            raise
        except Exception as error:
            # An object of the user's may raise anything; the message must say which one it was.
            reason = " ".join(str(error).split()).rstrip(". ")
            raise CheckpointMismatch(
                f"{name!r} ({type(target).__name__}) does not take its state from {self.source}: "
                f"{reason}. Loaded before it: {', '.join(map(repr, self.done)) or 'nothing'}; it "
                "may be loaded in part"
            ) from error
        self.done.append(name)
        if isinstance(state, Mapping) and not state and not is_module(target):
            self.proof.unchecked.append(
                f"{name!r} was saved with an empty state: nothing of it could be restored"
            )
        elif not isinstance(target, Engine) and self.checks.read_back != "off":
            self._read_back(name, target, state)

    def _load(self, name: str, target: Any, state: Any) -> Any:
        """Loads an object, and returns the state by the object's own names."""
        if is_module(target):
            own = target.state_dict()
            state = _by_own_names(target, state, own)
            if not self.kwargs.get("strict", True):
                self._tell_partial(name, state, own)
            target.load_state_dict(state, **self.kwargs)
            if not self.kwargs.get("strict", True):
                # What is left out has been told.
                return {key: value for key, value in state.items() if key in own}
            return state
        if isinstance(target, torch.optim.Optimizer):
            _check_groups(target, state)
            groups = target.param_groups
            target.load_state_dict(state)
            if keeps_groups(target):
                _keep_groups(target, groups)
            if not _is_spread_optimizer(target):
                _put_back(target, state)
            return state
        target.load_state_dict(state)
        return state

    def _tell_partial(self, name: str, state: Any, own: Mapping[str, Any]) -> None:
        """Tells what a load that is not strict leaves out; raises if that is everything."""
        if not isinstance(state, Mapping) or not own:
            return
        missing = [key for key in own if key not in state]
        unexpected = [key for key in state if key not in own]
        if len(missing) == len(own):
            raise CheckpointMismatch(
                f"Nothing of {self.source} fits {name!r}: it holds {_listed(unexpected)}, and the "
                f"object has {_listed(missing)}. Nothing was loaded into it. If the object was "
                "saved under another name, give it this name in to_load"
            )
        if missing or unexpected:
            text = f"{name!r} was loaded in part from {self.source} (strict=False)"
            if missing:
                text += f". Not in the checkpoint, and as before: {_listed(missing)}"
            if unexpected:
                text += f". In the checkpoint, and left out: {_listed(unexpected)}"
            self.proof.unchecked.append(text)
            warn_user(text, CheckpointWarning)

    def _read_back(self, name: str, target: Any, state: Any) -> None:
        if _is_spread_optimizer(target):
            self.proof.unchecked.append(f"{name!r} holds its part of what was loaded only")
            return
        try:
            found, extra = differences(state, target.state_dict())
        except CheckpointContentError as error:
            self.proof.unchecked.append(f"{name!r} could not be read back: {error}")
            return
        if found:
            self._differs(name, target, found)
            return
        self.read.append(name)
        if extra and not (is_module(target) or isinstance(target, ModelPart)):
            self.proof.unchecked.append(
                f"{name!r} also has {_listed(extra)}, of which the checkpoint holds nothing"
            )

    def _differs(self, name: str, target: Any, found: list[Difference]) -> None:
        told = "; ".join(each.text for each in found)
        message = (
            f"{name!r} ({type(target).__name__}) does not hold what was loaded into it from "
            f"{self.source}: {told}. Usual causes: its load_state_dict casts, leaves out or "
            "computes anew what it is given, or the object was made in another way than then"
        )
        if not self.goes_on and all(each.is_cast for each in found):
            # To load weights into a model of another precision is what some want, and see by this.
            self.proof.differences.append(message)
            warn_user(message, CheckpointWarning)
            return
        advice = ". To go on all the same: checks=Checks(read_back='warn')"
        self.proof.differs(message + advice, self.checks.read_back)

    def tell(self) -> None:
        """Notes what was read back."""
        if self.read:
            self.proof.checked.append(f"read back bit by bit: {', '.join(self.read)}")


def _listed(names: list[Any]) -> str:
    told = ", ".join(map(shown, names[:6]))
    return f"{told} and {len(names) - 6} more" if len(names) > 6 else told or "nothing"


def _by_own_names(module: torch.nn.Module, state: Any, own: Mapping[str, Any]) -> Any:
    """Names a state's entries as the module does, where torch.compile has changed a name."""
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return state
    if not any(_COMPILED in key for key in (*state, *own)):
        return state
    names = {_uncompiled(key): key for key in own}
    renamed = {names.get(_uncompiled(key), key): value for key, value in state.items()}
    if len(renamed) != len(state):
        return state
    made: Any = type(state)() if isinstance(state, dict) else {}
    made.update(renamed)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        parts = {_uncompiled(key): key for key, _ in module.named_modules()}
        made._metadata = {parts.get(_uncompiled(key), key): v for key, v in metadata.items()}
    return made


def _uncompiled(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != _COMPILED)


def _keep_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Puts what was loaded into the groups that an optimizer had, of which torch makes new ones.

    Handlers refer to them, and optimizers that share them, as that inside SAM does.
    """
    if optimizer.param_groups is groups:
        return
    for old, new in zip(groups, optimizer.param_groups, strict=True):
        if old is not new:
            old.clear()
            old.update(new)
    optimizer.param_groups = groups


def _check_groups(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Raises what is to be done where the optimizer lacks groups that training has added."""
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not is_sequence(groups) or not all(isinstance(group, Mapping) for group in groups):
        return
    saved = [len(group.get("params", ())) for group in groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved == own or type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    advice = "make it with the parameters that it had when it was saved"
    if len(saved) > len(own) and saved[: len(own)] == own:
        advice = (
            "groups were added during training: call optimizer.add_param_group() for "
            f"{len(saved) - len(own)} more before loading, in the order of then"
        )
    raise ValueError(
        f"it has {len(own)} parameter group(s) of {own} parameters, and in the checkpoint "
        f"{len(saved)} of {saved}; {advice}"
    )


def _put_back(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Gives an optimizer's state the dtypes that were saved: torch casts it to the parameters'."""
    saved = state.get("state") if isinstance(state, Mapping) else None
    if isinstance(saved, Mapping):
        # A fresh state_dict refers to the optimizer's own values.
        _put_back_values(optimizer.state_dict()["state"], saved)


def _put_back_values(own: Any, saved: Mapping[Any, Any]) -> None:
    for key, value in saved.items():
        mine = own.get(key) if isinstance(own, Mapping) else None
        if isinstance(value, Mapping):
            _put_back_values(mine, value)
        elif (
            isinstance(value, torch.Tensor)
            and isinstance(mine, torch.Tensor)
            and value.dtype != mine.dtype
            and value.shape == mine.shape
        ):
            cast("dict[Any, Any]", own)[key] = value.to(mine.device)


# ------------------------------------------------------------------ what may lie in a file


def _copies_its_state(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tells whether a module copies all that it is given into tensors that it has already.

    Where somebody else's code sees the state, the answer is no: it might keep a part of it.
    """
    if isinstance(target, ModelPart):
        return type(target) is ModelPart and _copies_its_state(target.model, {})
    if not is_module(target) or kwargs.get("assign", False):
        return False
    if torch.__future__.get_swap_module_params_on_conversion():
        return False
    whole = type(target).load_state_dict is torch.nn.Module.load_state_dict
    return whole and all(_copies(module) for module in target.modules())


def _copies(module: torch.nn.Module) -> bool:
    kind = type(module)
    # Of torch's own modules batch norm has one, which adds what old states lack.
    loads: Any = kind._load_from_state_dict
    if loads.__module__.partition(".")[0] != "torch" or vars(module).keys() & {
        "load_state_dict",
        "_load_from_state_dict",
    }:
        return False
    if kind.set_extra_state is not torch.nn.Module.set_extra_state:
        return False
    if vars(module).get("_load_state_dict_pre_hooks"):
        return False
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return all(type(tensor) in _PLAIN and not tensor.is_meta for tensor in own)


def _keeps_in_its_state(target: Any) -> bool:
    """Tells whether what an optimizer keeps of its state is in its `state` and `param_groups`."""
    if not isinstance(target, torch.optim.Optimizer):
        return False
    own: Any = vars(target)
    parameters = (one for group in target.param_groups for one in group["params"])
    return (
        type(target).load_state_dict is torch.optim.Optimizer.load_state_dict
        and type(target).__setstate__.__module__.partition(".")[0] == "torch"
        and "load_state_dict" not in own
        and not any(own.get(name, True) for name in _HOOKS_OF_OPTIMIZERS)
        and all(type(tensor) in _PLAIN for tensor in parameters)
    )
