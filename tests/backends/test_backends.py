"""One step of training on the CPU, at each precision: cast, clipped, repeatable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from step_runs import Batch, digits, every_optimizer, make, overflowing, same, small_scaler

from crosstrain import backends
from crosstrain.backends import BackendError, World

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

every_precision = pytest.mark.backends("cpu", "cpu:bf16", "cpu:fp16")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="digits")
def _digits() -> list[Batch]:
    return digits()


# The world


def test_without_torchrun_there_is_one_process() -> None:
    assert World.from_environment() == World(0, 0, 1)


def test_the_world_of_torchrun() -> None:
    variables = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert World.from_environment(variables) == World(rank=5, local_rank=1, size=8)


@pytest.mark.parametrize("others", [(), ("RANK",), ("LOCAL_RANK",)])
def test_a_world_of_one_process_needs_no_rank(others: tuple[str, ...]) -> None:
    variables = {"WORLD_SIZE": "1", **dict.fromkeys(others, "0")}
    assert World.from_environment(variables) == World(0, 0, 1)
    with pytest.raises(BackendError, match="is not set, but"):
        World.from_environment({"WORLD_SIZE": "1", "RANK": "1"})


@pytest.mark.parametrize("present", [TORCHRUN[:1], TORCHRUN[1:], TORCHRUN[::2]])
def test_a_world_that_is_half_set_is_refused(present: tuple[str, ...]) -> None:
    with pytest.raises(BackendError) as caught:
        World.from_environment(dict.fromkeys(present, "0"))
    missing, _, found = str(caught.value).partition(" is not set, but ")
    assert set(missing.split(", ")) == set(TORCHRUN) - set(present)
    assert all(name in found.split(" is. ")[0] for name in present)


@pytest.mark.parametrize("text", ["-1", "one", "", "1.0"])
def test_a_rank_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BackendError, match=f"RANK='{text}'"):
        World.from_environment({"RANK": text, "LOCAL_RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize("values", [("2", "0", "2"), ("0", "0", "0"), ("1", "2", "4")])
def test_a_world_that_contradicts_itself_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(BackendError, match="contradict each other"):
        World.from_environment(dict(zip(TORCHRUN, values, strict=True)))


@pytest.mark.parametrize("spec", ["cpu", "cpu:fp16"])
def test_a_world_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    for name, value in zip(TORCHRUN, ("0", "0", "2"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match="WORLD_SIZE=2"):
        backends.get(spec).open()


# Precision


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("cpu", torch.float32), ("cpu:bf16", torch.bfloat16), ("cpu:fp16", torch.float16)],
)
def test_the_forward_pass_runs_at_the_precision_asked_for(spec: str, dtype: torch.dtype) -> None:
    run = make(spec)
    with run.backend.autocast():
        assert run.model(torch.ones(2, 64)).dtype is dtype
    assert run.model(torch.ones(2, 64)).dtype is torch.float32


@every_optimizer
@every_precision
def test_training_learns(digits: list[Any], backend_spec: str, kind: str) -> None:
    run = make(backend_spec, kind)
    for batch in digits[:50]:
        assert run.step(batch).applied
    x, y = digits[52]
    run.model.eval()
    assert (run.model(x).argmax(1) == y).float().mean() > 0.7


def test_fp32_does_what_a_step_written_by_hand_does(digits: list[Any]) -> None:
    run, hand = make("cpu"), make("cpu")
    torch.manual_seed(0)
    for batch in digits[:5]:
        run.step(batch, max_norm=0.5)
    torch.manual_seed(0)
    for x, y in digits[:5]:
        hand.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(hand.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(hand.model.parameters(), 0.5)
        hand.optimizer.step()
    assert same(run.weights(), hand.weights())


def test_fp16_does_what_a_step_written_by_hand_does(digits: list[Any]) -> None:
    run, hand, scaler = make("cpu:fp16", scaler=small_scaler()), make("cpu"), small_scaler()
    batches = [*digits[:4], overflowing(digits[4]), *digits[5:9]]
    torch.manual_seed(0)
    for batch in batches:
        run.step(batch, max_norm=0.5)
    torch.manual_seed(0)
    for x, y in batches:
        hand.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = torch.nn.functional.cross_entropy(hand.model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(hand.optimizer)
        torch.nn.utils.clip_grad_norm_(hand.model.parameters(), 0.5)
        scaler.step(hand.optimizer)
        scaler.update()
    assert same(run.weights(), hand.weights())
    assert run.backend.state_dict() == scaler.state_dict()


def test_a_step_reports_what_became_of_it(digits: list[Any]) -> None:
    plain = make("cpu").step(digits[0])
    assert (plain.applied, plain.grad_norm, plain.loss_scale) == (True, None, 1.0)
    scaled = make("cpu:fp16", scaler=small_scaler()).step(digits[0], max_norm=1e9)
    assert scaled.applied
    assert scaled.loss_scale == 1024.0
    clipped = make("cpu").step(digits[0], max_norm=1e9)
    assert clipped.grad_norm is not None
    assert scaled.grad_norm is not None
    # The norm is that of the unscaled gradients.
    assert scaled.grad_norm.item() == pytest.approx(clipped.grad_norm.item(), rel=0.02)


@every_precision
def test_clipping_limits_the_change_of_the_weights(digits: list[Any], backend_spec: str) -> None:
    run = make(backend_spec)
    before = run.weights()
    result = run.step(digits[0], max_norm=1e-3)
    assert result.grad_norm is not None
    assert result.grad_norm > 1e-3
    change = [a - b for a, b in zip(run.weights(), before, strict=True)]
    norm = torch.cat([c.flatten() for c in change]).norm().item()
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-2)  # the learning rate times the limit


# Mistakes


@every_precision
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_without_a_gradient_is_refused(backend_spec: str, max_norm: float | None) -> None:
    run = make(backend_spec)
    with pytest.raises(BackendError, match="SGD was stepped without a gradient"):
        run.backend.step(run.optimizer, max_norm)


def test_prepare_refuses_what_is_no_model_and_no_optimizer() -> None:
    with pytest.raises(TypeError, match="got dict"):
        backends.get("cpu").prepare({"model": 1})


def test_prepare_returns_what_it_was_given_in_order() -> None:
    run = make("cpu")
    assert run.backend.prepare(run.optimizer, run.model) == (run.optimizer, run.model)
    assert run.backend.prepare() == ()


# Determinism


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_deterministic_restores_the_flags(
    before: tuple[bool, bool], warn_only: bool, fails: bool
) -> None:
    def flags() -> tuple[bool, bool]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )

    def inside() -> None:
        assert flags() == (True, warn_only)
        if fails:
            raise KeyError

    ours = flags()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        context = backends.get("cpu").deterministic(warn_only)
        assert flags() == before, "making the context must set nothing"
        if fails:
            with pytest.raises(KeyError), context:
                inside()
        else:
            with context:
                inside()
        assert flags() == before
    finally:
        torch.use_deterministic_algorithms(ours[0], warn_only=ours[1])


def test_the_null_backend_records_what_it_is_asked() -> None:
    null: Any = backends.get("null")
    with null as opened:
        assert opened.prepare("model") == ("model",)
        with opened.autocast(), opened.deterministic():
            opened.put(1)
        opened.step(None, 2.0)
        opened.sync()
    assert null.calls == [
        *("open", "prepare", "autocast", "deterministic", "put", "end deterministic"),
        *("end autocast", "step max_norm=2.0", "sync", "close"),
    ]
