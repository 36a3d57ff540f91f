"""Conformance of the training step: what it computes, clips, skips and reports."""

from __future__ import annotations

from typing import Any

import torch

from crosstrain.backends import StepResult

from .case import (
    LEARNING_RATE,
    Case,
    Training,
    backward,
    by_hand,
    distance,
    expect,
    expect_error_passes,
    expect_refusal,
    is_close,
    plain_model,
    small_model,
    whole,
)

STEPS = 30


def check_prepare(case: Case) -> None:
    """It returns what it was given, on the device, the optimizer with the model's weights."""
    with case.opened() as backend:
        expect(tuple(backend.prepare()) == (), "prepare() with nothing does not return ().")
        model = small_model()
        names = {name: value.shape for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        prepared = backend.prepare(model, optimizer)
        expect(len(prepared) == 2, f"prepare() took 2 objects and returned {len(prepared)}.")
        model, optimizer = prepared
        expect(
            isinstance(model, torch.nn.Module), "prepare() did not return the model in its place."
        )
        found = {name: value.shape for name, value in model.state_dict().items()}
        expect(found == names, "prepare() changed the names or shapes in the model's state.")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if "master_weights" in backend.capabilities:
            expect(
                _is_trained(backend, model, optimizer),
                "After prepare() a step does not change the model: its optimizer's master weights "
                "do not reach it.",
            )
        else:
            expect(
                {id(p) for p in model.parameters()} == held,
                "After prepare() the optimizer holds other parameters than the model: it would "
                "train nothing. If these are copies whose values reach the model, have "
                "'master_weights' in the capabilities.",
            )
        where = {p.device.type for p in [*model.parameters(), *model.buffers()]}
        expect(
            where == {backend.device.type},
            f"After prepare() the model is on {sorted(where)}; the device is {backend.device}.",
        )
        (again,) = backend.prepare(model)
        expect(
            {name: value.shape for name, value in again.state_dict().items()} == names,
            "prepare() of a model that is prepared, as for its evaluation, changed it.",
        )


def _is_trained(backend: Any, model: Any, optimizer: Any) -> bool:
    """Tell whether a step reaches a model whose optimizer holds copies, such as fp32 masters."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(backend, model, optimizer, 0)
    backend.step(optimizer)
    backend.sync()
    pairs = zip(before, model.parameters(), strict=True)
    return any(not torch.equal(old, new) for old, new in pairs)


def check_autocast(case: Case) -> None:
    """Its autocast can be entered again and again, inside itself too, and ends with its block."""
    with case.opened() as backend:
        kind = backend.device.type
        before = torch.is_autocast_enabled(kind)
        for _ in range(2):
            with backend.autocast(), backend.autocast():
                pass
            expect(torch.is_autocast_enabled(kind) == before, "autocast() outlives its block.")
        expect_error_passes(backend.autocast(), "autocast")
        expect(torch.is_autocast_enabled(kind) == before, "autocast() outlives an error.")


def check_step_result(case: Case) -> None:
    """Its step reports whether it was applied, the norm if it was asked for, and the loss scale."""
    with case.opened() as backend:
        backend.sync()
        training = Training(backend)
        plain: Any = training.step(0)
        expect(isinstance(plain, StepResult), f"step() returned {type(plain).__name__}.")
        expect(plain.applied is True, "An ordinary step says that it was not applied.")
        expect(plain.grad_norm is None, "step() gives a norm that nobody asked for.")
        expect(plain.loss_scale > 0, f"step() gives a loss scale of {plain.loss_scale}.")
        norm = training.step(1, max_norm=1.0).grad_norm
        expect(
            isinstance(norm, torch.Tensor) and norm.numel() == 1,
            f"step(max_norm=...) gives {norm!r} as the norm: a tensor of one element is wanted.",
        )
        backend.sync()


def check_agreement(case: Case) -> None:
    """Its training follows the one of plain torch in fp32 on the CPU."""
    theirs, weights, _ = by_hand(STEPS)
    with case.opened() as backend:
        training = Training(backend)
        ours = training.losses(0, STEPS)
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            expect(
                is_close(mine, other, case.tolerance),
                f"The loss at step {number} is {mine:.6g}; in fp32 on the CPU it is {other:.6g}.",
            )
        away = distance(training.weights(), weights) / distance(weights, torch.zeros(()))
        expect(away <= case.tolerance, f"The weights at the end are {away:.1%} away from fp32's.")


def check_accumulation(case: Case) -> None:
    """Two backward passes of half the loss give the step of one."""
    with case.opened() as backend:
        once = Training(backend)
        once.step(0)
        expected = once.weights()
    with case.opened() as backend:
        halves = Training(backend)
        start = halves.weights()
        halves.optimizer.zero_grad()
        with backend.accumulating(halves.model):
            halves.backward(0, 0.5)
        backend.sync()
        halves.backward(0, 0.5)
        expect(backend.step(halves.optimizer).applied, "The step after two passes was not applied.")
        backend.sync()
        away = distance(halves.weights(), expected) / distance(expected, start)
        expect(
            away <= case.tolerance,
            f"Two passes of half the loss change the weights by {away:.1%} more or less than one.",
        )


def check_clipping(case: Case) -> None:
    """It clips the true gradient, not the scaled one, and gives its norm before clipping."""
    _, _, norm = by_hand(1)
    limit = norm / 10
    with case.opened() as backend:
        training = Training(backend)
        start = training.weights()
        result = training.step(0, max_norm=limit)
        expect(result.grad_norm is not None, "step(max_norm=...) gives no norm.")
        assert result.grad_norm is not None
        found = float(result.grad_norm)
        expect(
            is_close(found, norm, case.tolerance),
            f"The gradient's norm is {norm:.6g}, and step() says {found:.6g}.",
        )
        change = distance(training.weights(), start) / LEARNING_RATE
        expect(
            is_close(change, limit, case.tolerance),
            f"Clipped to {limit:.6g}, the gradient that was applied has the norm {change:.6g}.",
        )


def check_missing_gradient(case: Case) -> None:
    """It refuses to step an optimizer that no backward pass has reached."""
    with case.opened() as backend:
        training = Training(backend)
        expect_refusal(
            lambda: backend.step(training.optimizer),
            "a missing gradient",
            "It steps an optimizer without any gradient, and says nothing.",
        )


def check_two_optimizers(case: Case) -> None:
    """It trains two models with an optimizer each, from one loss, stepped one after the other."""
    with case.opened() as backend:
        models = [plain_model(), small_model()]
        optimizers = [torch.optim.SGD(m.parameters(), lr=LEARNING_RATE) for m in models]
        first, second, *optimizers = backend.prepare(*models, *optimizers)
        start = [[whole(p).cpu().clone() for p in m.parameters()] for m in (first, second)]
        backward(backend, lambda x: first(x) + second(x), optimizers, 0)
        for optimizer in optimizers:
            expect(backend.step(optimizer).applied, "One of two optimizers was not stepped.")
        backend.sync()
        for number, (model, before) in enumerate(zip((first, second), start, strict=True)):
            pairs = zip(model.parameters(), before, strict=True)
            trained = any(not torch.equal(whole(p).cpu(), old) for p, old in pairs)
            expect(trained, f"Model {number} of two was not trained.")


def check_overflow(case: Case) -> None:
    """Where a gradient is not finite it skips the step, says so, and lowers the scale."""
    with case.opened() as backend:
        training = Training(backend)
        scale = training.step(0).loss_scale
        before = training.weights()
        for limit in (None, 1.0):
            result = training.step(1, max_norm=limit, factor=float("inf"))
            expect(result.applied is False, "A step with infinite gradients is said to be applied.")
            expect(
                torch.equal(training.weights(), before),
                "A step with infinite gradients changed the weights.",
            )
        after = training.step(2)
        expect(after.applied is True, "The step after an overflow was not applied.")
        expect(
            after.loss_scale < scale, f"The loss scale is still {after.loss_scale} after overflows."
        )
