"""Save handlers, what they are given and when, and ModelCheckpoint."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_objects import names, same

from crosstrain.engine import (
    BaseSaveHandler,
    Checkpoint,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointWarning,
    DiskSaver,
    Engine,
    Events,
    ModelCheckpoint,
    create_supervised_trainer,
    global_step_from_engine,
)


def test_functions_as_save_handlers() -> None:
    two: list[str] = []
    three: list[Any] = []
    engine = Engine(lambda engine, batch: None)
    model = torch.nn.Linear(1, 1)
    Checkpoint({"model": model}, lambda checkpoint, filename: two.append(filename))(engine)
    Checkpoint({"model": model}, lambda *arguments: three.append(arguments))(engine)
    assert two == ["model_0.pt"]
    (state, filename, metadata) = three[0]
    assert filename == "model_0.pt"
    assert same(state, model.state_dict())
    assert metadata["basename"] == "model"
    assert metadata["priority"] == 0


def test_a_type_error_of_a_save_handler_is_its_own() -> None:
    calls: list[int] = []

    def broken(checkpoint: Any, filename: str, metadata: Any) -> None:
        calls.append(1)
        raise TypeError("inside the handler")

    handler = Checkpoint({"model": torch.nn.Linear(1, 1)}, broken)
    with pytest.raises(TypeError, match="inside the handler"):
        handler(Engine(lambda engine, batch: None))
    assert calls == [1]
    assert handler.last_checkpoint is None


def test_the_old_file_is_removed_after_the_new_one_is_there() -> None:
    log: list[str] = []

    class Store(BaseSaveHandler):
        def __call__(
            self,
            checkpoint: Mapping[str, Any],
            filename: str,
            metadata: Mapping[str, Any] | None = None,
        ) -> None:
            log.append(f"+{filename}")

        def remove(self, filename: str) -> None:
            log.append(f"-{filename}")

    engine = Engine(lambda engine, batch: None)
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, Checkpoint({"m": torch.nn.Linear(1, 1)}, Store())
    )
    engine.run([0] * 3)
    assert log == ["+m_1.pt", "+m_2.pt", "-m_1.pt", "+m_3.pt", "-m_2.pt"]


def test_wrapped_models_are_saved_as_what_they_wrap(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model)
    wrapped = {"parallel": torch.nn.DataParallel(model), "compiled": compiled}
    Checkpoint(wrapped, tmp_path)(Engine(lambda engine, batch: None))
    path = tmp_path / "checkpoint_0.pt"
    saved = torch.load(path)
    assert set(saved["parallel"]) == set(saved["compiled"]) == {"weight", "bias"}
    others = {"parallel": torch.nn.Linear(2, 2), "compiled": torch.nn.Linear(2, 2)}
    Checkpoint.load_objects(others, path)
    assert torch.equal(others["compiled"].weight, model.weight)
    Checkpoint.load_objects(
        {"parallel": torch.nn.DataParallel(others["parallel"]), "compiled": others["compiled"]},
        path,
    )
    # As pytorch-ignite saves a compiled model.
    Checkpoint.load_objects({"net": others["compiled"]}, {"net": compiled.state_dict()})


def test_nests_of_objects(tmp_path: Path) -> None:
    def nest(value: float) -> dict[str, Any]:
        layers = [torch.nn.Linear(1, 1) for _ in range(3)]
        for index, layer in enumerate(layers):
            torch.nn.init.constant_(layer.weight, value + index)
        return {"generators": layers[:2], "named": {"critic": layers[2]}}

    written, read = nest(1.0), nest(9.0)
    Checkpoint(written, tmp_path)(Engine(lambda engine, batch: None))
    path = tmp_path / "checkpoint_0.pt"
    Checkpoint.load_objects(read, path)
    assert [layer.weight.item() for layer in read["generators"]] == [1.0, 2.0]
    assert read["named"]["critic"].weight.item() == 3.0
    read["generators"].append(torch.nn.Linear(1, 1))
    with pytest.raises(CheckpointMismatch, match=r"'generators' is a list of 3.*holds 2"):
        Checkpoint.load_objects(read, path)


@pytest.mark.parametrize("objects", [1, 2])
def test_include_self(tmp_path: Path, objects: int) -> None:
    models = {f"m{n}": torch.nn.Linear(1, 1) for n in range(objects)}
    engine = Engine(lambda engine, batch: None)
    handler = Checkpoint(dict(models), tmp_path, n_saved=2, include_self=True)
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run([0] * 3)
    other = Checkpoint(
        dict(models), DiskSaver(tmp_path, require_empty=False), n_saved=2, include_self=True
    )
    Checkpoint.load_objects({**models, "checkpointer": other}, str(handler.last_checkpoint))
    assert other.state_dict() == handler.state_dict()
    engine.state.iteration = 7
    other(engine)
    name = "m0" if objects == 1 else "checkpoint"
    assert names(tmp_path) == [f"{name}_3.pt", f"{name}_7.pt"]


def test_the_event_fires_when_the_file_is_there(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    engine.register_events(*type(Checkpoint.SAVED_CHECKPOINT))
    handler = Checkpoint({"m": torch.nn.Linear(1, 1)}, tmp_path)
    engine.add_event_handler(Events.ITERATION_COMPLETED(every=2), handler)
    seen: list[bool] = []

    @engine.on(Checkpoint.SAVED_CHECKPOINT)
    def check(engine: Engine) -> None:
        path = tmp_path / f"m_{engine.state.iteration}.pt"
        seen.append(handler.last_checkpoint == path and path.exists())

    engine.run([0] * 5)
    assert seen == [True, True]


def test_reset_forgets_what_was_saved(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    handler = Checkpoint({"m": torch.nn.Linear(1, 1)}, tmp_path)
    engine.add_event_handler(Events.COMPLETED, handler)
    engine.run([0])
    handler.reset()
    assert handler.last_checkpoint is None
    engine.run([0] * 2)
    assert names(tmp_path) == ["m_1.pt", "m_2.pt"]


def test_reload_objects_by_the_parts_of_a_name(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    model = torch.nn.Linear(1, 1)
    handler = Checkpoint(
        {"model": model},
        tmp_path,
        filename_prefix="best",
        score_function=lambda engine: engine.state.iteration / 10,
        score_name="acc",
        n_saved=None,
        global_step_transform=lambda engine, _: engine.state.iteration,
    )

    @engine.on(Events.ITERATION_COMPLETED)
    def change(engine: Engine) -> None:
        torch.nn.init.constant_(model.weight, engine.state.iteration)

    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run([0] * 3)
    other = torch.nn.Linear(1, 1)
    handler.reload_objects({"model": other}, global_step=2, score="0.2000")
    assert other.weight.item() == 2.0
    with pytest.raises(CheckpointNotFound, match=r"best_model_4_acc=0\.2000\.pt"):
        handler.reload_objects({"model": other}, global_step=4, score="0.2000")
    with pytest.raises(AttributeError, match="DiskSaver"):
        Checkpoint({"m": model}, lambda *_: None).reload_objects({"m": model})


def test_model_checkpoint(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    handler = ModelCheckpoint(tmp_path, "prefix", n_saved=2, create_dir=True)
    engine.add_event_handler(
        Events.EPOCH_COMPLETED(every=2), handler, {"mymodel": torch.nn.Linear(3, 3)}
    )
    engine.run([0] * 5, max_epochs=6)
    assert names(tmp_path) == ["prefix_mymodel_20.pt", "prefix_mymodel_30.pt"]
    assert handler.last_checkpoint == tmp_path / "prefix_mymodel_30.pt"
    with pytest.raises(RuntimeError, match="No objects"):
        handler(engine, {})
    with pytest.raises(TypeError, match="state_dict"):
        handler(engine, {"a": 1})


def test_the_global_step_of_another_engine(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: None)
    evaluator = Engine(lambda engine, batch: None)
    handler = Checkpoint(
        {"m": torch.nn.Linear(1, 1)},
        tmp_path,
        n_saved=None,
        global_step_transform=global_step_from_engine(trainer),
    )
    evaluator.add_event_handler(Events.COMPLETED, handler)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate(engine: Engine) -> None:
        evaluator.run([0] * 7)

    trainer.run([0] * 3, max_epochs=2)
    assert names(tmp_path) == ["m_1.pt", "m_2.pt"]
    by_iteration = global_step_from_engine(trainer, Events.ITERATION_COMPLETED)
    assert by_iteration(evaluator, Events.COMPLETED) == 6
    assert global_step_from_engine(trainer)(evaluator, "no event of the state") == 2
    by_seed = global_step_from_engine(trainer, fallback_attr="max_epochs")
    assert by_seed(evaluator, Events.INTERRUPT) == 2


def test_what_a_trainer_trains_and_nobody_saves_is_named_once(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
    handler = Checkpoint({"trainer": trainer, "model": model}, tmp_path, n_saved=None)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    data = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    with pytest.warns(CheckpointWarning, match="not optimizer, which it trains") as told:
        trainer.run(data)
    assert len([each for each in told if each.category is CheckpointWarning]) == 1
    whole = Checkpoint(
        {"trainer": trainer, "net": model, "opt": optimizer}, tmp_path / "whole", n_saved=None
    )
    whole(trainer)


def test_a_score_that_is_not_a_number_never_displaces_one_that_is(tmp_path: Path) -> None:
    scores = iter([0.1, math.nan, 0.3, math.nan, 0.2])
    engine = Engine(lambda engine, batch: None)
    handler = Checkpoint(
        {"m": torch.nn.Linear(1, 1)}, tmp_path, score_function=lambda _: next(scores), n_saved=2
    )
    engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
    engine.run([0] * 5)
    assert names(tmp_path) == ["m_0.2000.pt", "m_0.3000.pt"]


def test_a_failed_save_leaves_the_list_of_files(tmp_path: Path) -> None:
    class Part:
        value: Any = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

    part = Part()
    engine = Engine(lambda engine, batch: None)
    handler = Checkpoint({"part": part}, tmp_path)
    handler(engine)
    part.value = object()
    engine.state.iteration = 1
    with pytest.raises(TypeError, match=r"\['value'\] is of type builtins\.object"):
        handler(engine)
    assert handler.last_checkpoint == tmp_path / "part_0.pt"
    assert names(tmp_path) == ["part_0.pt"]


def test_the_state_of_the_handler_itself() -> None:
    handler = Checkpoint({"m": torch.nn.Linear(1, 1)}, lambda *_: None, n_saved=3)
    handler.load_state_dict({"_saved": [(1, "m_1.pt"), (2.5, "m_2.pt")]})
    assert handler.state_dict() == OrderedDict(_saved=[(1, "m_1.pt"), (2.5, "m_2.pt")])
    assert handler.last_checkpoint == "m_2.pt"


def test_new_folders_appear_with_their_parents(tmp_path: Path) -> None:
    DiskSaver(tmp_path / "a" / "b")({"x": 1}, "x.pt")
    assert names(tmp_path / "a" / "b") == ["x.pt"]
    with pytest.raises(ValueError, match=r"overlap=True.*background=False"):
        DiskSaver(tmp_path / "c", overlap=True)
