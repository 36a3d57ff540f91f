"""DoneAgain: tells whether what a killed run had done since its last checkpoint is the same again.

A process that is killed has gone on after its newest checkpoint, and the resumed run does those
iterations once more. They come out the same to the bit, or the run depends on something that no
checkpoint holds: whatever it is, it shows here. So digests of the 1st, 2nd, 4th, 8th, ... iteration
after each checkpoint are kept in a small file beside them, and compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from crosstrain.engine.engine import Engine
from crosstrain.engine.proof import Proof, Strictness
from crosstrain.engine.storage.leftovers import FILES, new_name

from .saver import DiskSaver

_logger = logging.getLogger(__name__)

_NAME: Final = ".crosstrain.done"
_FORMAT: Final = "crosstrain iterations done"
# What an iteration is known by, and what each is to a reader.
_MARKS: Final = {
    "batch": "its batch",
    "weights": "the weights, or the learning rates, after it",
    "random": "the random states after it",
}
# Random states alone are no difference: who draws from a global generator may be a logger.
_DECIDE: Final = ("batch", "weights")
_CONDITIONS: Final = "conditions"
#: The marks of iterations, by their numbers.
Course = dict[int, dict[str, str]]
# More is no file of ours: it has two checkpoints and as many iterations as a number has bits.
_MOST_BYTES: Final = 1 << 17


class DoneAgain:
    """Keeps what iterations came to after each checkpoint, and compares those that are repeated.

    The file that it keeps them in, `.crosstrain.done` in the saver's folder, is never needed: where
    it cannot be read or written, nothing is compared.

    Args:
        saver: what saves the run's checkpoints, on this rank and into a folder on the disk.
        prefix: of the checkpoints' names; runs of others may share the folder.
        strictness: what happens where an iteration comes out otherwise.
    """

    def __init__(self, saver: DiskSaver, prefix: str, strictness: Strictness) -> None:
        assert isinstance(saver.dirname, Path), "in a store nothing is written for an iteration"
        self._path = saver.dirname / (f"{_NAME}.{prefix}" if prefix else _NAME)
        self._saver = saver
        self._strictness: Strictness = strictness
        # Of the last two checkpoints, by when they were saved: the newest may not be whole.
        self._courses = _read(self._path)
        # What is done after the newest, and after which iteration that was saved.
        self._course: Course | None = None
        self._after = 0
        # What the iterations to come were before, and which of them were the same.
        self._expected: Course = {}
        self._same: list[int] = []

    def resumed_from(self, saved_at_ns: int, iteration: int) -> None:
        """Counts from the checkpoint on that the run has been resumed from.

        Args:
            saved_at_ns: when it was saved, as its manifest says.
            iteration: the iterations that are done in it.
        """
        self._expected = dict(self._courses.get(saved_at_ns, {}))
        self._begin(saved_at_ns, iteration)

    def saved(self, iteration: int) -> None:
        """Counts from the checkpoint on that was saved just now."""
        self._begin(self._saver.saved_at_ns, iteration)

    def _begin(self, saved_at_ns: int, iteration: int) -> None:
        self._course, self._after = self._courses.pop(saved_at_ns, {}), iteration
        before = list(self._courses.items())[-1:]
        self._courses = {**dict(before), saved_at_ns: self._course}

    def iteration_done(self, trainer: Engine) -> None:
        """Notes an iteration, and compares it, if it is one of those that are kept.

        Raises:
            ResumeError: if it came out otherwise than before, and that is an error.
        """
        course, iteration = self._course, trainer.state.iteration
        done = iteration - self._after
        if course is None or done < 1 or done & (done - 1):
            return
        before = self._expected.pop(iteration, None)
        if before is None and iteration in course:
            # It was noted before a handler took the run back, and comes first in the next process.
            return
        now = self._marks(trainer)
        if now is None:
            return
        if before is None:
            course[iteration] = now
            self._write()
            return
        if all(now[name] == before[name] for name in (*_DECIDE, _CONDITIONS)):
            self._note_same(trainer.proof, iteration)
            return
        others, self._expected = [iteration, *self._expected], {}
        self._tell(trainer.proof, iteration, before, now)
        # From here on the run is another.
        for number in others:
            course.pop(number, None)
        course[iteration] = now
        self._write()

    def run_has_ended(self) -> None:
        """Takes the file away: the run has ended with what it has saved, and repeats nothing."""
        self._courses, self._course, self._expected = {}, None, {}
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _marks(self, trainer: Engine) -> dict[str, str] | None:
        """Returns what an iteration came to; None, from now on, if it cannot be looked at."""
        try:
            return trainer.iteration_marks()
        except Exception as error:
            # No look at what is trained ends a run.
            told = f"iterations done again: to look at them raised {type(error).__name__}"
            if told not in trainer.proof.unchecked:
                trainer.proof.unchecked.append(told)
            _logger.debug("Iterations done again are not compared.", exc_info=error)
            self._course, self._expected = None, {}
            return None

    def _note_same(self, proof: Proof, iteration: int) -> None:
        self._same.append(iteration)
        if not self._expected:
            told = f"done again as before the resume: iteration {', '.join(map(str, self._same))}"
            proof.checked.append(told)
            _logger.info("Iterations %s.", told)

    def _tell(
        self, proof: Proof, iteration: int, before: Mapping[str, str], now: Mapping[str, str]
    ) -> None:
        if before[_CONDITIONS] != now[_CONDITIONS]:
            # Threads, versions, processes: they are told of by themselves.
            proof.unchecked.append("iterations done again: the conditions are others now")
            return
        others = [what for name, what in _MARKS.items() if before[name] != now[name]]
        proof.differs(
            f"Iteration {iteration} was done before, after the same checkpoint, and has come out "
            f"otherwise now: {', '.join(others)}. What it depends on is in no checkpoint (a file "
            "that the run writes and reads again, a service, the time), or the program, its "
            "settings or its data have been changed since. If they were changed on purpose, leave "
            "it at that; Checks(done_again='off') compares nothing",
            self._strictness,
        )

    def _write(self) -> None:
        told = {
            "format": _FORMAT,
            "checkpoints": {str(saved): course for saved, course in self._courses.items()},
        }
        aside = self._path.with_name(new_name(FILES))
        try:
            # Not flushed to the disk: a process is killed, or a machine loses no more than a check.
            aside.write_text(json.dumps(told), encoding="ascii")
            os.replace(aside, self._path)
        except OSError as error:
            _logger.debug("%s could not be written: %s", self._path, error)
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[int, Course]:
    """Returns what a file keeps; nothing if it is not there, or not what was written there."""
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            told: Any = json.loads(file.read(_MOST_BYTES))
        if type(told) is not dict or told.get("format") != _FORMAT:
            return {}
        return {
            int(saved): {int(number): _checked(marks) for number, marks in course.items()}
            for saved, course in told["checkpoints"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _checked(marks: Any) -> dict[str, str]:
    """Returns the marks of an iteration; a TypeError if they are none."""
    if set(marks) != {*_MARKS, _CONDITIONS} or {*map(type, marks.values())} != {str}:
        raise TypeError(f"{marks!r} are no marks of an iteration")
    return dict(marks)
