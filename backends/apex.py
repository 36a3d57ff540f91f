"""NVIDIA's legacy mixed precision, `apex.amp`, at its opt levels O0 to O3."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .cuda import CudaBackend
from .errors import BackendError, Missing
from .porting import TakenOver, name_parts
from .precision import as_optimizers, require_gradient
from .preparation import place, sort_objects
from .protocol import Availability, StepResult

# The last commit of NVIDIA's apex that has `apex.amp`.
LAST_WITH_AMP = "e13873debc4699d39c6861074b9a3b2a02327f92"

_SOURCE = f"git+https://github.com/NVIDIA/apex@{LAST_WITH_AMP}"
_INSTALL = f"pip install --no-build-isolation {_SOURCE}"


class ApexBackend(CudaBackend):
    """Trains on one NVIDIA GPU with `apex.amp`.

    `O0` is fp32; `O1` casts operations by list; `O2` keeps fp16 weights with fp32 masters, which
    the state holds, because apex saves them nowhere; `O3` is all fp16. All but O0 and O3 scale the
    loss. The order that apex wants, initialise and then load, is the one of `prepare` and
    `load_state_dict`: `prepare` initialises, once a process, with all models and optimizers.

    Args:
        option: the opt level; O1 by default.
        index: the GPU to use instead of LOCAL_RANK's.
        enabled: False makes every call do nothing to the numbers, as `amp.initialize` says it.
        loss_scale: a fixed loss scale, or `dynamic`; None: what the opt level says.
        num_losses: how many losses have a scaler of their own; by default one an optimizer. A
            backward pass uses the scaler of the first optimizer that it is given.
    """

    options = ("O1", "O0", "O2", "O3")
    name = "apex"

    def __init__(
        self,
        option: str | None = None,
        index: int | None = None,
        enabled: bool = True,
        loss_scale: float | str | None = None,
        num_losses: int | None = None,
    ) -> None:
        super().__init__(option, None, index)
        self._amp: Any = None
        self._enabled = enabled
        self._loss_scale = loss_scale
        self._num_losses = num_losses
        self._models: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        # Whether prepare() was called: models may be gone since.
        self._initialised = False
        self._optimizers: list[torch.optim.Optimizer] = []
        self._stepped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._used_scale = 1.0
        scaled = self.option in ("O1", "O2") or loss_scale not in (None, 1.0)
        words = {"loss_scaling": scaled, "master_weights": self._has_masters}
        self.capabilities = frozenset(
            word for word, applies in words.items() if enabled and applies
        )

    @classmethod
    def probe(cls, option: str | None = None) -> Availability:
        """Tells apart: no apex, another package of that name, an apex without amp, no CUDA."""
        missing = amp_absence()
        if missing is not None:
            return Availability(False, *missing, package_versions())
        found = super().probe(option)
        versions = {**found.versions, **package_versions()}
        return Availability(found.ok, found.reason, found.remedy, versions, found.devices)

    def _start(self, stack: ExitStack) -> None:
        super()._start(stack)
        self._amp = importlib.import_module("apex.amp")
        stack.callback(self._undo_patches)

    def _undo_patches(self) -> None:
        """Gives torch its own functions back, which O1 replaced by casting ones."""
        handle: Any = getattr(getattr(self._amp, "_amp_state", None), "handle", None)
        undo = getattr(handle, "_deactivate", None)
        if self.option == "O1" and undo is not None:
            undo()

    def prepare(self, *objects: Any, replicated: bool = True) -> tuple[Any, ...]:
        """Places models on the GPU and has `amp.initialize` cast and patch all of them.

        A model that is prepared already, as for its evaluation, comes back as it is.
        """
        amp = self._opened_amp()
        models, optimizers = sort_objects(objects)
        if self._is_known(models, optimizers):
            return objects
        if self._initialised:
            raise BackendError(
                "apex.amp can be initialised once only, and prepare() has done so. Give it all "
                "models and all optimizers in one call."
            )
        place(models, optimizers, self.device)
        settings: dict[str, Any] = {"opt_level": self.option, "enabled": self._enabled}
        if self._loss_scale is not None:
            settings["loss_scale"] = self._loss_scale
        settings["num_losses"] = self._num_losses or max(1, len(optimizers))
        # No messages on stdout: what they say, a step's result says.
        settings["verbosity"] = 0
        given: list[Any] = [*models, *optimizers]
        if optimizers:
            models, optimizers = amp.initialize(models, optimizers, **settings)
        else:
            models = amp.initialize(models, **settings)
        self._initialised = True
        self._models.update(models)
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._adopt(optimizer)
        made: list[Any] = [*models, *optimizers]
        new = {id(old): initialised for old, initialised in zip(given, made, strict=True)}
        made_of = tuple(new[id(thing)] for thing in objects)
        return self._shared(made_of) if replicated else made_of

    def _is_known(
        self, models: Sequence[torch.nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> bool:
        known = {id(optimizer) for optimizer in self._optimizers}
        return all(model in self._models for model in models) and all(
            id(optimizer) in known for optimizer in optimizers
        )

    def _adopt(self, optimizer: torch.optim.Optimizer) -> None:
        if self._has_masters:
            # Makes the fp32 masters now: a state that is loaded later has to find them.
            lazy: Any = optimizer
            lazy._amp_lazy_init()
        stepped = self._stepped

        def note(called: torch.optim.Optimizer, *_: Any) -> None:
            stepped.add(called)

        # On an overflow apex replaces the optimizer's step for one call, and the real one, whose
        # hook this is, is not called.
        optimizer.register_step_pre_hook(note)

    @property
    def _has_masters(self) -> bool:
        return self._enabled and self.option == "O2"

    def backward(self, loss: torch.Tensor, optimizer: Any) -> None:
        """Runs the backward pass inside `amp.scale_loss`, which unscales the gradients after it."""
        optimizers = as_optimizers(optimizer)
        if not optimizers or not self._is_known((), optimizers):
            raise BackendError(
                "apex.amp scales a loss for the optimizers whose gradients it makes: give "
                "backward() one or several that prepare() was given."
            )
        amp = self._opened_amp()
        count = self._num_losses or max(1, len(self._optimizers))
        ids = [id(known) for known in self._optimizers]
        number = ids.index(id(optimizers[0])) % count
        self._used_scale = self._scale_of(number)
        with amp.scale_loss(loss, optimizers, loss_id=number) as scaled:
            scaled.backward()

    def _scale_of(self, number: int) -> float:
        if not self._enabled:
            return 1.0
        return float(self._opened_amp().state_dict()[f"loss_scaler{number}"]["loss_scale"])

    def unscale(self, optimizer: Any) -> None:
        """Does nothing to the gradients: apex has unscaled them at the end of the backward pass."""
        require_gradient(optimizer)

    def step(self, optimizer: Any, max_norm: float | None = None) -> StepResult:
        """Clips the fp32 gradients and steps; apex skips the step after an overflow."""
        require_gradient(optimizer)
        norm = None
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._masters(optimizer), max_norm)
        self._stepped.discard(optimizer)
        optimizer.step()
        return StepResult(optimizer in self._stepped, norm, self._used_scale)

    def _masters(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        if not self._enabled:
            return [p for group in optimizer.param_groups for p in group["params"]]
        masters: Iterator[torch.Tensor] = self._opened_amp().master_params(optimizer)
        return list(masters)

    def state_dict(self) -> dict[str, Any]:
        """Returns every loss scaler and, with O2, the fp32 masters and their gradients."""
        if not self._enabled or not self._initialised:
            return {}
        scalers = {name: dict(value) for name, value in self._opened_amp().state_dict().items()}
        state: dict[str, Any] = {"amp": scalers, "opt_level": self.option}
        if self._has_masters:
            state["masters"] = [
                [(_saved(p), _saved(p.grad)) for p in self._masters(optimizer)]
                for optimizer in self._optimizers
            ]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; load models and optimizers before."""
        if not self._enabled and not state:
            return
        level = state.get("opt_level", "(none)")
        if level != self.option:
            raise BackendError(
                f"This is apex:{self.option}, and the state is one of apex:{level}: loss scalers "
                "and masters cannot be carried over. Load it on the backend that wrote it."
            )
        if not self._initialised:
            raise BackendError("apex.amp is initialised by prepare(): call it before loading.")
        amp = self._opened_amp()
        here, there = sorted(amp.state_dict()), sorted(state["amp"])
        if here != there:
            raise BackendError(
                f"The state holds the loss scalers {there}, and this backend has {here}. Make it "
                f"with num_losses={len(there)}."
            )
        amp.load_state_dict(state["amp"])
        if self._has_masters:
            self._load_masters(state["masters"])

    def take_over(self, state: Mapping[str, Any]) -> TakenOver:
        """Begins from the state of another backend, or of another opt level.

        With O2 the fp32 masters are made anew from the models, which were loaded into fp16 weights:
        those that `prepare` made are of the weights before. Loss scalers go from O1 to O2 and back.
        """
        lost, begun = name_parts(state), list[str]()
        if not self._enabled:
            return TakenOver(lost, begun)
        if not self._initialised:
            raise BackendError("apex.amp is initialised by prepare(): call it before loading.")
        if self._has_masters:
            self._renew_masters()
            begun.append("the fp32 masters of O2, with the models' weights rounded to fp16")
        amp = self._opened_amp()
        scalers: Mapping[str, Any] = state.get("amp", {})
        both_adapt = {state.get("opt_level"), self.option} == {"O1", "O2"}
        if both_adapt and self._loss_scale is None and set(scalers) == set(amp.state_dict()):
            amp.load_state_dict(scalers)
            return TakenOver(lost[1:], begun)
        if "loss_scaling" in self.capabilities:
            begun.append(f"the loss scale, at {self._scale_of(0):g}")
        return TakenOver(lost, begun)

    def _renew_masters(self) -> None:
        with torch.no_grad():
            for optimizer in self._optimizers:
                patched: Any = optimizer
                stash = patched._amp_stash
                pairs = zip(stash.all_fp16_params, stash.all_fp32_from_fp16_params, strict=True)
                for weight, master in pairs:
                    master.copy_(weight)

    def _load_masters(self, saved: Sequence[Sequence[tuple[Any, Any]]]) -> None:
        present = [self._masters(optimizer) for optimizer in self._optimizers]
        if [len(part) for part in saved] != [len(part) for part in present]:
            raise BackendError(
                f"The state holds {[len(part) for part in saved]} fp32 masters, and the optimizers "
                f"have {[len(part) for part in present]}. Load it into the same models."
            )
        with torch.no_grad():
            for values, masters in zip(saved, present, strict=True):
                for (value, gradient), master in zip(values, masters, strict=True):
                    master.copy_(value)
                    master.grad = None if gradient is None else gradient.to(master)
        for optimizer in self._optimizers:
            patched: Any = optimizer
            patched._master_params_to_model_params()

    def _opened_amp(self) -> Any:
        if self._amp is None:
            raise BackendError("The backend 'apex' is not open: call open() first.")
        return self._amp


def _saved(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach().cpu().clone()


def amp_absence() -> Missing | None:
    """Returns why there is no `apex.amp` here, and what to do; None if there is.

    It looks at the files of the package: to import it runs code, and patches nothing that it could
    undo.
    """
    folders = _folders()
    if not folders:
        return Missing("apex is not installed.", f"Install the last one with amp: {_INSTALL}")
    if _has(folders, "amp") and _has(folders, "multi_tensor_apply"):
        return None
    if _has(folders, "multi_tensor_apply"):
        return Missing(
            f"The apex in {folders[0]} is one whose amp was removed, in May 2025.",
            f"Install the last commit that has it: {_INSTALL}; or use cuda-amp, which needs none.",
        )
    return Missing(
        f"The package in {folders[0]} is called apex, but is not NVIDIA's: PyPI has another.",
        f"Run pip uninstall apex, then {_INSTALL}",
    )


def package_versions() -> dict[str, str]:
    """Returns the version of the installed apex, if it tells one."""
    try:
        return {"apex": version("apex")}
    except PackageNotFoundError:
        return {}


def _folders() -> list[Path]:
    try:
        spec = find_spec("apex")
    except (ImportError, ValueError):
        # A module in sys.modules that has no spec: something made by hand, and not a package.
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin else []


def _has(folders: list[Path], name: str) -> bool:
    return any((folder / name / "__init__.py").is_file() for folder in folders)
