"""Porting a run: goes on from a state that another backend wrote, and says what was lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crosstrain.backends import porting
from crosstrain.engine.data.streams import SampleStreams
from crosstrain.engine.errors import ResumeWarning, warn_user
from crosstrain.engine.training.gradients import scaled

from .snapshot import differences, load_step, step_state

if TYPE_CHECKING:
    from crosstrain.backends import Backend


def port(
    snapshot: Mapping[str, Any],
    backend: Backend | None,
    step: Any,
    now: Mapping[str, Any],
) -> dict[str, Any]:
    """Loads the states of backend and step as far as they fit; says in one warning what does not.

    Args:
        snapshot: the state of an engine with another backend, or another precision.
        backend: the one that goes on.
        step: the process function.
        now: the conditions of this process.

    Returns:
        The snapshot as this backend would have written it.
    """
    then = snapshot["environment"]
    carried: Mapping[str, Any] = snapshot["backend"] or {}
    if backend is None:
        taken = porting.TakenOver(porting.name_parts(carried), [])
    else:
        taken = porting.carry_over(backend, carried)
    own = None if backend is None else backend.state_dict()
    ratio = porting.gradient_scale(own or {}) / porting.gradient_scale(carried)
    _load_window(snapshot["step"], ratio, step, taken)
    states = {**snapshot["rng_states"], "device": _device_states(snapshot, backend, taken)}
    lost, begun = "; ".join(taken.lost), "; ".join(taken.begun)
    changed = "; ".join(differences(then, now, but=("backend", "devices")))
    warn_user(
        f"The backend was {then['backend']!r} and is {now['backend']!r}. The batches and "
        "augmentations go on as they were; the numbers agree within the tolerance that "
        "docs/porting.md states. "
        + (f"Not carried over: {lost}. " if lost else "Everything was carried over. ")
        + (f"Begins anew: {begun}. " if begun else "")
        + (f"Other conditions have changed: {changed}." if changed else ""),
        ResumeWarning,
    )
    ours = {"rng_states": states, "backend": own, "step": step_state(step)}
    return {**snapshot, **ours, "environment": dict(now)}


def _load_window(state: Any, ratio: float, step: Any, taken: porting.TakenOver) -> None:
    """Loads a step's state, its gradients at this backend's loss scale."""
    gradients = state.get("gradients") if isinstance(state, Mapping) else None
    if not isinstance(gradients, Mapping) or not gradients:
        load_step(step, state)
        return
    ours = {name: scaled(gradient, ratio) for name, gradient in gradients.items()}
    reason = "which had overflowed"
    if all(gradient is not None for gradient in ours.values()):
        try:
            load_step(step, {**state, "gradients": ours})
        except (RuntimeError, ValueError) as error:
            # A backend may keep gradients of other parameters than the models', or of another type.
            reason = f"which do not fit ({error})"
        else:
            return
    load_step(step, {**state, "filled": 0, "planned": 0, "gradients": {}})
    many = f"{state['filled']} iterations" if "filled" in state else "iterations so far"
    taken.lost.append(f"the gradients of the accumulation window's {many}, {reason}")
    taken.begun.append("the window")


def _device_states(
    snapshot: Mapping[str, Any], backend: Backend | None, taken: porting.TakenOver
) -> dict[str, Any]:
    """Returns random states that the device can set: the saved ones, or those of a seed."""
    saved: Mapping[str, Any] = snapshot["rng_states"]["device"]
    present = {} if backend is None else backend.rng_state()
    if set(saved) == set(present):
        return dict(saved)
    if saved:
        taken.lost.append(f"the random states of the device ({', '.join(sorted(saved))})")
    if backend is None or not present:
        return {}
    # What is drawn from here on follows from the run and the place: it is the same each time.
    streams = SampleStreams(snapshot["seed"])
    backend.seed(streams.python(snapshot["iteration"]).getrandbits(63))
    taken.begun.append(
        f"the random states of the device ({', '.join(sorted(present))}), with a seed from the "
        f"run's seed and iteration {snapshot['iteration']}"
    )
    return backend.rng_state()
