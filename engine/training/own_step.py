"""What is saved of a process function that has no state of its own: the gradients of its windows.

A process function that steps its optimizer every few iterations has gradients between them that no
`state_dict` of a model or an optimizer holds. They belong to the models and optimizers that the
engine knows: those in `engine.objects`, those that the function refers to, those that are saved.
"""

from __future__ import annotations

import dis
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parallel import DistributedDataParallel

from crosstrain.backends.process_group import lay_out_made
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.guards import is_a
from crosstrain.engine.nests import Path, is_module, is_plain_row
from crosstrain.engine.ranks.world import unshared
from crosstrain.engine.spread import keeps_gradients, parameters_of

from . import gradients
from .captured import Captured
from .step_hooks import has_hooks

if TYPE_CHECKING:
    from crosstrain.engine.engine import Engine


_FETCHES: Final = ("LOAD_ATTR", "LOAD_METHOD")
# Between the name of a function and what it is called with.
_SAY_NOTHING: Final = ("CACHE", "NOP", "PRECALL", "PUSH_NULL")
# A collection of more things than this is data: it is not looked through for models at each save.
_MOST: Final = 1024


class OwnStep:
    """The state of a process function that offers none."""

    def __init__(self, function: Callable[..., Any], engine: Engine) -> None:
        self._function = function
        self._engine = weakref.ref(engine)
        self._uses: weakref.WeakKeyDictionary[Any, _Use] = weakref.WeakKeyDictionary()

    def watch(self) -> None:
        """Notes from here on which gradients the optimizers have stepped with."""
        for _, optimizer in _optimizers(self._found()):
            # One that only wraps another may have no hooks: all of its gradients are saved.
            if optimizer not in self._uses and has_hooks(optimizer):
                use = self._uses[optimizer] = _Use()
                # No method of this object: it refers to the function, and that to the optimizer.
                optimizer.register_step_post_hook(use.note)

    def lay_out(self) -> None:
        """Has models that the script shares itself add up in one order in each process's life."""
        for name, thing in self._found():
            if isinstance(thing, DistributedDataParallel) and not lay_out_made(thing):
                warn_user(
                    f"A resumed run will differ in its last bits: {name!r} is a "
                    "DistributedDataParallel that adds its gradients up in another order in a "
                    "process's first backward pass. Let the backend wrap the model "
                    "(backend.prepare(model, optimizer)), and register communication hooks, and "
                    "hooks of parameters, on what that returns.",
                    ResumeWarning,
                )

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the gradients that the next step may use; None where there are none."""
        models = [thing for _, thing in self._found() if isinstance(thing, torch.nn.Module)]
        if any(map(keeps_gradients, models)):
            warn_user(
                "The run will not resume bit for bit from here: FSDP keeps the gradients of this "
                "accumulation window to itself (set_requires_gradient_sync(False)), and no "
                "checkpoint holds them. Save at the end of a window, or share the gradients of "
                "each iteration.",
                ResumeWarning,
            )
        spent = {id(gradient) for use in self._uses.values() for gradient in use.spent()}
        if _reads_gradients_first(self._function):
            # It clears them, and looks at them before it does.
            spent = set()
        named = self._named()
        found = gradients.capture_named({n: p for n, p in named.items() if id(p.grad) not in spent})
        if any(map(_divides_in_place, models)) and self._keeps_buckets(named[n] for n in found):
            warn_user(
                "The run will not resume bit for bit from here: gradients lie in the buckets of a "
                "DistributedDataParallel (gradient_as_bucket_view=True) and are not cleared "
                "between iterations. There they are divided by the number of processes, and in "
                "a process's first backward pass multiplied by one over it. Clear them by "
                "zero_grad(set_to_none=True), or leave gradient_as_bucket_view out.",
                ResumeWarning,
            )
        window = gradients.in_windows(models)
        if not found and True not in window:
            return None
        return {"gradients": found, **({"windows": window} if True in window else {})}

    def _keeps_buckets(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Tells whether the next backward pass adds to gradients that lie in buckets.

        Those that were stepped with are cleared first, or filled with zeros: the source says which.
        """
        stepped = {id(one) for use in self._uses.values() for one in use.as_stepped_with()}
        kept = [p.grad for p in parameters if p.grad is not None]
        in_buckets = [
            one for one in kept if one.untyped_storage().nbytes() > one.nbytes or len(kept) == 1
        ]
        added_to = any(id(one) not in stepped for one in in_buckets)
        return added_to or (bool(in_buckets) and _zeroes(self._function))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        if set(state) - {"windows"} != {"gradients"}:
            raise ValueError(
                f"The state holds a state of the process function ({sorted(state)}), and "
                f"{self._function} has no load_state_dict. Use the factory that made the trainer "
                "which wrote it."
            )
        gradients.restore(state["gradients"], self._named())
        models = [thing for _, thing in self._found() if isinstance(thing, torch.nn.Module)]
        gradients.put_in_windows(models, state.get("windows", []))

    def _named(self) -> dict[str, torch.Tensor]:
        found = self._found()
        models = [(n, unshared(thing)) for n, thing in found if isinstance(thing, torch.nn.Module)]
        return gradients.named(models, _optimizers(found))

    def _found(self) -> list[tuple[str, Any]]:
        """Returns the models and optimizers that are known, by name, each once."""
        engine = self._engine()
        told, beside = ({}, {}) if engine is None else (engine.objects, engine.saved_beside)
        found: list[tuple[str, Any]] = []
        seen: set[int] = set()
        for name, thing in [*_flat(told), *_flat(_referred_to(self._function))]:
            if id(thing) not in seen:
                seen.add(id(thing))
                found.append((name, thing))
        # What the function comes to by other ways, such as an object of the user's: if it is
        # trained, it is saved. A model may be known as the wrapper that it lies in.
        known = {id(parameter) for _, thing in found for parameter in _parameters(thing)}
        return found + [
            (f"saved beside.{name}", thing)
            for name, thing in beside.items()
            if id(thing) not in seen
            and not (is_module(thing) and known.issuperset(map(id, _parameters(thing))))
        ]


def _parameters(thing: Any) -> Iterable[torch.Tensor]:
    return thing.parameters() if is_module(thing) else parameters_of(thing)


def _divides_in_place(model: Any) -> bool:
    """Tells whether a model's gradients are divided in its buckets, and by no power of two."""
    if not isinstance(model, DistributedDataParallel) or not model.gradient_as_bucket_view:
        return False
    group: Any = model.process_group
    processes: int = group.size()
    return processes & (processes - 1) != 0


def _optimizers(found: list[tuple[str, Any]]) -> list[tuple[str, torch.optim.Optimizer]]:
    return [(name, thing) for name, thing in found if isinstance(thing, torch.optim.Optimizer)]


class _Use:
    """Which gradients an optimizer has stepped with, and whether it is seen to begin with others.

    A function that clears its gradients before the next backward pass needs those of the last step
    no more. One that is not known to clear them may add to them.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Any, int]] = []
        self._cleared: bool | None = None

    def note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Takes note of a step."""
        now = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if self._noted and self._cleared is not False:
            present = {id(gradient) for gradient in now}
            self._cleared = not any(id(reference()) in present for reference, _ in self._noted)
        self._noted = [(weakref.ref(gradient), gradient._version) for gradient in now]

    def spent(self) -> list[torch.Tensor]:
        """Returns the gradients that will be cleared before anything is added to them."""
        return self.as_stepped_with() if self._cleared else []

    def as_stepped_with(self) -> list[torch.Tensor]:
        """Returns the gradients that nobody has changed since the optimizer's last step."""
        return [
            gradient
            for reference, version in self._noted
            if (gradient := reference()) is not None and gradient._version == version
        ]


def _reads_gradients_first(function: Any, called: bool = False) -> bool:
    """Tells whether a function may look at the gradients of the iteration before.

    Args:
        function: the process function, or one that it calls before it clears them.
        called: whether it is such a one.
    """
    plain = _plain_function(function)
    if plain is None:
        return False
    known = {} if called else _referred_to(plain)
    for does, name in _fetched(plain.__code__):
        if name == "zero_grad" or (name == "grad" and does == "STORE_ATTR"):
            return False
        if name == "grad" and does in _FETCHES:
            return True
        if is_a(other := known.get(name), types.FunctionType) and _reads_gradients_first(
            other, True
        ):
            return True
        if name == "backward" and does in _FETCHES:
            # What is read from here on is this iteration's.
            return False
    return False


def _zeroes(function: Any, called: bool = False) -> bool:
    """Tells whether a function, or one that it calls, may fill gradients with zeros.

    It calls `zero_grad` with an argument that is not plainly True.
    """
    plain = _plain_function(function)
    if plain is None:
        return False
    does = [one for one in dis.get_instructions(plain.__code__) if one.opname not in _SAY_NOTHING]
    for one, then in pairwise(does):
        fetches = one.argval == "zero_grad" and one.opname in _FETCHES
        if fetches and not (then.opname == "CALL" or then.argval is True):
            return True
    known = () if called else _referred_to(plain).values()
    return any(_zeroes(one, True) for one in known if is_a(one, types.FunctionType))


def _plain_function(function: Any) -> types.FunctionType | None:
    """Returns the function of Python's that a method, or an object that can be called, runs."""
    plain = getattr(function, "__func__", function)
    if not inspect.isfunction(plain):
        plain = vars(type(function)).get("__call__")
    return plain if inspect.isfunction(plain) else None


def _fetched(code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """Yields what a function's code does with names, in its order, also in functions inside."""
    for one in dis.get_instructions(code):
        if isinstance(one.argval, types.CodeType):
            yield from _fetched(one.argval)
        else:
            yield one.opname, one.argval


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields models and optimizers, those in lists, tuples and dicts as well."""
    seen: set[int] = set()
    left: list[tuple[Path, Any]] = [((name,), value) for name, value in values.items()][::-1]
    while left:
        path, value = left.pop()
        if is_a(value, torch.nn.Module, torch.optim.Optimizer):
            yield ".".join(map(str, path)), value
            continue
        if is_a(value, Captured):
            value = {"models": value.models, "steps": value.optimizers}
        many = type(value) in (dict, list, tuple) and len(value) <= _MOST
        if many and id(value) not in seen and not is_plain_row(value):
            seen.add(id(value))
            items = list(value.items() if type(value) is dict else enumerate(value))
            left += [((*path, key), item) for key, item in reversed(items)]


def _referred_to(function: Any) -> dict[str, Any]:
    """Returns what a function's names stand for: closure, globals, and its object's attributes."""
    owner = getattr(function, "__self__", None)
    if owner is None and not inspect.isfunction(function):
        owner = function
    found: dict[str, Any] = dict(sorted(getattr(owner, "__dict__", {}).items()))
    function = getattr(function, "__func__", function)
    if inspect.isfunction(function):
        names = inspect.getclosurevars(function)
        found |= {**names.globals, **names.nonlocals}
    return found
