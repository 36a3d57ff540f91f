"""EarlyStopping: ends a training whose score has stopped getting better.

The names and the meaning of the arguments are those of pytorch-ignite's `EarlyStopping`, which
takes no engine but its own.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, Literal

from .events import Events


class EarlyStopping:
    """Ends the trainer's run when its score has not improved for a number of evaluations.

    Attach it to the evaluator: `evaluator.add_event_handler(Events.COMPLETED, early_stopping)`.

    Args:
        patience: how many evaluations in a row without an improvement end the run, at least 1.
        score_function: called with the engine to which this is attached, returns the score as a
            number. NaN is never an improvement.
        trainer: the engine whose run is ended.
        threshold: an improvement is a change for the better by more than this, at least 0.
        cumulative: whether the change is measured from the last improvement; otherwise from the
            best score so far, however it came about.
        threshold_mode: `abs`: the threshold is in units of the score; `rel`: a share of the best
            score's size.
        mode: `max` if a higher score is better, `min` if a lower one is.
        min_delta: another name of `threshold`.
        cumulative_delta: another name of `cumulative`.
        min_delta_mode: another name of `threshold_mode`.

    Raises:
        TypeError: if `score_function` is not callable or `trainer` is no engine.
        ValueError: if another argument is out of range, or given under both of its names.
    """

    def __init__(
        self,
        patience: int,
        score_function: Callable[[Any], Any],
        trainer: Any,
        threshold: float | None = None,
        cumulative: bool | None = None,
        threshold_mode: Literal["abs", "rel"] | None = None,
        mode: Literal["min", "max"] = "max",
        *,
        min_delta: float | None = None,
        cumulative_delta: bool | None = None,
        min_delta_mode: Literal["abs", "rel"] | None = None,
    ) -> None:
        if not callable(score_function):
            raise TypeError(
                "Argument score_function should be a function. It is called with the engine and "
                f"returns a number; got {score_function!r}"
            )
        if not callable(getattr(trainer, "terminate", None)):
            raise TypeError(
                "Argument trainer should be an instance of Engine. Its run is ended by "
                f"terminate(); got {type(trainer)}"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"Argument mode should be either 'min' or 'max'. It is {mode!r}")
        self.patience = _checked_patience(patience)
        self.score_function = score_function
        self.trainer = trainer
        self.mode = mode
        self.threshold = _checked_threshold(
            _one_of("threshold", threshold, "min_delta", min_delta, 0.0)
        )
        self.cumulative: bool = _one_of(
            "cumulative", cumulative, "cumulative_delta", cumulative_delta, False
        )
        self.threshold_mode: Literal["abs", "rel"] = _checked_mode(
            _one_of("threshold_mode", threshold_mode, "min_delta_mode", min_delta_mode, "abs")
        )
        self.counter = 0
        self.best_score: float | None = None
        self.logger = logging.getLogger(f"{__package__}.{type(self).__name__}")

    @property
    def min_delta(self) -> float:
        """Another name of `threshold`."""
        return self.threshold

    @min_delta.setter
    def min_delta(self, value: float) -> None:
        self.threshold = _checked_threshold(value)

    @property
    def cumulative_delta(self) -> bool:
        """Another name of `cumulative`."""
        return self.cumulative

    @cumulative_delta.setter
    def cumulative_delta(self, value: bool) -> None:
        self.cumulative = value

    @property
    def min_delta_mode(self) -> Literal["abs", "rel"]:
        """Another name of `threshold_mode`."""
        return self.threshold_mode

    @min_delta_mode.setter
    def min_delta_mode(self, value: Literal["abs", "rel"]) -> None:
        self.threshold_mode = _checked_mode(value)

    def __call__(self, engine: Any) -> None:
        """Takes the score of an evaluation; ends the trainer's run if patience is at its end.

        Raises:
            TypeError: if the score is not a number.
        """
        score = self._score(engine)
        if self._is_improvement(score):
            self.best_score = score
            self.counter = 0
            return
        if not self.cumulative and self.best_score is not None and not math.isnan(score):
            self.best_score = (max if self.mode == "max" else min)(score, self.best_score)
        self.counter += 1
        self.logger.debug("EarlyStopping: %i / %i", self.counter, self.patience)
        if self.counter >= self.patience:
            self.logger.info(
                "EarlyStopping: stop training, %i scores without an improvement on %s",
                self.counter,
                self.best_score,
            )
            self.trainer.terminate()

    def _score(self, engine: Any) -> float:
        score = self.score_function(engine)
        try:
            return float(score)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"score_function should return a number, got {score!r} ({error})"
            ) from None

    def _is_improvement(self, score: float) -> bool:
        if math.isnan(score):
            return False
        best = self.best_score
        if best is None:
            return True
        # A share of the size: of a negative score too, an improvement is a change for the better.
        change = self.threshold * (abs(best) if self.threshold_mode == "rel" else 1.0)
        return score > best + change if self.mode == "max" else score < best - change

    def reset(self) -> None:
        """Forgets the scores so far."""
        self.counter = 0
        self.best_score = None

    def attach(
        self,
        engine: Any,
        event: Any = Events.COMPLETED,
        reset_engine: Any = None,
        reset_event: Any = Events.STARTED,
    ) -> None:
        """Attaches this to an evaluator, and has a new run of the trainer forget the old scores.

        Args:
            engine: the engine that evaluates.
            event: its event at which the score is taken.
            reset_engine: the engine whose event makes this forget the scores; the trainer by
                default.
            reset_event: that event. At STARTED, the scores of a run that goes on, from a state or
                after a termination, are kept.
        """
        engine.add_event_handler(event, self)
        resetting = self.trainer if reset_engine is None else reset_engine
        keeps = reset_event == Events.STARTED
        resetting.add_event_handler(reset_event, self._reset_if_new if keeps else self.reset)

    def _reset_if_new(self, engine: Any) -> None:
        if engine.state.iteration == 0:
            self.reset()

    def state_dict(self) -> OrderedDict[str, Any]:
        """Returns the counter, the best score, and what the threshold is."""
        return OrderedDict(
            counter=self.counter, best_score=self.best_score, threshold_mode=self.threshold_mode
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the counter and the best score from a state.

        Args:
            state_dict: what `state_dict` returned; `threshold_mode` may be absent, as in states of
                older versions of pytorch-ignite.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: if a key is absent or has an illegal value.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"Argument state_dict should be a dictionary, but given {type(state_dict)}"
            )
        missing = [key for key in ("counter", "best_score") if key not in state_dict]
        if missing:
            raise ValueError(
                f"Required state attributes {missing} are absent in provided state_dict "
                f"'{list(state_dict)}'"
            )
        mode = _checked_mode(state_dict.get("threshold_mode", self.threshold_mode))
        counter, best = state_dict["counter"], state_dict["best_score"]
        if not isinstance(counter, int) or counter < 0:
            raise ValueError(f"'counter' should be an integer of at least 0, got {counter!r}")
        self.counter, self.threshold_mode = counter, mode
        self.best_score = None if best is None else float(best)


def _one_of(name: str, value: Any, other_name: str, other: Any, default: Any) -> Any:
    if value is not None and other is not None:
        raise ValueError(
            f"Arguments {name} and {other_name} are the same thing: got {value!r} and {other!r}. "
            "Give one of them."
        )
    chosen = other if value is None else value
    return default if chosen is None else chosen


def _checked_patience(value: Any) -> int:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"Argument patience should be positive integer. It is {value!r}")
    return int(value)


def _checked_threshold(value: float) -> float:
    if not value >= 0:
        raise ValueError(f"Argument threshold should not be a negative number. It is {value!r}")
    return value


def _checked_mode(mode: Any) -> Literal["abs", "rel"]:
    if mode not in ("abs", "rel"):
        raise ValueError(f"Argument threshold_mode should be either 'abs' or 'rel'. It is {mode!r}")
    checked: Literal["abs", "rel"] = mode
    return checked
