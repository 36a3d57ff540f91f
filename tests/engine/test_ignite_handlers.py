"""The installed pytorch-ignite's own handlers and metrics attach to our Engine, unchanged.

What each does is compared with what it does on pytorch-ignite's engine, with the same model and
the same digits (1,797 pictures of 8 x 8, which scikit-learn ships), and asserted on its own.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.engine
import pytest
import torch
from ignite.contrib.engines import common
from ignite.contrib.engines.common import setup_tb_logging
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    EMAHandler,
    LinearCyclicalScheduler,
    ProgressBar,
    TensorboardLogger,
    TerminateOnNan,
    Timer,
    create_lr_scheduler_with_warmup,
    global_step_from_engine,
)
from ignite.handlers.time_profilers import BasicTimeProfiler, HandlersTimeProfiler
from ignite.metrics import Accuracy, Loss, RunningAverage
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import crosstrain.engine
from crosstrain.engine import DeterministicEngine, Engine, Events
from crosstrain.engine.dispatch import Phase

LIBRARIES = (crosstrain.engine, ignite.engine)
STEPS = 8


class Training:
    """A small training on the digits, on the engine of either library.

    Args:
        library: `crosstrain.engine` or `ignite.engine`.
    """

    def __init__(self, library: Any) -> None:
        digits = load_digits()
        torch.manual_seed(1)
        self.model = nn.Linear(64, 10)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.loader = DataLoader(
            TensorDataset(
                torch.tensor(digits.data[:256] / 16, dtype=torch.float32),
                torch.tensor(digits.target[:256]),
            ),
            batch_size=32,
        )
        self.library = library
        self.trainer = library.Engine(self.train)
        self.evaluator = library.Engine(self.evaluate)
        self.losses: list[float] = []

    def train(self, engine: Any, batch: list[torch.Tensor]) -> float:
        x, y = batch
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        return loss.item()

    @torch.no_grad()
    def evaluate(self, engine: Any, batch: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        x, y = batch
        return self.model(x), y


def on_both(use: Callable[[Training], Any]) -> Any:
    """Uses a handler on either library's engine, asserts that the results agree, returns ours."""
    ours, theirs = (use(Training(library)) for library in LIBRARIES)
    assert ours == theirs
    return ours


def test_accuracy_and_loss() -> None:
    def use(training: Training) -> dict[str, float]:
        Accuracy().attach(training.evaluator, "accuracy")
        Loss(nn.functional.cross_entropy).attach(training.evaluator, "loss")
        before = dict(training.evaluator.run(training.loader).metrics)
        training.trainer.run(training.loader, max_epochs=5)
        after = dict(training.evaluator.run(training.loader).metrics)
        assert after["accuracy"] > before["accuracy"] + 0.3
        return after

    metrics = on_both(use)
    assert set(metrics) == {"accuracy", "loss"}


def test_running_average() -> None:
    def use(training: Training) -> list[float]:
        averages: list[float] = []
        RunningAverage(output_transform=lambda loss: loss, alpha=0.9).attach(
            training.trainer, "average"
        )
        training.trainer.add_event_handler(
            training.library.Events.ITERATION_COMPLETED,
            lambda engine: averages.append(engine.state.metrics["average"]),
        )
        training.trainer.run(training.loader, max_epochs=2)
        expected = training.losses[0]
        for loss, average in zip(training.losses, averages, strict=True):
            expected = 0.9 * expected + 0.1 * loss
            assert average == pytest.approx(expected)
        return averages

    assert len(on_both(use)) == 2 * STEPS


def test_progress_bar() -> None:
    def use(training: Training) -> list[str]:
        stream = io.StringIO()
        bar = ProgressBar(persist=True, file=stream, ncols=100, mininterval=0, ascii=True)
        RunningAverage(output_transform=lambda loss: loss).attach(training.trainer, "average")
        bar.attach(training.trainer, ["average"])
        training.trainer.run(training.loader, max_epochs=2)
        lines = stream.getvalue().replace("\r", "\n").splitlines()
        return [line.split("%|")[0] + line.partition("average=")[2][:5] for line in lines if line]

    lines = on_both(use)
    text = "\n".join(lines)
    for epoch in (1, 2):
        assert f"Epoch [{epoch}/2]: [{STEPS}/{STEPS}] 100" in text


def test_progress_bar_on_events_with_a_filter() -> None:
    stream = io.StringIO()
    training = Training(crosstrain.engine)
    theirs = ignite.engine.Events
    ProgressBar(persist=True, file=stream, mininterval=0).attach(
        training.trainer,
        output_transform=lambda loss: {"loss": loss},
        event_name=theirs.ITERATION_COMPLETED(every=4),
    )
    ProgressBar(file=stream).attach(
        training.trainer, event_name=theirs.EPOCH_COMPLETED, closing_event_name=theirs.COMPLETED
    )
    training.trainer.run(training.loader, max_epochs=2)
    assert f"loss={training.losses[3]:.3}" in stream.getvalue()
    assert "Epoch [2/2]" in stream.getvalue()


def test_terminate_on_nan() -> None:
    def use(training: Training) -> tuple[int, bool]:
        handler = TerminateOnNan(
            output_transform=lambda loss: float("nan") if len(training.losses) == 5 else loss
        )
        training.trainer.add_event_handler(ignite.engine.Events.ITERATION_COMPLETED, handler)
        state = training.trainer.run(training.loader, max_epochs=3)
        return state.iteration, bool(training.trainer.should_terminate)

    assert on_both(use) == (5, True)


def test_exponential_moving_average() -> None:
    def use(training: Training) -> list[list[float]]:
        handler = EMAHandler(training.model, momentum=0.1, momentum_warmup=0.5, warmup_iters=6)
        handler.attach(training.trainer)
        expected = copy.deepcopy(training.model.state_dict())
        moments: list[float] = []

        @training.trainer.on(training.library.Events.ITERATION_COMPLETED)
        def follow(engine: Any) -> None:
            moments.append(engine.state.ema_momentum)
            for name, value in training.model.state_dict().items():
                expected[name].mul_(1 - moments[-1]).add_(moments[-1] * value)

        training.trainer.run(training.loader, max_epochs=2)
        for name, value in handler.ema_model.state_dict().items():
            torch.testing.assert_close(value, expected[name])
        assert moments[0] == 0.5
        assert moments[-1] == pytest.approx(0.1)
        return [moments, handler.ema_model.bias.tolist()]

    on_both(use)


def test_tensorboard_logger(tmp_path: Path) -> None:
    def use(training: Training) -> dict[str, list[tuple[int, float]]]:
        folder = tmp_path / training.library.__name__
        theirs = ignite.engine.Events
        Accuracy().attach(training.evaluator, "accuracy")
        training.trainer.add_event_handler(
            theirs.EPOCH_COMPLETED, lambda: training.evaluator.run(training.loader)
        )
        with TensorboardLogger(log_dir=folder) as logger:
            logger.attach_output_handler(
                training.trainer,
                event_name=theirs.ITERATION_COMPLETED(every=4),
                tag="training",
                output_transform=lambda loss: {"loss": loss},
            )
            logger.attach_output_handler(
                training.evaluator,
                event_name=theirs.EPOCH_COMPLETED,
                tag="validation",
                metric_names=["accuracy"],
                global_step_transform=global_step_from_engine(training.trainer),
            )
            logger.attach_opt_params_handler(
                training.trainer, theirs.ITERATION_STARTED(every=8), training.optimizer
            )
            training.trainer.run(training.loader, max_epochs=2)
        events = EventAccumulator(str(folder))
        events.Reload()
        return {
            tag: [(item.step, item.value) for item in events.Scalars(tag)]
            for tag in sorted(events.Tags()["scalars"])
        }

    scalars = on_both(use)
    assert [step for step, _ in scalars["training/loss"]] == [4, 8, 12, 16]
    assert [step for step, _ in scalars["validation/accuracy"]] == [1, 2]
    assert [step for step, _ in scalars["lr/group_0"]] == [8, 16]


def test_schedulers() -> None:
    def use(training: Training) -> list[float]:
        cyclic = LinearCyclicalScheduler(
            training.optimizer, "lr", start_value=0.1, end_value=0.0, cycle_size=8
        )
        scheduler = create_lr_scheduler_with_warmup(
            cyclic, warmup_start_value=0.02, warmup_end_value=0.1, warmup_duration=5
        )
        rates: list[float] = []
        training.trainer.add_event_handler(ignite.engine.Events.ITERATION_STARTED, scheduler)
        training.trainer.add_event_handler(
            training.library.Events.ITERATION_COMPLETED,
            lambda: rates.append(training.optimizer.param_groups[0]["lr"]),
        )
        training.trainer.run(training.loader, max_epochs=2)
        return rates

    rates = on_both(use)
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert rates[4:9] == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    assert rates[9:13] == pytest.approx([0.025, 0.05, 0.075, 0.1])


def test_a_scheduler_of_torch_behind_a_warmup() -> None:
    def use(training: Training) -> list[float]:
        scheduler = create_lr_scheduler_with_warmup(
            torch.optim.lr_scheduler.StepLR(training.optimizer, step_size=3, gamma=0.5),
            warmup_start_value=0.0,
            warmup_duration=4,
        )
        rates: list[float] = []
        training.trainer.add_event_handler(ignite.engine.Events.ITERATION_STARTED, scheduler)
        training.trainer.add_event_handler(
            training.library.Events.ITERATION_COMPLETED,
            lambda: rates.append(training.optimizer.param_groups[0]["lr"]),
        )
        training.trainer.run(training.loader)
        return rates

    assert on_both(use)[3] == pytest.approx(0.1)


def test_timer() -> None:
    training = Training(crosstrain.engine)
    timer = Timer(average=True)
    theirs = ignite.engine.Events
    timer.attach(
        training.trainer,
        start=theirs.EPOCH_STARTED,
        resume=theirs.ITERATION_STARTED,
        pause=theirs.ITERATION_COMPLETED,
        step=theirs.ITERATION_COMPLETED,
    )
    training.trainer.run(training.loader, max_epochs=2)
    assert timer.step_count == STEPS
    assert 0 < timer.value() * STEPS <= training.trainer.state.times["EPOCH_COMPLETED"]


def test_checkpoint(tmp_path: Path) -> None:
    def use(training: Training) -> list[str]:
        folder = tmp_path / training.library.__name__
        to_save = {
            "model": training.model,
            "optimizer": training.optimizer,
            "trainer": training.trainer,
        }
        checkpoint = Checkpoint(to_save, DiskSaver(folder, require_empty=False), n_saved=2)
        training.trainer.add_event_handler(
            ignite.engine.Events.ITERATION_COMPLETED(every=5), checkpoint
        )
        training.trainer.run(training.loader, max_epochs=2)
        uninterrupted = copy.deepcopy(training.model.state_dict())
        fresh = Training(training.library)
        Checkpoint.load_objects(
            {"model": fresh.model, "optimizer": fresh.optimizer, "trainer": fresh.trainer},
            torch.load(folder / "checkpoint_10.pt", weights_only=True),
        )
        assert fresh.trainer.state.iteration == 10
        # The rest of the second epoch: the batches from the third on.
        fresh.trainer.run(list(fresh.loader)[2:])
        assert fresh.trainer.state.iteration == 16
        torch.testing.assert_close(fresh.model.state_dict(), uninterrupted)
        return sorted(path.name for path in folder.iterdir())

    assert on_both(use) == ["checkpoint_10.pt", "checkpoint_15.pt"]


def test_the_common_handlers_keep_as_many_checkpoints_as_they_say(tmp_path: Path) -> None:
    def use(training: Training) -> list[str]:
        folder = tmp_path / training.library.__name__
        ours = training.library is crosstrain.engine
        saver = crosstrain.engine.DiskSaver if ours else DiskSaver
        common.setup_common_training_handlers(
            training.trainer,
            to_save={"trainer": training.trainer, "model": training.model},
            save_every_iters=2,
            save_handler=saver(folder, require_empty=False),
            with_pbars=False,
            clear_cuda_cache=False,
        )
        training.trainer.run(training.loader, max_epochs=2)
        return sorted(path.name for path in folder.glob("*.pt"))

    (name,) = on_both(use)
    assert name.endswith("_16.pt")


def test_best_checkpoints_by_score(tmp_path: Path) -> None:
    def use(training: Training) -> list[str]:
        folder = tmp_path / training.library.__name__
        Accuracy().attach(training.evaluator, "accuracy")
        theirs = ignite.engine.Events
        training.trainer.add_event_handler(
            theirs.EPOCH_COMPLETED, lambda: training.evaluator.run(training.loader)
        )
        checkpoint = Checkpoint(
            {"model": training.model},
            DiskSaver(folder),
            filename_prefix="best",
            score_name="accuracy",
            n_saved=1,
            global_step_transform=global_step_from_engine(training.trainer),
        )
        training.evaluator.add_event_handler(theirs.COMPLETED, checkpoint)
        training.trainer.run(training.loader, max_epochs=3)
        return [path.name for path in folder.iterdir()]

    (name,) = on_both(use)
    assert name.startswith("best_model_")


def test_early_stopping() -> None:
    def use(training: Training) -> list[Any]:
        handler = EarlyStopping(2, lambda engine: -float(engine.state.epoch), training.trainer)
        training.trainer.add_event_handler(ignite.engine.Events.EPOCH_COMPLETED, handler)
        state = training.trainer.run(training.loader, max_epochs=9)
        return [state.epoch, state.iteration, handler.best_score]

    assert on_both(use) == [3, 3 * STEPS, -1.0]


@pytest.mark.parametrize("profiler", [BasicTimeProfiler, HandlersTimeProfiler])
def test_time_profilers(profiler: Callable[[], Any]) -> None:
    def use(training: Training) -> Any:
        trainer, kind = training.trainer, profiler()
        seen: list[str] = []

        @trainer.on(ignite.engine.Events.ITERATION_COMPLETED(every=3))
        def at_third(engine: Any, word: str = "third") -> None:
            time.sleep(0.001)
            seen.append(word)

        trainer.add_event_handler(training.library.Events.EPOCH_COMPLETED, seen.append, "epoch")
        kind.attach(trainer)
        trainer.run(training.loader, max_epochs=2)
        trainer.run(training.loader, max_epochs=3)
        counts = {
            event.name: len(times) if profiler is BasicTimeProfiler else list(map(len, times))
            for event, times in kind.event_handlers_times.items()
        }
        return seen, counts, len(kind.processing_times), len(kind.dataflow_times)

    seen, _, iterations, _ = on_both(use)
    assert seen.count("epoch") == 3
    assert iterations in (2 * STEPS, 3 * STEPS)


def test_set_up_of_loggers_takes_one_evaluator(tmp_path: Path) -> None:
    def use(training: Training) -> list[str]:
        folder = tmp_path / training.library.__name__
        Accuracy().attach(training.evaluator, "accuracy")
        training.trainer.add_event_handler(
            ignite.engine.Events.EPOCH_COMPLETED, lambda: training.evaluator.run(training.loader)
        )
        logger = setup_tb_logging(
            str(folder), training.trainer, training.optimizer, training.evaluator, log_every_iters=4
        )
        training.trainer.run(training.loader, max_epochs=2)
        logger.close()
        events = EventAccumulator(str(folder))
        events.Reload()
        return sorted(events.Tags()["scalars"])

    assert "validation/accuracy" in on_both(use)


def test_an_engine_is_an_instance_of_both_classes(tmp_path: Path) -> None:
    for kind in (Engine, DeterministicEngine, Derived):
        engine = kind(process)
        assert isinstance(engine, kind)
        assert isinstance(engine, ignite.engine.Engine)
        assert type(engine) is kind
        assert issubclass(engine.__class__, kind)
        assert engine.__class__.__qualname__ == kind.__qualname__
        assert type(copy.copy(engine)) is kind
        if kind is not DeterministicEngine:
            assert type(copy.deepcopy(engine)) is kind
            assert type(pickle.loads(pickle.dumps(engine))) is kind
    assert not isinstance(Engine(process).state, ignite.engine.Engine)


def test_the_table_of_handlers_can_be_changed_as_ignites() -> None:
    said: list[Any] = []
    tables = []
    for library in LIBRARIES:
        engine, events = library.Engine(process), library.Events
        table, words = engine._event_handlers, []

        def say(word: str = "", words: list[Any] = words) -> None:
            words.append(word)

        def with_engine(
            given: Any, word: str, engine: Any = engine, words: list[Any] = words
        ) -> None:
            words.append((given is engine, word))

        engine.add_event_handler(events.EPOCH_STARTED, with_engine, "first")
        engine.add_event_handler(events.EPOCH_COMPLETED(every=2), say, word="even")
        table[events.EPOCH_STARTED].insert(0, (with_engine, (weakref.ref(engine), "before"), {}))
        table[events.EPOCH_STARTED].append((say, ("last",), {}))
        function, args, named = table[events.EPOCH_COMPLETED][0]
        table[events.EPOCH_COMPLETED][0] = (functools.partial(function), args, named)
        table[events.COMPLETED] = [(say, ("end",), {}), (say, ("not",), {})]
        del table[events.COMPLETED][-1]
        engine.run([1], max_epochs=2)
        tables.append({event.name: len(table[event]) for event in table if len(table[event])})
        said.append(words)
    assert said[0] == said[1]
    assert said[0][:3] == [(True, "before"), (True, "first"), "last"]
    assert tables[0] == tables[1]


def test_the_librarys_own_handlers_are_not_in_the_table() -> None:
    engine, order = Engine(process), []
    for phase in (Phase.SAVE, Phase.LAST, Phase.FIRST):
        engine.add_in_phase(
            Events.EPOCH_COMPLETED, lambda engine, name=phase.name: order.append(name), phase
        )
    assert not engine._event_handlers
    table = engine._event_handlers[Events.EPOCH_COMPLETED]
    table.append((order.append, ("user",), {}))
    table.insert(9, (order.append, ("later user",), {}))
    table.insert(0, (order.append, ("before",), {}))
    engine.add_in_phase(Events.EPOCH_COMPLETED, lambda: order.append("FIRST, too"), Phase.FIRST)
    table[-1] = (order.append, ("in its place",), {})
    assert [entry[1] for entry in table[:2]] == [("before",), ("user",)]
    del table[1]
    with pytest.raises(IndexError):
        table[2] = table[0]
    engine.run([1])
    assert order == ["FIRST", "FIRST, too", "before", "in its place", "LAST", "SAVE"]
    with pytest.raises(KeyError):
        engine._event_handlers["no such event"]


class Derived(Engine):
    """Sees every event go by, as a subclass of pytorch-ignite's engine may."""

    seen: list[Any]

    def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        self.__dict__.setdefault("seen", []).append((event_name.name, event_args, event_kwargs))
        super()._fire_event(event_name, *event_args, **event_kwargs)


def test_a_subclass_sees_every_event_go_by() -> None:
    class Theirs(ignite.engine.Engine):
        def _fire_event(self, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
            self.__dict__.setdefault("seen", []).append((event_name.name, event_args, event_kwargs))
            super()._fire_event(event_name, *event_args, **event_kwargs)

    def use(kind: Callable[[Any], Any]) -> list[Any]:
        engine = kind(process)
        engine.add_event_handler(
            ignite.engine.Events.ITERATION_STARTED(once=2), lambda: engine.terminate_epoch()
        )
        engine.add_event_handler(ignite.engine.Events.EXCEPTION_RAISED, lambda error: None)
        engine.add_event_handler(ignite.engine.Events.COMPLETED, lambda: 1 / 0)
        engine.run([1, 2, 3], max_epochs=2)
        return [
            (name, list(map(type, args)), list(named))
            for name, args, named in engine.seen  # what each event passed
        ]

    assert use(Derived) == use(Theirs)


def process(engine: Any, batch: Any) -> Any:
    """A step that gives the batch back."""
    return batch
