"""Structure: what a training changes of its modules and optimizers that no `state_dict` holds.

Which parameters want gradients, which modules are in training mode, which parameters are in which
group of an optimizer, and buffers that are not saved: handlers change them in the middle of a run
(a backbone is unfrozen, a group is added), and a script that is started again sets up the
beginning's. So they are recorded with a run's state, and a resume puts back what can be put back
and tells what cannot.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.nn import Module
from torch.optim import Optimizer

from .digest import digest
from .guards import is_dense
from .nests import unwrap, walk_objects
from .proof import Proof, Strictness

# Larger buffers are recorded by their digest: they are tables that a module computes once.
_LARGEST_BUFFER: Final = 2**20
# What wrappers put into the names of the modules inside them.
_WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_SHOWN: Final = 5
#: The types of the attributes that are recorded.
RECORDED: Final = (bool, int, float, str)
_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Attributes that torch keeps for itself: `training` is recorded, a scheduler sets the last.
_TORCHS_OWN: Final = frozenset({*vars(Module()), "_opt_called", "_step_count"})


def recordable(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the modules and optimizers in a nest of objects, by name, without wrappers."""
    return {
        name: unwrap(value)
        for name, value in walk_objects(objects)
        if isinstance(value, (Module, Optimizer))
    }


def named(objects: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is recorded of an engine: what it trains, and what is saved beside it.

    Args:
        objects: what it trains; its names come first.
        beside: a nest that may hold the same objects under other names.
    """
    found = recordable(objects)
    known = {id(value) for value in found.values()}
    for name, value in recordable(beside).items():
        if id(value) not in known:
            found[name if name not in found else f"{name} (saved beside)"] = value
    return found


def keeps_groups(optimizer: Optimizer) -> bool:
    """Tells whether an optimizer has the same groups when it has loaded a state.

    Whoever else refers to them, such as a handler, then finds in them what was loaded. One that
    loads in a way of its own may put others in their place, or hand on those.
    """
    return type(optimizer).load_state_dict is Optimizer.load_state_dict


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _parameters(module: Module) -> dict[str, torch.nn.Parameter]:
    return {_plain_name(name): parameter for name, parameter in module.named_parameters()}


def parts_of(value: Any) -> dict[str, Any]:
    """Returns a module and those in it, by path, without what wrappers put into that.

    Of an optimizer, which has none in it, itself.
    """
    if not isinstance(value, Module):
        return {"": value}
    # The one inside a wrapper comes after it and takes its place.
    return {_plain_name(name): one for name, one in value.named_modules()}


def _unsaved_buffers(module: Module) -> Iterator[tuple[str, Module, str]]:
    """Yields name, owner and the owner's name of each buffer that a state_dict leaves out."""
    for prefix, owner in module.named_modules():
        for name in sorted(owner._non_persistent_buffers_set):
            if name in owner._buffers:
                yield _plain_name(f"{prefix}.{name}" if prefix else name), owner, name


@dataclass
class Restored:
    """What became of a structure that was put back into objects.

    Args:
        compared: how many objects were compared with it.
        put_back: what was other than recorded, and is as recorded again.
        different: what is other than recorded, each as a phrase.
        missing: objects of the record that are not there.
    """

    compared: int = 0
    put_back: list[str] = field(default_factory=list[str])
    different: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])

    def tell(self, proof: Proof, strictness: Strictness) -> None:
        """Notes this in a proof.

        Raises:
            ResumeError: if there is such, and strictness is `error`.
        """
        if self.missing:
            proof.unchecked.append(
                f"the structure of {', '.join(self.missing)}, which this run does not name"
            )
        if self.different:
            proof.differs(
                "The state was written when what is trained was set up differently, and no "
                f"state_dict holds that: {'; '.join(self.different)}. {_REMEDY}",
                strictness,
            )
        elif self.compared:
            changed = f" (put back: {_few(self.put_back)})" if self.put_back else ""
            proof.checked.append(f"the structure of {self.compared} trained objects{changed}")


class Structure:
    """Records the structure of objects, and puts it back.

    Digests of large buffers are kept as long as the buffer is the same, so that one that never
    changes is read once.
    """

    def __init__(self) -> None:
        self._digests: dict[str, tuple[weakref.ref[torch.Tensor], int, str]] = {}
        #: What the script has made the objects with, as `made_with.packed`; empty: not known.
        self.made_with: list[list[Any]] = []
        self.begin({})

    def begin(self, objects: Mapping[str, Any]) -> None:
        """Notes the attributes that objects begin a run with: those that change are recorded."""
        self._begun = {name: _plain_attributes(value) for name, value in objects.items()}
        self._changed: dict[str, set[str]] = {}
        # How many hooks there were, and what is to be made with more of them.
        self._hooks: dict[str, dict[str, int]] = {}
        self._to_be_made: set[str] = set()
        # The buffers that there were, and what those are to hold that are to be made.
        self._buffers: dict[str, set[str]] = {}
        self._awaited: dict[str, torch.Tensor | str | None] = {}

    def batches_begin(self, objects: Mapping[str, Any]) -> None:
        """Notes the hooks that there are, before the first step that this process does."""
        for name, value in objects.items():
            if name not in self._hooks:
                self._hooks[name] = {}
                if isinstance(value, Module):
                    self._hooks[name] = _hooks_by_path(value)
                    self._buffers[name] = {own for own, _, _ in _unsaved_buffers(value)}

    def not_made_again(self, objects: Mapping[str, Any]) -> list[str]:
        """Returns what a record told to be made with hooks, and no step has made since; once.

        Args:
            objects: those that the record was put back into.
        """
        now = {
            f"{name}.{path}": item
            for name, value in objects.items()
            for path, item in _plain_attributes(value).items()
        }
        waited, self._to_be_made = self._to_be_made, set()
        return sorted(path for path in waited if now.get(path) is not True)

    def buffers_unlike(self, objects: Mapping[str, Any]) -> list[str]:
        """Returns which buffers steps had made, and have not made again equal; once.

        Args:
            objects: those that the record was put back into.
        """
        awaited, self._awaited = self._awaited, {}
        now = {
            f"{name}.{own}": owner._buffers[key]
            for name, value in objects.items()
            if awaited and isinstance(value, Module)
            for own, owner, key in _unsaved_buffers(value)
        }
        return sorted(
            full
            for full, saved in awaited.items()
            if full not in now or not self._holds(full, now[full], saved)
        )

    def _holds(self, full: str, now: torch.Tensor | None, saved: torch.Tensor | str | None) -> bool:
        if isinstance(saved, str):
            return now is not None and self._record_buffer(full, now) == saved
        return _same_buffer(now, saved)

    def record(
        self,
        objects: Mapping[str, Any],
        is_made_beside: Callable[[Any, str], bool] = lambda owner, name: False,
    ) -> dict[str, Any]:
        """Returns the structure of objects, as plain types and tensors.

        Args:
            objects: those that are trained.
            is_made_beside: tells whether an attribute says that something was made which a
                resumed run has to make again; put back, it would keep it from that.
        """
        names = _names(objects)
        parts = {name: parts_of(value) for name, value in objects.items()}
        attributes = {
            name: {
                path: item
                for path, item in self._changed_attributes(name, value).items()
                for head, _, own in [path.rpartition(".")]
                if not is_made_beside(parts[name].get(head), own)
            }
            for name, value in objects.items()
        }
        made = {name: self._made_with_hooks(name, v) for name, v in objects.items()}
        return {
            "modules": {
                name: self._record_module(name, value)
                for name, value in objects.items()
                if isinstance(value, Module)
            },
            "attributes": {
                name: {path: item for path, item in found.items() if path not in made[name]}
                for name, found in attributes.items()
            },
            "made": made,
            "optimizers": {
                name: _groups(value, names)
                for name, value in objects.items()
                if isinstance(value, Optimizer)
            },
            "made with": self.made_with,
        }

    def _changed_attributes(self, name: str, value: Any) -> dict[str, Any]:
        """Returns the plain attributes that are not what the run began with."""
        now = _plain_attributes(value)
        begun = self._begun.setdefault(name, now)
        changed = self._changed.setdefault(name, set())
        changed |= {path for path in now if path not in begun or begun[path] != now[path]}
        return {path: now[path] for path in sorted(changed) if path in now}

    def _made_with_hooks(self, name: str, value: Any) -> list[str]:
        """Returns the flags that say that hooks were made, which a resumed run has to make again.

        A library may register hooks in the first forward, and note in a flag of the module above
        them that it has. A flag that is put back without them would keep them from being made.
        """
        before = self._hooks.get(name)
        if before is None or not isinstance(value, Module) or _hooks_inside(value) == before[""]:
            return []
        begun = self._begun.get(name, {})
        flags: dict[str, list[str]] = {}
        for path, item in _plain_attributes(value).items():
            if item is True and begun.get(path, False) is False:
                flags.setdefault(path.rpartition(".")[0], []).append(path)
        now = _hooks_by_path(value)
        more = {holder: now[holder] - before.get(holder, 0) for holder in flags}
        told: dict[str, int] = {}
        found: list[str] = []
        # The innermost module that has such a flag tells of the hooks in it, and no other does.
        for holder in sorted(flags, key=len, reverse=True):
            inside = [one for one in told if not holder or one.startswith(f"{holder}.")]
            if more[holder] > sum(told[one] for one in inside):
                told = {one: told[one] for one in told if one not in inside}
                told[holder] = more[holder]
                found += flags[holder]
        return found

    def _record_module(self, name: str, module: Module) -> dict[str, Any]:
        mode = module.training
        return {
            "frozen": [n for n, p in _parameters(module).items() if not p.requires_grad],
            "training": mode,
            "other mode": [n for n, one in parts_of(module).items() if one.training != mode],
            "buffers": {
                own: self._record_buffer(f"{name}.{own}", owner._buffers[key])
                for own, owner, key in _unsaved_buffers(module)
            },
            "made buffers": [
                own
                for own, _, _ in _unsaved_buffers(module)
                if name in self._buffers and own not in self._buffers[name]
            ],
        }

    def _record_buffer(self, name: str, buffer: torch.Tensor | None) -> torch.Tensor | str | None:
        """Returns a small buffer's copy, and a large one's digest."""
        if buffer is None:
            return None
        if is_dense(buffer) and buffer.nbytes <= _LARGEST_BUFFER:
            return buffer.detach().clone()
        known = self._digests.get(name)
        version = -1 if buffer.is_inference() else buffer._version
        if known is not None and known[0]() is buffer and known[1] == version >= 0:
            return known[2]
        made = digest(buffer)
        self._digests[name] = (weakref.ref(buffer), version, made)
        return made

    def restore(
        self, record: Mapping[str, Any], objects: Mapping[str, Any], again: bool = False
    ) -> Restored:
        """Puts back what can be put back of a structure; compares the rest.

        Args:
            record: what `record` returned.
            objects: those that it is put back into, as of `recordable`.
            again: whether handlers have run since it was put back: what they have changed of
                attributes that the record leaves out is put back as well.
        """
        found = Restored()
        for name, then in record["modules"].items():
            if isinstance(objects.get(name), Module):
                found.compared += 1
                self._restore_module(name, objects[name], then, found)
            else:
                found.missing.append(name)
        for name, then in record.get("attributes", {}).items():
            if name in objects:
                self._changed[name] = set(then)
                if again:
                    then = {**self._begun.get(name, {}), **then}
                found.put_back += _put_attributes(name, objects[name], then)
                self._begun[name] = _plain_attributes(objects[name])
        for name, paths in record.get("made", {}).items():
            self._to_be_made |= {f"{name}.{path}" for path in paths}
        names = _names(objects)
        for name, groups in record["optimizers"].items():
            if isinstance(objects.get(name), Optimizer):
                found.compared += 1
                found.different += _other_groups(name, objects[name], groups, names)
            else:
                found.missing.append(name)
        return found

    def _restore_module(
        self, name: str, module: Module, then: Mapping[str, Any], found: Restored
    ) -> None:
        parameters, frozen = _parameters(module), set(then["frozen"])
        for own, parameter in parameters.items():
            if parameter.requires_grad == (own in frozen):
                parameter.requires_grad_(own not in frozen)
                found.put_back.append(f"requires_grad of {name}.{own}")
        if gone := [f"{name}.{own}" for own in frozen if own not in parameters]:
            found.different.append(f"{_few(gone)} wanted no gradients then, and is not there now")
        others = set(then["other mode"])
        for own, one in parts_of(module).items():
            mode = then["training"] != (own in others)
            if one.training != mode:
                # Not train(): it changes all modules inside.
                one.training = mode
                found.put_back.append(f"training mode of {name}{'.' if own else ''}{own}")
        self._restore_buffers(name, module, then, found)

    def _restore_buffers(
        self, name: str, module: Module, then: Mapping[str, Any], found: Restored
    ) -> None:
        present = {own: (owner, key) for own, owner, key in _unsaved_buffers(module)}
        for own, saved in then["buffers"].items():
            full = f"{name}.{own}"
            if own not in present and own in then.get("made buffers", ()):
                self._awaited[full] = saved
                continue
            if own not in present:
                found.different.append(f"{full} was a buffer with persistent=False, is none now")
                continue
            owner, key = present[own]
            now = owner._buffers[key]
            if isinstance(saved, str):
                if not self._holds(full, now, saved):
                    found.different.append(
                        f"{full}, a buffer with persistent=False of more than "
                        f"{_LARGEST_BUFFER} bytes, had other contents"
                    )
            elif not _same_buffer(now, saved):
                _put_buffer(owner, key, now, saved)
                found.put_back.append(f"buffer {full}")


_REMEDY: Final = (
    "Make the same change before the state is loaded (the script that starts again sets up the "
    "beginning's), let the modules save it (persistent=True), or pass "
    'checks=Checks(structure="warn") to go on all the same.'
)


def rebuild_groups(record: Mapping[str, Any] | None, objects: Mapping[str, Any]) -> list[str]:
    """Adds to optimizers the parameter groups that a training had added when it was recorded.

    Call it before the optimizers load their states, which hold the new groups' options.

    Returns:
        What was added, each as a phrase. Groups are added only where those that there are equal
        the first of the record's, and the parameters of the others are known by name.
    """
    if record is None:
        return []
    names = _names(objects)
    known = {name: value for value, name in _named_parameters(objects)}
    added: list[str] = []
    for name, groups in record["optimizers"].items():
        optimizer = objects.get(name)
        if not isinstance(optimizer, Optimizer):
            continue
        now = _groups(optimizer, names)
        more = groups[len(now) :]
        if now != groups[: len(now)] or not all(n in known for group in more for n in group):
            continue
        for group in more:
            optimizer.add_param_group({"params": [known[n] for n in group]})
            added.append(f"a parameter group of {name} with {_few(group)}")
    return added


def _named_parameters(objects: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, str]]:
    for name, value in objects.items():
        if isinstance(value, Module):
            for own, parameter in _parameters(value).items():
                yield parameter, f"{name}.{own}"


def _names(objects: Mapping[str, Any]) -> dict[int, str]:
    found: dict[int, str] = {}
    for parameter, name in _named_parameters(objects):
        found.setdefault(id(parameter), name)
    return found


def _groups(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str]]:
    """Returns the names of the parameters in each group of an optimizer; "" for one without."""
    return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]


def _plain_attributes(value: Any) -> dict[str, Any]:
    """Returns the numbers, words and truths among an object's attributes, by path."""
    return {
        f"{path}.{name}" if path else name: item
        for path, part in parts_of(value).items()
        for name, item in vars(part).items()
        if type(item) in RECORDED and name not in _TORCHS_OWN
    }


def _hooks_inside(module: Module) -> int:
    """Returns how many hooks there are of the modules inside a module."""
    inside = (one for one in module.modules() if one is not module)
    return sum(len(getattr(one, kind)) for one in inside for kind in _HOOKS)


def _hooks_by_path(module: Module) -> dict[str, int]:
    """Returns how many hooks there are inside each of a module's modules, by path."""
    return {path: _hooks_inside(one) for path, one in parts_of(module).items()}


def _put_attributes(name: str, value: Any, then: Mapping[str, Any]) -> list[str]:
    """Sets attributes to what they were; returns which had another value."""
    now = _plain_attributes(value)
    changed: list[str] = []
    parts = parts_of(value)
    for path, item in then.items():
        head, _, own = path.rpartition(".")
        if head in parts and (path not in now or now[path] != item):
            setattr(parts[head], own, item)
            changed.append(f"{name}.{path}")
    return changed


def _other_groups(
    name: str, optimizer: Optimizer, then: Sequence[Sequence[str]], names: Mapping[int, str]
) -> list[str]:
    """Returns how an optimizer's groups differ from those of a record, as phrases."""
    now = _groups(optimizer, names)
    if len(now) != len(then):
        return [f"{name} had {len(then)} parameter groups, and has {len(now)}"]
    found: list[str] = []
    for index, (old, new) in enumerate(zip(then, now, strict=True)):
        where = f"group {index} of {name}"
        if len(old) != len(new):
            found.append(f"{where} had {len(old)} parameters, and has {len(new)}")
            continue
        # One without a name belongs to no module that is named, such as a backend's own copy.
        pairs = zip(old, new, strict=True)
        other = [f"{a} then, {b} now" for a, b in pairs if a != b and a and b]
        if other:
            found.append(f"{where} has other parameters ({_few(other)})")
    return found


def _same_buffer(now: torch.Tensor | None, saved: torch.Tensor | None) -> bool:
    if now is None or saved is None:
        return now is saved
    return digest(now) == digest(saved)


def _put_buffer(
    owner: Module, key: str, now: torch.Tensor | None, saved: torch.Tensor | None
) -> None:
    if (
        now is not None
        and saved is not None
        and (now.shape, now.dtype, now.is_inference()) == (saved.shape, saved.dtype, False)
    ):
        with torch.no_grad():
            now.copy_(saved)
        return
    place = next(owner.parameters(), now)
    device = torch.device("cpu") if place is None else place.device
    owner._buffers[key] = None if saved is None else saved.detach().clone().to(device)


def _few(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
