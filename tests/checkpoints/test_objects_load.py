"""What objects hold after a load is what was saved; where it is not, it is told."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import ignite.handlers
import numpy as np
import pytest
import torch
from checkpoint_objects import BATCHES, made, same
from ignite.metrics import Accuracy, Average, RunningAverage
from torch import nn

from crosstrain.engine import (
    Checkpoint,
    CheckpointMismatch,
    CheckpointWarning,
    Checks,
    DeterministicEngine,
    Engine,
    Events,
    ModelPart,
    ResumeError,
    ResumeWarning,
    create_supervised_trainer,
    resume_or_start,
)


def engine() -> Engine:
    return Engine(lambda engine, batch: None)


class Holder:
    """An object whose state is one value, given back as a function of it."""

    def __init__(self, value: Any, change: Any = None) -> None:
        self.value = value
        self.change = change or (lambda value: value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = self.change(state["value"])


def anything(generator: random.Random, depth: int = 0) -> Any:
    """Makes a value of any kind that a checkpoint carries."""
    torch_dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
    kinds: list[Any] = [
        lambda: generator.choice([0.0, -0.0, float("nan"), 1e300, 7, True, None, "text", b"b"]),
        lambda: torch.randn(generator.randrange(5), 3).to(generator.choice(torch_dtypes)),
        lambda: np.arange(generator.randrange(1, 9)),
        lambda: torch.tensor([float("nan"), -0.0])[generator.randrange(2) :],
    ]
    if depth < 3:
        kinds += [
            lambda: [anything(generator, depth + 1) for _ in range(generator.randrange(3))],
            lambda: tuple(anything(generator, depth + 1) for _ in range(2)),
            lambda: {key: anything(generator, depth + 1) for key in ("a", 1, ("b", 2))},
        ]
    return generator.choice(kinds)()


def spoiled(value: Any) -> Any:
    """Returns a value that differs in as little as can be."""
    if isinstance(value, dict):
        key = next(iter(value))
        return {**value, key: spoiled(value[key])}
    if isinstance(value, (list, tuple)) and value:
        return type(value)([spoiled(value[0]), *value[1:]])
    if isinstance(value, (torch.Tensor, np.ndarray)) and len(value):
        data = torch.as_tensor(value).clone()
        data.view(-1).view(torch.uint8)[-1] ^= 1
        return data
    return "another" if value != "another" else None


@pytest.mark.parametrize("seed", range(40))
def test_what_is_not_as_saved_is_an_error(tmp_path: Path, seed: int) -> None:
    """Of any state: the least difference is found, and none where there is none."""
    torch.manual_seed(seed)
    value = anything(random.Random(seed))
    Checkpoint({"it": Holder(value)}, tmp_path)(engine())
    path = tmp_path / "it_0.pt"
    proof = Checkpoint.load_objects({"it": Holder(None)}, path)
    assert proof.checked == ["read back bit by bit: it"]
    with pytest.raises(ResumeError, match=r"'it' \(Holder\) does not hold.*\['value'\]"):
        Checkpoint.load_objects({"it": Holder(None, spoiled)}, path)
    with pytest.warns(ResumeWarning, match="does not hold"):
        told = Checkpoint.load_objects(
            {"it": Holder(None, spoiled)}, path, checks=Checks(read_back="warn")
        )
    assert told.differences
    off = Checkpoint.load_objects(
        {"it": Holder(None, spoiled)}, path, checks=Checks(read_back="off")
    )
    assert str(off) == "nothing was checked"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizer_states_keep_the_dtype_that_was_saved(tmp_path: Path, optimizer: Any) -> None:
    """torch casts them to the parameters' dtype while they are loaded."""

    def objects(change: bool) -> dict[str, Any]:
        model = nn.Linear(3, 2).bfloat16()
        made = optimizer(model.parameters(), lr=0.1, **({"momentum": 0.9} if change else {}))
        return {"model": model, "optimizer": made}

    one = objects(optimizer is torch.optim.SGD)
    one["model"](torch.randn(4, 3).bfloat16()).sum().backward()
    one["optimizer"].step()
    for values in one["optimizer"].state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and name != "step":
                values[name] = value.double() + 1e-12
    Checkpoint(one, tmp_path)(engine())
    two = objects(optimizer is torch.optim.SGD)
    Checkpoint.load_objects(two, tmp_path / "checkpoint_0.pt")
    assert same(two["optimizer"].state_dict(), one["optimizer"].state_dict())


def test_a_cast_of_weights_is_told(tmp_path: Path) -> None:
    """A warning where weights are wanted; an error where a run goes on."""
    trainer = engine()
    Checkpoint({"model": nn.Linear(2, 2), "trainer": trainer}, tmp_path)(trainer)
    path = tmp_path / "checkpoint_0.pt"
    half = nn.Linear(2, 2).bfloat16()
    with pytest.warns(CheckpointWarning, match=r"saved as torch.float32 and is torch.bfloat16"):
        Checkpoint.load_objects({"model": half}, path)
    with pytest.raises(ResumeError, match="bfloat16"):
        Checkpoint.load_objects({"model": half, "trainer": trainer}, path)


def test_a_load_in_part_tells_what_is_missing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    Checkpoint({"model": model}, tmp_path)(engine())
    path = tmp_path / "model_0.pt"
    other = nn.Sequential(nn.Linear(2, 3))
    other.extra = nn.Linear(1, 1)
    with pytest.warns(CheckpointWarning, match=r"as before: extra.weight.*left out: 1.weight"):
        Checkpoint.load_objects({"model": other}, path, strict=False)
    assert torch.equal(other[0].weight, model[0].weight)
    for wrong in ({"model": nn.ModuleDict({"a": nn.Linear(2, 2)})}, {"net": nn.BatchNorm1d(3)}):
        with pytest.raises(CheckpointMismatch, match=r"Nothing of .* fits"):
            Checkpoint.load_objects(wrong, path, strict=False)
    saved = {"model": model, "other": nn.Linear(1, 1)}
    Checkpoint(saved, tmp_path / "named")(engine())
    path = tmp_path / "named" / "checkpoint_0.pt"
    with pytest.raises(CheckpointMismatch, match=r"'encoder' .*holds"):
        Checkpoint.load_objects({"encoder": other}, path, strict=False)


def test_groups_that_training_has_added(tmp_path: Path) -> None:
    """The error says what to call first; called, it is loaded."""

    def objects() -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        return {"model": model, "optimizer": torch.optim.Adam(model[1].parameters())}

    one = objects()
    one["optimizer"].add_param_group({"params": one["model"][0].parameters(), "lr": 0.5})
    Checkpoint(one, tmp_path)(engine())
    two = objects()
    with pytest.raises(CheckpointMismatch, match=r"add_param_group\(\) for 1 more before loading"):
        Checkpoint.load_objects(two, tmp_path / "checkpoint_0.pt")
    two["optimizer"].add_param_group({"params": two["model"][0].parameters()})
    Checkpoint.load_objects(two, tmp_path / "checkpoint_0.pt")
    assert two["optimizer"].param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_parts(tmp_path: Path, compiled: bool) -> None:
    """Wherever torch.compile has changed a name, it is found again, and the other way round."""

    def model(compiled: bool) -> nn.Module:
        made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))
        if compiled:
            made[1][1] = torch.compile(made[1][1])
            made[1] = torch.compile(made[1])
        return made

    one, two = model(compiled), model(not compiled)
    Checkpoint({"model": one}, tmp_path)(engine())
    proof = Checkpoint.load_objects({"model": two}, tmp_path / "model_0.pt")
    assert proof.checked
    assert same(list(one.state_dict().values()), list(two.state_dict().values()))


def adapted(seed: int) -> nn.Module:
    """Makes a frozen model with a small trained part, as LoRA does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    torch.manual_seed(seed)
    model.adapter = nn.Sequential(nn.Linear(4, 1, bias=False), nn.BatchNorm1d(1))
    return model


def test_a_part_of_a_model(tmp_path: Path) -> None:
    one = adapted(1)
    trainer = create_supervised_trainer(
        one, torch.optim.SGD(one.adapter.parameters(), 0.1), nn.functional.mse_loss
    )
    to_save = {"adapter": ModelPart(one), "optimizer": trainer.objects["optimizer"]}
    run = resume_or_start(trainer, to_save, tmp_path, every=1)
    run.checkpoint(trainer)
    run.checkpoint.save_handler.close()  # type: ignore[union-attr]
    path = tmp_path / "checkpoint_0.pt"
    saved = torch.load(path)["adapter"]
    assert set(saved) == {name for name in one.state_dict() if name.startswith("adapter")}
    two = adapted(2)
    Checkpoint.load_objects({"adapter": ModelPart(two)}, path)
    assert same(one.state_dict(), two.state_dict())
    with pytest.raises(CheckpointMismatch, match="another one than was saved"):
        Checkpoint.load_objects({"adapter": ModelPart(two.requires_grad_(True))}, path)
    with pytest.raises(CheckpointMismatch, match=r"'adapter'.*part"):
        Checkpoint.load_objects({"adapter": ModelPart(two, lambda name: "weight" in name)}, path)
    with pytest.raises(ValueError, match="is empty"):
        ModelPart(two.requires_grad_(False)).state_dict()
    with pytest.raises(TypeError, match="Module"):
        ModelPart(object())


class Answers:
    """Answers every name, and has a state of its own."""

    def __init__(self) -> None:
        self.count = 3

    def __getattr__(self, name: str) -> Any:
        return mock.MagicMock()

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def test_objects_that_answer_every_name(tmp_path: Path) -> None:
    """Metrics of ignite, and others like them: what they have is asked of their type."""
    average = Average()
    average.update(2.5)
    running = RunningAverage(output_transform=lambda output: output)
    objects = {"nest": {"a": average, "b": [running, Accuracy()]}, "any": Answers()}
    Checkpoint(objects, tmp_path)(engine())
    again = {"nest": {"a": Average(), "b": [running, Accuracy()]}, "any": Answers()}
    again["any"].count = 0  # type: ignore[attr-defined]
    Checkpoint.load_objects(again, tmp_path / "checkpoint_0.pt")
    assert float(again["nest"]["a"].compute()) == 2.5  # type: ignore[index]
    assert again["any"].count == 3  # type: ignore[attr-defined]


def test_an_empty_state_is_told(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Checkpoint({"scaler": scaler, "model": nn.Linear(1, 1)}, tmp_path)(engine())
    proof = Checkpoint.load_objects({"scaler": scaler}, tmp_path / "checkpoint_0.pt")
    assert "'scaler' was saved with an empty state" in str(proof)


@pytest.mark.parametrize("plain", [True, False])
def test_a_plain_engine_says_that_it_repeats_data(tmp_path: Path, plain: bool) -> None:
    """Once at the save, once at the resume, and not where nothing is repeated."""

    def train(end: int) -> list[str]:
        kind = Engine if plain else DeterministicEngine
        trainer = kind(lambda engine, batch: None)
        if end:
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED(once=end), trainer.terminate, goes_on=True
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = resume_or_start(trainer, {"model": nn.Linear(1, 1)}, tmp_path, every=2)
            trainer.run(BATCHES, max_epochs=2)
            run.checkpoint.save_handler.close()  # type: ignore[union-attr]
        return [str(each.message) for each in caught if "repeats some" in str(each.message)]

    for end, words in ((13, "is saved inside an epoch"), (0, "goes on inside an epoch")):
        told = train(end)
        assert len(told) == plain
        assert all(words in text and "DeterministicEngine" in text for text in told)


@pytest.mark.parametrize("loads", ["load_state_dict", "ours", "ignite's"])
@pytest.mark.parametrize(("iteration", "inside"), [(2, True), (len(BATCHES), False)])
def test_a_plain_engine_says_so_however_its_state_was_loaded(
    loads: str, iteration: int, inside: bool
) -> None:
    state = {"iteration": iteration, "max_epochs": 2, "epoch_length": len(BATCHES)}
    trainer = Engine(lambda engine, batch: None)
    if loads == "load_state_dict":
        trainer.load_state_dict(state)
    else:
        loader = Checkpoint if loads == "ours" else ignite.handlers.Checkpoint
        loader.load_objects({"trainer": trainer}, {"trainer": state})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        trainer.run(BATCHES)
    told = [str(each.message) for each in caught if each.category is ResumeWarning]
    assert ["goes on inside an epoch, after 2 of" in one for one in told] == [True] * inside


@pytest.mark.parametrize("kind", ["plain", "deterministic", "factory"])
def test_engine_is_freed_without_the_collector(tmp_path: Path, kind: str) -> None:
    """Neither the trainer nor the model waits for the garbage collector after a resumable run."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            objects = made()
            trainer: Any = objects.pop("trainer")
            if kind == "deterministic":
                trainer = DeterministicEngine(lambda engine, batch: None)
            elif kind == "factory":
                trainer = create_supervised_trainer(
                    objects["model"], objects["optimizer"], nn.functional.mse_loss
                )
            run = resume_or_start(trainer, objects, tmp_path / kind, every=5)
            data = [(batch, torch.zeros(5, 4)) for batch in BATCHES]
            trainer.run(BATCHES if kind == "plain" else data, max_epochs=1)
            gone = [weakref.ref(trainer), weakref.ref(run)]
            del trainer, run, objects
            assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
