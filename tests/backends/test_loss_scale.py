"""Loss scaling on the CPU: an overflow skips the step, and scale and tracker resume exactly."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from step_runs import Batch, Run, digits, every_optimizer, make, overflowing, same, small_scaler
from torch.amp.grad_scaler import GradScaler

from crosstrain import backends
from crosstrain.backends import BackendError, StepResult
from crosstrain.backends.legacy import from_arguments
from crosstrain.backends.torch_backend import TorchBackend


@pytest.fixture(name="digits")
def _digits() -> list[Batch]:
    return digits()


# Overflow


@every_optimizer
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_an_overflow_skips_the_step(digits: list[Any], kind: str, max_norm: float | None) -> None:
    run = make("cpu:fp16", kind, small_scaler())
    assert run.step(digits[0], max_norm).applied is True
    before, scale = run.weights(), run.backend.state_dict()["scale"]
    result = run.step(overflowing(digits[1]), max_norm)
    assert result.applied is False
    assert result.loss_scale == scale
    assert same(run.weights(), before)
    assert run.backend.state_dict()["scale"] == scale / 2
    if max_norm is not None:
        assert result.grad_norm is not None
        assert not torch.isfinite(result.grad_norm)
    assert run.step(digits[2], max_norm).applied is True
    assert not same(run.weights(), before)


def test_an_overflow_without_scaling_is_not_hidden(digits: list[Any]) -> None:
    run = make("cpu")
    x, y = digits[0]
    result = run.step((x * float("inf"), y))
    assert result.applied is True
    assert not all(torch.isfinite(w).all() for w in run.weights())


def test_the_scale_grows_after_good_steps(digits: list[Any]) -> None:
    run = make("cpu:fp16", scaler=small_scaler())
    scales = [run.step(batch).loss_scale for batch in digits[:7]]
    assert scales == [1024.0] * 3 + [2048.0] * 3 + [4096.0]


def test_a_scheduler_does_not_hide_that_a_step_was_skipped(digits: list[Any]) -> None:
    run = make("cpu:fp16", scaler=small_scaler())
    # A scheduler replaces `optimizer.step` on the instance.
    torch.optim.lr_scheduler.StepLR(run.optimizer, 1)
    assert run.step(digits[0]).applied
    assert not run.step(overflowing(digits[1])).applied


# Resume


@every_optimizer
@pytest.mark.parametrize("cut", [1, 4, 5, 8])
def test_fp16_resumes_to_the_bit(digits: list[Any], kind: str, cut: int) -> None:
    batches = [*digits[:4], overflowing(digits[4]), *digits[5:11]]

    def steps(run: Run, part: list[Any], first: int) -> list[tuple[bool, float]]:
        shown = []
        for number, batch in enumerate(part, first):
            torch.manual_seed(number)  # dropout
            result = run.step(batch)
            shown.append((result.applied, result.loss_scale))
        return shown

    whole = make("cpu:fp16", kind, small_scaler())
    expected = steps(whole, batches, 0)
    stopped = make("cpu:fp16", kind, small_scaler())
    steps(stopped, batches[:cut], 0)
    file = io.BytesIO()
    torch.save(stopped.state(), file)
    file.seek(0)
    # Another initial scale: what counts is what is loaded.
    resumed = make("cpu:fp16", kind, small_scaler(init_scale=8.0))
    resumed.load(torch.load(file, weights_only=True))
    assert steps(resumed, batches[cut:], cut) == expected[cut:]
    assert same(resumed.weights(), whole.weights())
    assert resumed.backend.state_dict() == whole.backend.state_dict()
    assert (False, 2048.0) in expected, "no step was skipped, so the test shows too little"


def test_state_is_the_same_whether_read_before_or_after_the_boundary(digits: list[Any]) -> None:
    run = make("cpu:fp16", scaler=small_scaler())
    for x, y in digits[:3]:
        run.optimizer.zero_grad()
        with run.backend.autocast():
            loss = torch.nn.functional.cross_entropy(run.model(x), y)
        run.backend.backward(loss, run.optimizer)
        run.backend.step(run.optimizer)
        before = run.backend.state_dict()
        run.backend.sync()
        assert run.backend.state_dict() == before
    assert before["scale"] == 2048.0


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("cpu:fp16", "cpu", "does not scale the loss, and the state has one"),
        ("cpu:fp16", "cpu:bf16", "does not scale the loss, and the state has one"),
        ("cpu", "cpu:fp16", "scales the loss, and the state has none"),
        ("cpu:bf16", "cpu:fp16", "scales the loss, and the state has none"),
    ],
)
def test_a_scale_is_never_dropped_or_made_up(source: str, target: str, words: str) -> None:
    state = backends.get(source).state_dict()
    with pytest.raises(BackendError, match=words):
        backends.get(target).load_state_dict(state)


@pytest.mark.parametrize(("source", "target"), [("cpu", "cpu:bf16"), ("cpu:bf16", "cpu")])
def test_states_without_a_scale_are_interchangeable(source: str, target: str) -> None:
    backends.get(target).load_state_dict(backends.get(source).state_dict())


def test_a_state_without_the_growth_tracker_is_refused() -> None:
    state = backends.get("cpu:fp16").state_dict()
    del state["_growth_tracker"]
    with pytest.raises(BackendError, match="_growth_tracker"):
        backends.get("cpu:fp16").load_state_dict(state)


def test_a_scaler_is_refused_where_nothing_is_scaled() -> None:
    with pytest.raises(BackendError, match="given to 'cpu:bf16', but only fp16"):
        backends.get("cpu:bf16", scaler=GradScaler("cpu"))


def test_a_disabled_scaler_scales_nothing(digits: list[Any]) -> None:
    run = make("cpu:fp16", scaler=GradScaler("cpu", enabled=False))
    assert run.step(digits[0]).loss_scale == 1.0
    assert run.backend.state_dict() == {}
    assert "loss_scaling" not in run.backend.capabilities
    assert "loss_scaling" in backends.get("cpu:fp16").capabilities


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_a_scaler_that_has_disabled_itself_is_not_taken_for_none() -> None:
    scaler = GradScaler("cuda")
    if scaler.is_enabled():
        pytest.skip("torch leaves CUDA's scaler enabled where there is CUDA, or torch_xla")
    for make_backend in (
        lambda: backends.get("cpu:fp16", scaler=scaler),
        lambda: from_arguments("cpu", "amp", scaler),
    ):
        with pytest.raises(BackendError, match=r"GradScaler\('cuda'\) that scales nothing.*'cpu'"):
            make_backend()
    # What says so itself is taken at its word.
    for said in (False, GradScaler("cpu", enabled=False)):
        assert "loss_scaling" not in from_arguments("cpu", "amp", said).capabilities


# Several optimizers


@dataclass
class Pair:
    """Two models with an optimizer each, on one backend."""

    backend: TorchBackend
    models: list[torch.nn.Module]
    optimizers: list[torch.optim.Optimizer]

    def backward(self, batch: Any, *numbers: int) -> None:
        x, y = batch
        with self.backend.autocast():
            losses = [torch.nn.functional.cross_entropy(self.models[n](x), y) for n in numbers]
        chosen = [self.optimizers[n] for n in numbers]
        self.backend.backward(torch.stack(losses).sum(), chosen[0] if len(chosen) == 1 else chosen)

    def step(self, number: int) -> StepResult:
        result = self.backend.step(self.optimizers[number])
        self.optimizers[number].zero_grad()
        return result


def pair() -> Pair:
    runs = [make("cpu:fp16", kind, small_scaler()) for kind in ("sgd", "adamw-fused")]
    return Pair(runs[0].backend, [r.model for r in runs], [r.optimizer for r in runs])


def test_two_optimizers_share_a_scale_and_are_skipped_alone(digits: list[Any]) -> None:
    two = pair()
    two.backward(digits[0], 0)
    two.backward(overflowing(digits[0]), 1)
    results = [two.step(0), two.step(1)]
    two.backend.sync()
    assert [r.applied for r in results] == [True, False]
    assert [r.loss_scale for r in results] == [1024.0, 1024.0]
    # One overflow of either halves the scale of both, once.
    assert two.backend.state_dict()["scale"] == 512.0
    two.backward(digits[1], 0, 1)
    assert [two.step(0).applied, two.step(1).applied] == [True, True]


def test_an_optimizer_may_step_twice_in_an_iteration(digits: list[Any]) -> None:
    two = pair()
    for batch in digits[:3]:
        two.backward(batch, 0)
        assert two.step(0).applied
    two.backward(digits[3], 1)
    result = two.step(1)
    two.backend.sync()
    # The last two steps share a scale, and count as one towards its growth.
    assert result.loss_scale == 1024.0
    assert two.backend.state_dict()["scale"] == 2048.0


def test_gradients_never_mix_two_scales(digits: list[Any]) -> None:
    two = pair()
    two.backward(digits[0], 0, 1)
    two.step(0)
    with pytest.raises(BackendError, match=r"AdamW was given to backward\(\) and not stepped"):
        two.backend.sync()
    with pytest.raises(BackendError, match="stepped in the same iterations"):
        two.backward(digits[1], 0, 1)
    two.step(1)
    two.backend.sync()


def test_a_second_loss_for_the_other_optimizer_keeps_the_scale(digits: list[Any]) -> None:
    two = pair()
    two.backward(overflowing(digits[0]), 0)
    two.backward(digits[0], 1)
    assert two.step(0).applied is False
    two.backward(digits[1], 1)
    assert two.step(1).loss_scale == 1024.0
    two.backend.sync()
    assert two.backend.state_dict()["scale"] == 512.0


def test_accumulated_gradients_carry_one_scale(digits: list[Any]) -> None:
    run = make("cpu:fp16", scaler=small_scaler(growth_interval=1))
    for x, y in digits[:3]:
        with run.backend.autocast():
            loss = torch.nn.functional.cross_entropy(run.model(x), y) / 3
        with run.backend.accumulating(run.model):
            run.backend.backward(loss, run.optimizer)
        run.backend.sync()
    assert run.backend.step(run.optimizer).loss_scale == 1024.0
    run.backend.sync()
    assert run.backend.state_dict()["scale"] == 2048.0


def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    """Torch's fused SGD leaves its buffers unfilled there: they held what was in that memory."""
    for _ in range(20):
        with backends.get("cpu:fp16") as backend:
            weight = torch.nn.Parameter(torch.ones(1000))
            optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)
            # Memory that the buffers may be made in.
            _ = [torch.full((1000,), 7.0).sum() for _ in range(20)]
            for gradient in (float("inf"), 1.0):
                optimizer.zero_grad()
                backend.backward((weight * gradient).sum() / 65536, optimizer)
                result = backend.step(optimizer)
                backend.sync()
                assert result.applied is (gradient == 1.0)
            expected = weight.grad
            assert expected is not None
            assert torch.equal(optimizer.state[weight]["momentum_buffer"], expected)
