"""Porting: takes over what a backend can use of the state that another one wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .protocol import Backend


class TakenOver(NamedTuple):
    """What became of another backend's state.

    Args:
        lost: what could not be carried over, a phrase each.
        begun: what begins anew, a phrase each that says with what.
    """

    lost: list[str]
    begun: list[str]


def carry_over(backend: Backend, state: Mapping[str, Any]) -> TakenOver:
    """Loads what a backend can use of another backend's state.

    The scale of torch's GradScaler goes from each backend that has one to each other. A backend
    whose state is of another kind may have a method `take_over(state)`, which does this for it.
    """
    takes_over = getattr(backend, "take_over", None)
    if takes_over is not None:
        taken: TakenOver = takes_over(state)
        return taken
    own = backend.state_dict()
    if state and set(state) == set(own):
        backend.load_state_dict(state)
        return TakenOver([], [])
    begun: list[str] = []
    if "scale" in own:
        begun.append(f"the loss scale, at {own['scale']:g}")
    elif own:
        begun.append(f"the state of this backend ({', '.join(sorted(own))})")
    return TakenOver(name_parts(state), begun)


def name_parts(state: Mapping[str, Any]) -> list[str]:
    """Names what a backend's state holds, a phrase each, for people who read that it is lost."""
    parts: list[str] = []
    if "scale" in state:
        parts.append(f"the loss scale of {state['scale']:g}")
    elif "amp" in state:
        parts.append("the loss scalers of apex.amp")
        if "masters" in state:
            parts.append("the fp32 masters of O2, of which the models' states hold the fp16 values")
    elif state:
        parts.append(f"the state of the backend ({', '.join(sorted(state))})")
    return parts


def gradient_scale(state: Mapping[str, Any]) -> float:
    """Returns what gradients are multiplied by while they wait for their step.

    torch's GradScaler leaves them scaled until then; apex unscales them in each backward pass.
    """
    return float(state.get("scale", 1.0))
