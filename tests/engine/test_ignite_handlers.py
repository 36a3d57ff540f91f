"""The installed pytorch-ignite's own handlers and metrics attach to our Engine, unchanged.

What each does is compared with what it does on pytorch-ignite's engine, with the same model and
the same digits (1,797 pictures of 8 x 8, which scikit-learn ships), and asserted on its own.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ignite.engine
import pytest
import torch
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
from crosstrain.engine import Engine, Events

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


@pytest.mark.parametrize("handler", ["early stopping", "basic profiler", "handlers profiler"])
def test_three_handlers_insist_on_ignites_own_engine(handler: str) -> None:
    # docs/engine.md says so; crosstrain.engine.early_stopping is for the first.
    engine = Engine(lambda engine, batch: None)
    attach: dict[str, Callable[[], object]] = {
        "early stopping": lambda: EarlyStopping(2, lambda engine: 1.0, engine),
        "basic profiler": lambda: BasicTimeProfiler().attach(engine),
        "handlers profiler": lambda: HandlersTimeProfiler().attach(engine),
    }
    with pytest.raises(TypeError, match="Engine"):
        attach[handler]()
    assert not any(engine.slot(event).handlers for event in Events)
