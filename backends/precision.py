"""Precision: autocast, loss scaling and clipping, shared by the backends that use torch's own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.amp.autocast_mode import is_autocast_available
from torch.amp.grad_scaler import GradScaler

from .errors import BackendError
from .graphs import repeatable
from .protocol import StepResult

# The context of a pass in full precision; it can be entered again and again.
_NOTHING = nullcontext()

# What the options of a spec mean to autocast; None: no autocast.
DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(slots=True, eq=False)
class _Record:
    """What became of one optimizer since the loss scale was adapted last."""

    called: bool = False  # its step ran
    began: bool = False  # it had no state before that
    found_inf: torch.Tensor | None = None  # the flag that told a fused step to skip
    unscaled: bool = False  # its gradients carry the scale no more, and were not stepped yet
    waiting: bool = False  # it has scaled gradients that were not stepped yet
    stepped: bool = False  # it was stepped, or skipped


class Precision:
    """Runs the numeric half of a training step: casts, scales, clips, steps.

    The loss scale is that of `torch.amp.GradScaler`: doubled after 2000 steps without an overflow,
    halved after one (Micikevicius et al., Mixed Precision Training, 2018).

    Args:
        device_type: the type of device to autocast on, as torch names it.
        dtype: what to autocast to; None: nothing is cast.
        scaler: the loss scaler. None: one with torch's defaults where `dtype` is fp16, whose
            gradients underflow without it, and none otherwise.
    """

    def __init__(
        self, device_type: str, dtype: torch.dtype | None, scaler: GradScaler | None = None
    ) -> None:
        if dtype is not None and not is_autocast_available(device_type):
            raise BackendError(
                f"torch {torch.__version__} has no autocast on '{device_type}', so {dtype} cannot "
                "be used there. Use the option fp32."
            )
        if scaler is not None:
            _refuse_self_disabled(scaler, device_type)
        self.device_type = device_type
        self.dtype = dtype
        if scaler is None and dtype is torch.float16:
            scaler = GradScaler(device_type)
        self.scaler = scaler
        self._records: weakref.WeakKeyDictionary[Any, _Record] = weakref.WeakKeyDictionary()

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled: there is a scaler, and it is enabled."""
        return self.scaler is not None and self.scaler.is_enabled()

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context in which the forward pass and the loss run."""
        if self.dtype is None:
            return _NOTHING
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: torch.Tensor, optimizer: Any = None) -> None:
        """Runs the backward pass of a loss of one element, multiplied by the loss scale if any.

        If one of the optimizers was stepped in this iteration, the scale is adapted first.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            loss.backward()  # type: ignore[no-untyped-call]
            return
        records = [self._watch(one) for one in as_optimizers(optimizer)]
        if not records or any(record.stepped for record in records):
            self.adapt_scale()
        if any(record.unscaled for record in records):
            # Those of a step that was given up: new ones are scaled again.
            self._forget_steps()
        for record in records:
            record.waiting = True
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the loss scale out of an optimizer's gradients, for what comes before its step.

        Whether one of them is not finite is found out here: changing that one later, by clipping
        values, say, does not keep the step from being skipped.
        """
        require_gradient(optimizer)
        if self.scaler is None or not self.scaler.is_enabled():
            return
        record = self._watch(optimizer)
        if not record.unscaled:
            # It may have been loaded, and have scaled nothing yet.
            self._present_scale(optimizer)
            self.scaler.unscale_(optimizer)
            record.unscaled = True

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> StepResult:
        """Unscales, clips and steps; skips the step where a scaled gradient is not finite.

        The scale is adapted later, at the step boundary or when this optimizer's next gradients are
        made: until then, other optimizers whose gradients carry the same scale can be stepped.
        """
        require_gradient(optimizer)
        scaler = self.scaler
        if scaler is None or not scaler.is_enabled():
            norm = None if max_norm is None else clip(optimizer, max_norm)
            optimizer.step()
            return StepResult(True, norm)
        record = self._watch(optimizer)
        record.called, record.found_inf = False, None
        norm, scale = None, self._present_scale(optimizer)
        try:
            if max_norm is not None:
                if not record.unscaled:
                    scaler.unscale_(optimizer)
                norm = clip(optimizer, max_norm)
            scaler.step(optimizer)
        except BaseException:
            # Whatever ended it, Ctrl-C too: the scaler would take the next step for the second one.
            self._forget_steps()
            raise
        record.waiting, record.stepped, record.unscaled = False, True, False
        skip, record.found_inf = record.found_inf, None
        if skip is not None and record.began:
            _clear_if_skipped(optimizer, skip)
        return StepResult(record.called if skip is None else skip == 0, norm, scale)

    def _forget_steps(self) -> None:
        """Has the next step unscale its gradients, though one that failed has unscaled its own."""
        assert self.scaler is not None
        # To the scale that it has: torch forgets who was unscaled, and adapts nothing.
        self.scaler.update(self.scaler.get_scale())
        for record in self._records.values():
            record.stepped = record.waiting = record.unscaled = False

    def adapt_scale(self) -> None:
        """Adapts the loss scale to the steps since the last time, if there were any.

        No optimizer may hold gradients of the present scale any more.
        """
        if self.scaler is None:
            return
        records = list(self._records.values())
        if not any(record.stepped for record in records):
            return
        if any(record.waiting for record in records):
            waiting = [
                type(one).__name__ for one, record in self._records.items() if record.waiting
            ]
            raise BackendError(
                f"The loss scale is to be adapted, but {', '.join(waiting)} was given to "
                "backward() and not stepped since, so its gradients carry the scale as it is. "
                "Optimizers that share a loss scale are stepped in the same iterations; name only "
                "those in backward(), or use bf16, which needs no scale."
            )
        self.scaler.update()
        for record in records:
            record.stepped = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the loss scale and its growth tracker; empty without loss scaling."""
        if self.scaler is None:
            return {}
        self.adapt_scale()
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, on a backend that scales as that one did."""
        if bool(state) != self.scales:
            here, there = ("scales", "has none") if self.scales else ("does not scale", "has one")
            raise BackendError(
                f"This backend {here} the loss, and the state {there}: a loss scale can only be "
                "carried between backends that scale. Load the state on the backend that wrote it."
            )
        if self.scaler is None or not self.scales:
            return
        missing = set(self.scaler.state_dict()) - set(state)
        if missing:
            raise BackendError(f"The state of the loss scale lacks {sorted(missing)}.")
        self.scaler.load_state_dict(dict(state))
        for record in self._records.values():
            record.stepped = record.waiting = record.unscaled = False

    def _present_scale(self, optimizer: torch.optim.Optimizer) -> float | torch.Tensor:
        """Returns the scale that the gradients carry, without waiting for the device."""
        assert self.scaler is not None
        device = optimizer.param_groups[0]["params"][0].device
        # A scaler whose state was loaded steps only when it has scaled something.
        scale: torch.Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale.item() if self.device_type == "cpu" else scale

    def _watch(self, optimizer: torch.optim.Optimizer) -> _Record:
        """Returns the record of an optimizer's last attempted step.

        GradScaler does not tell whether it stepped. It calls the optimizer's step only if it does,
        but a fused optimizer is always called and skips on the device: that one has the flag in its
        attribute `found_inf` during the call.
        """
        record = self._records.get(optimizer)
        if record is None:
            made = record = self._records[optimizer] = _Record()

            def note(called: torch.optim.Optimizer, *_: Any) -> None:
                made.called, made.found_inf = True, getattr(called, "found_inf", None)
                made.began = not called.state

            optimizer.register_step_pre_hook(repeatable(note))
        return record


def _clear_if_skipped(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """Clears the momentum of a fused SGD whose first step was skipped, without asking the host.

    torch makes the buffers of that step without filling them. Skipped, they hold whatever was in
    that memory, and the next step adds to it.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    with torch.no_grad():
        for values in optimizer.state.values():
            buffer = values.get("momentum_buffer")
            if buffer is not None:
                there = skip.to(buffer.device, non_blocking=True) > 0
                buffer.masked_fill_(there, 0.0)


def _refuse_self_disabled(scaler: GradScaler, device_type: str) -> None:
    # A scaler keeps what type of device it is for in no public attribute.
    meant: str = getattr(scaler, "_device", device_type)
    if scaler.is_enabled() or meant == device_type:
        return
    raise BackendError(
        f"The loss scaler is a GradScaler('{meant}') that scales nothing, and this backend trains "
        f"on '{device_type}'. torch disables the scaler of a device that is not there, with no "
        f"more than a warning. Make it with torch.amp.GradScaler('{device_type}'); to scale "
        f"nothing, say so: GradScaler('{device_type}', enabled=False), or scaler=False."
    )


def as_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Returns a list of what is one optimizer, several, or None."""
    if optimizer is None:
        return []
    if isinstance(optimizer, Iterable):
        return list(cast("Iterable[torch.optim.Optimizer]", optimizer))
    return [optimizer]


def require_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Refuses to step an optimizer that no backward pass has reached."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                return
    raise BackendError(
        f"{type(optimizer).__name__} was stepped without a gradient: none of its parameters took "
        "part in the loss since the gradients were last cleared. Check that it holds the "
        "parameters of the model that made the loss, after prepare(), and that they require a "
        f"gradient.{_of_sharded(optimizer)}"
    )


def _of_sharded(optimizer: torch.optim.Optimizer) -> str:
    if not any(hasattr(p, "full_tensor") for g in optimizer.param_groups for p in g["params"]):
        return ""
    return (
        " With Sharding(no_sync=True), FSDP keeps the gradients of an accumulation window to "
        "itself until its last backward pass: where a run may end before that, leave no_sync out."
    )


def clip(optimizer: torch.optim.Optimizer, max_norm: float) -> torch.Tensor:
    """Clips the gradients of an optimizer to a total norm, and returns the norm before, unread."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return _clip_sharded(parameters, max_norm)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def _clip_sharded(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clips where the gradients are spread over processes: the norm is that of all their parts."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # torch has no norm of tensors that are spread and tensors that are not; of one kind it has.
    kinds: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms: list[torch.Tensor] = []
    for alike in kinds.values():
        norm: Any = torch.nn.utils.get_total_norm(alike)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    total = norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)  # the constant is torch's
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return total
