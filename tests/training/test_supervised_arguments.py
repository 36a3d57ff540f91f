"""What the factories' arguments stand for: those of pytorch-ignite, and the spec of a backend."""

from __future__ import annotations

import inspect
from typing import Any

import ignite.engine
import pytest
import torch
from step_runs import small_scaler
from torch import nn
from torch.amp.grad_scaler import GradScaler
from training_runs import (
    assert_same,
    batches,
    loss_fn,
    network,
    sgd,
    state_of,
    train,
    train_by_hand,
    trainer_of,
)

import crosstrain.engine
from crosstrain import backends
from crosstrain.backends import Availability, BackendUnavailable, UnknownBackend
from crosstrain.engine import (
    Engine,
    create_supervised_evaluator,
    create_supervised_trainer,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
    supervised_training_step,
    supervised_training_step_amp,
)

STEP_FUNCTIONS = [
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
]


@pytest.mark.parametrize(
    "name", ["create_supervised_trainer", "create_supervised_evaluator", *STEP_FUNCTIONS]
)
def test_names_and_order_of_arguments_are_those_of_ignite(name: str) -> None:
    ours = inspect.signature(getattr(crosstrain.engine, name)).parameters
    theirs = inspect.signature(getattr(ignite.engine, name)).parameters
    positional = [p.name for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(theirs)
    for parameter in theirs.values():
        required = parameter.default is parameter.empty
        assert (ours[parameter.name].default is parameter.empty) == required
    function = getattr(crosstrain.engine, name)
    assert function.__name__ == name
    assert all(f"    {parameter}: " in function.__doc__ for parameter in ours)


# Which backend


def spec_of(engine: Engine) -> str:
    assert engine.backend is not None
    return f"{engine.backend.name}:{engine.backend.option}"


@pytest.mark.parametrize(
    ("arguments", "spec"),
    [
        ({}, "cpu:fp32"),
        ({"device": "cpu"}, "cpu:fp32"),
        ({"device": torch.device("cpu", 0)}, "cpu:fp32"),
        ({"device": "cpu", "amp_mode": "amp"}, "cpu:fp16"),
        ({"backend": "cpu:bf16"}, "cpu:bf16"),
    ],
)
def test_the_arguments_choose_the_backend(arguments: dict[str, Any], spec: str) -> None:
    assert spec_of(trainer_of(network(), **arguments)) == spec
    assert spec_of(create_supervised_evaluator(network(), **arguments)) == spec


def test_the_variable_chooses_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSTRAIN_BACKEND", "cpu:bf16")
    assert spec_of(trainer_of(network())) == "cpu:bf16"
    assert spec_of(trainer_of(network(), device="cpu")) == "cpu:fp32"
    step = supervised_training_step(model := network(), sgd(model), loss_fn)
    assert step.backend.option == "bf16"


def test_a_backend_is_used_as_it_is() -> None:
    backend = backends.get("cpu:bf16")
    trainer = trainer_of(network(), backend=backend)
    assert trainer.backend is backend
    assert create_supervised_evaluator(network(), backend=trainer.backend).backend is backend


# The loss scaler


def amp_trainer(**arguments: Any) -> tuple[nn.Module, Engine]:
    model = network()
    return model, trainer_of(model, device="cpu", amp_mode="amp", **arguments)


def test_scaler_true_makes_one_and_shows_it_in_the_state() -> None:
    _, trainer = amp_trainer(scaler=True)
    state: Any = trainer.state
    assert isinstance(state.scaler, GradScaler)
    before = state.scaler.state_dict()
    trainer.run(batches(2))
    assert state.scaler.state_dict()["_growth_tracker"] == before["_growth_tracker"] + 2
    assert not hasattr(trainer_of(network()).state, "scaler")


def test_a_scaler_of_the_users_own_is_used_and_not_shown() -> None:
    plain = network()
    scaler, other = small_scaler(), small_scaler()
    model, trainer = amp_trainer(scaler=scaler)
    assert not hasattr(trainer.state, "scaler")
    losses = train_by_hand(plain, sgd(plain), batches(4), [1] * 4, "cpu:fp16", scaler=other)
    assert train(trainer, batches(4)) == losses
    assert_same(state_of(model), state_of(plain))
    assert scaler.state_dict() == other.state_dict()


def test_amp_without_a_scaler_scales_nothing() -> None:
    plain = network()
    model, trainer = amp_trainer()
    losses = train_by_hand(plain, sgd(plain), batches(3), [1] * 3, "cpu:fp16")
    assert train(trainer, batches(3)) == losses
    assert_same(state_of(model), state_of(plain))


# What does not go together


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scaler": True}, ValueError, r"scaler argument is True, but amp_mode is None"),
        ({"scaler": True, "amp_mode": "apex"}, ValueError, r"amp_mode is apex.*amp_mode='amp'"),
        (
            {"amp_mode": "fp16"},
            ValueError,
            r"amp_mode is 'fp16'. Legal values: None, 'amp', 'apex'",
        ),
        ({"device": "mps"}, UnknownBackend, r"No backend covers the device 'mps'"),
        ({"device": "mps", "amp_mode": "amp"}, UnknownBackend, r"'mps'. Devices: cpu, cuda, xla"),
        ({"device": "abacus"}, UnknownBackend, r"No backend covers the device 'abacus'"),
        ({"device": "xla", "amp_mode": "amp"}, ValueError, r"amp_mode='amp' cannot be used with"),
        (
            {"device": "cpu", "amp_mode": "apex"},
            ValueError,
            r"'apex' cannot be used with device 'c",
        ),
        ({"backend": "cpu", "device": "cpu"}, ValueError, r"backend='cpu' was given together with"),
        ({"backend": "cpu", "amp_mode": "amp"}, ValueError, r"amp_mode='amp'.*leave them out"),
        ({"backend": "cpu:fp16", "scaler": True}, ValueError, r"get\(spec, scaler=scaler\)"),
        ({"backend": "cpu:fp8"}, UnknownBackend, r"no option 'fp8'.*Options: fp32, bf16, fp16"),
        ({"backend": "gpu"}, UnknownBackend, r"no backend 'gpu'.*Did you mean 'cuda'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer_of(network(), **arguments)


def test_a_scaler_without_amp_is_refused_by_the_backend() -> None:
    with pytest.raises(backends.BackendError, match="only fp16 gradients are scaled"):
        backends.get("cpu:bf16", scaler=small_scaler())


# The doors


def test_the_training_door_trains_like_the_factory() -> None:
    plain, model = network(), network()
    losses = train_by_hand(plain, sgd(plain), batches(4), [3, 1])
    step = supervised_training_step(model, sgd(model), loss_fn, gradient_accumulation_steps=3)
    assert train(Engine(step), batches(4)) == losses
    assert_same(state_of(model), state_of(plain))


def test_the_amp_door_adapts_its_scale_in_an_engine_that_has_no_backend() -> None:
    plain, model = network(), network()
    scaler, other = small_scaler(), small_scaler()
    losses = train_by_hand(plain, sgd(plain), batches(4), [1] * 4, "cpu:fp16", scaler=other)
    step = supervised_training_step_amp(model, sgd(model), loss_fn, "cpu", scaler=scaler)
    assert train(Engine(step), batches(4)) == losses
    assert_same(state_of(model), state_of(plain))
    assert scaler.state_dict() == other.state_dict()


def test_the_evaluation_doors_predict() -> None:
    model = network().eval()
    x, y = batches(1)[0]
    engine = Engine(supervised_evaluation_step(model))
    y_pred, label = engine.run([(x, y)]).output
    assert torch.equal(y_pred, model(x))
    assert not y_pred.requires_grad
    assert torch.equal(label, y)
    half = Engine(supervised_evaluation_step_amp(model, "cpu")).run([(x, y)]).output[0]
    assert half.dtype is torch.float16


def take_away(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a backend unavailable, where it is not so by itself."""
    if backends.probe(spec).ok:
        gone = Availability(False, "It was taken away.", "Give it back.")
        monkeypatch.setattr(type(backends.get(spec)), "probe", lambda option=None: gone)


@pytest.mark.parametrize(
    ("name", "device", "spec"),
    [
        ("supervised_training_step", "cuda", "cuda"),
        ("supervised_training_step_amp", None, "cuda-amp"),
        ("supervised_training_step_apex", None, "apex"),
        ("supervised_training_step_tpu", None, "xla"),
        ("supervised_evaluation_step", "xla", "xla"),
        ("supervised_evaluation_step_amp", None, "cuda-amp"),
    ],
)
def test_a_door_to_hardware_that_is_absent_says_what_to_do(
    name: str, device: str | None, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away(spec, monkeypatch)
    model = network()
    arguments = (model,) if "evaluation" in name else (model, sgd(model), loss_fn)
    with pytest.raises(BackendUnavailable) as refused:
        getattr(crosstrain.engine, name)(*arguments, device=device)
    assert refused.value.spec.startswith(spec)
    assert refused.value.reason
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("device", "amp_mode"), [("cuda", None), ("cuda:1", "amp"), (None, "amp"), ("xla", None)]
)
def test_a_factory_for_hardware_that_is_absent_says_what_to_do(
    device: Any, amp_mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "xla" if device == "xla" else "cuda-amp" if amp_mode else "cuda"
    take_away(spec, monkeypatch)
    for make in (trainer_of, create_supervised_evaluator):
        with pytest.raises(BackendUnavailable, match="Remedy: "):
            make(network(), device=device, amp_mode=amp_mode)


def test_a_model_that_lies_on_another_device_is_not_moved_silently() -> None:
    with torch.device("meta"):
        model = nn.Linear(64, 10)
    message = r"'weight' is on 'meta', and the backend 'cpu' trains on 'cpu'"
    with pytest.raises(ValueError, match=message):
        create_supervised_trainer(model, sgd(model), loss_fn)
    with pytest.raises(ValueError, match=message):
        create_supervised_evaluator(model)
