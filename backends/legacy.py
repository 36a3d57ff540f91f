"""Legacy arguments: maps pytorch-ignite's `device`, `amp_mode` and `scaler` to a spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UnknownBackend
from .protocol import Backend
from .registry import default_spec, get

if TYPE_CHECKING:
    import torch
    from torch.amp.grad_scaler import GradScaler

# From the device's type and amp_mode to the spec that does the same.
_SPECS: dict[tuple[str | None, str | None], str] = {
    ("cpu", None): "cpu",
    ("cpu", "amp"): "cpu:fp16",
    ("cuda", None): "cuda",
    ("cuda", "amp"): "cuda-amp",
    ("cuda", "apex"): "apex",
    (None, "amp"): "cuda-amp",
    (None, "apex"): "apex",
    ("xla", None): "xla",
}


def from_arguments(
    device: str | torch.device | None, amp_mode: str | None, scaler: bool | GradScaler
) -> Backend:
    """Returns the backend that the arguments of pytorch-ignite's factories ask for.

    Args:
        device: a torch device, or its name; None: the default backend, or the one `amp_mode` needs.
        amp_mode: None, `amp` (torch's autocast to fp16) or `apex` (NVIDIA's).
        scaler: with `amp`, true for a loss scaler with default settings, or a scaler. False scales
            nothing, as in pytorch-ignite: small fp16 gradients are lost then.

    Raises:
        ValueError: if the arguments do not go together.
        UnknownBackend: if no backend covers the device.
        BackendUnavailable: if the backend cannot run here.
    """
    kind, _, index = (None, "", "") if device is None else str(device).partition(":")
    if amp_mode not in (None, "amp", "apex"):
        raise ValueError(f"amp_mode is {amp_mode!r}. Legal values: None, 'amp', 'apex'.")
    if scaler and amp_mode != "amp":
        raise ValueError(
            f"scaler argument is {scaler}, but amp_mode is {amp_mode}. Consider using "
            "amp_mode='amp'."
        )
    if (kind, amp_mode) == (None, None):
        return get(default_spec())
    spec = _SPECS.get((kind, amp_mode))
    if spec is None:
        if kind not in {known for known, _ in _SPECS}:
            raise UnknownBackend(
                f"No backend covers the device {str(device)!r}. Devices: cpu, cuda, xla. Name a "
                "third party's backend with backend=SPEC."
            )
        raise ValueError(
            f"amp_mode={amp_mode!r} cannot be used with device {str(device)!r}. Legal pairs of "
            f"device and amp_mode: {sorted(_SPECS, key=str)}. Consider amp_mode=None."
        )
    settings: dict[str, Any] = {}
    if index and kind != "cpu":
        settings["index"] = int(index)
    if amp_mode == "amp" and scaler is not True:
        settings["scaler"] = scaler or _no_scaler(spec)
    return get(spec, **settings)


# From pytorch-ignite's step functions to the device they mean where none is given, and amp_mode.
_STEPS: dict[str, tuple[str | None, str | None]] = {
    "supervised_training_step": (None, None),
    "supervised_training_step_amp": (None, "amp"),
    "supervised_training_step_apex": (None, "apex"),
    "supervised_training_step_tpu": ("xla", None),
    "supervised_evaluation_step": (None, None),
    "supervised_evaluation_step_amp": (None, "amp"),
}


def for_step(name: str, device: str | torch.device | None, scaler: GradScaler | None) -> Backend:
    """Returns the backend that one of pytorch-ignite's step functions stands for."""
    usual, amp_mode = _STEPS[name]
    return from_arguments(device or usual, amp_mode, scaler or False)


def _no_scaler(spec: str) -> GradScaler:
    from torch.amp.grad_scaler import GradScaler

    return GradScaler("cpu" if spec.startswith("cpu") else "cuda", enabled=False)
