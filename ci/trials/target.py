"""A user's own training, named `module:function`: what the function returns, and how it is found.

Importing this module imports no torch; building a training does.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from crosstrain.ci.options import UsageError

if TYPE_CHECKING:
    from crosstrain.engine import DeterministicEngine

_FORMS = "PACKAGE.MODULE:FUNCTION or PATH/TO/FILE.py:FUNCTION"
_CONTRACT = "def training(backend: str, workers: int = 0) -> Training"


class TargetError(UsageError, ValueError):
    """A target cannot be used; the message says why and what to write in its place."""


@dataclass(frozen=True)
class Training:
    """What a user's function returns: a training that is ready to be run.

    Args:
        trainer: an engine that resumes exactly: `create_supervised_trainer(...,
            deterministic=True)` or a `DeterministicEngine`, with all its handlers attached. It has
            not run.
        data: what `trainer.run` takes.
        max_epochs: how many epochs the whole training has.
        to_save: all that the training changes, by name, as `resume_or_start` takes it; the trainer
            is added.
        epoch_length: the iterations of an epoch; None: the length of the data.
    """

    trainer: DeterministicEngine
    data: Iterable[Any] | None
    max_epochs: int
    to_save: Mapping[str, Any]
    epoch_length: int | None = None

    def run(self) -> None:
        """Runs the training to its end, from wherever its trainer is."""
        self.trainer.run(self.data, max_epochs=self.max_epochs, epoch_length=self.epoch_length)


@dataclass(frozen=True)
class Target:
    """Names a function that builds a training.

    Args:
        source: a module's dotted name, or the path of a Python file.
        function: the function in it.
    """

    source: str
    function: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `package.module:function` or `path/to/file.py:function`; imports nothing.

        Raises:
            TargetError: if the text has another form, or the file does not exist.
        """
        source, colon, function = text.rpartition(":")
        if not colon or not source or not function.isidentifier():
            raise TargetError(f"{text!r} is no target. Write {_FORMS}.")
        if source.endswith(".py"):
            if not Path(source).is_file():
                raise TargetError(
                    f"There is no file {source!r} (of target {text!r}); the current folder is "
                    f"{os.getcwd()}."
                )
        elif not all(part.isidentifier() for part in source.split(".")):
            raise TargetError(f"{source!r} is no name of a module (of target {text!r}). {_FORMS}.")
        return cls(source, function)

    def __str__(self) -> str:
        return f"{self.source}:{self.function}"

    def load(self) -> Callable[..., Any]:
        """Imports the module and returns the function.

        The module is found as `python -m` finds it, from the current folder too, and a file as
        `python FILE` runs it, with its own folder on the path.

        Raises:
            TargetError: if there is no such module or function, or it cannot be called with a spec.
        """
        module: Any = self._module()
        function: object = getattr(module, self.function, None)
        if function is None:
            own = [name for name, _ in inspect.getmembers(module, inspect.isfunction)]
            raise TargetError(
                f"{self.source} has no function {self.function!r}; it has "
                f"{', '.join(own) or 'none'}. Wanted: {_CONTRACT}."
            )
        if not callable(function):
            raise TargetError(f"{self} is a {type(function).__name__}. Wanted: {_CONTRACT}.")
        try:
            if not _takes_workers(function):
                inspect.signature(function).bind("cpu")
        except TypeError as error:
            raise TargetError(
                f"{self} cannot be called with a spec alone: {error}. Wanted: {_CONTRACT}."
            ) from None
        return function

    def takes_workers(self) -> bool:
        """Tells whether the function has an argument `workers`."""
        return _takes_workers(self.load())

    def build(self, backend: str, workers: int = 0, **options: Any) -> Training:
        """Calls the function, with further arguments if need be, and checks what it returns.

        Raises:
            TargetError: if the function takes no `workers` and some are asked for, or what it
                returns is not a training that can be resumed exactly on that backend.
        """
        function = self.load()
        takes = _takes_workers(function)
        if workers and not takes:
            raise TargetError(
                f"{self} has no argument `workers`, so it cannot be run with {workers} of them. "
                f"Give it one, {_CONTRACT}, and pass it on as DataLoader(..., num_workers=workers)."
            )
        if takes:
            options["workers"] = workers
        training: object = function(backend, **options)
        if not isinstance(training, Training):
            raise TargetError(
                f"{self} returned a {type(training).__name__}. Return crosstrain.ci.Training("
                "trainer, data, max_epochs=..., to_save={...})."
            )
        self._check(training, backend)
        return training

    def _module(self) -> Any:
        path = Path(self.source).resolve() if self.source.endswith(".py") else None
        folder, name = (os.getcwd(), self.source) if path is None else (path.parent, path.stem)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(f"{missing}."):
                raise
            raise TargetError(
                f"There is no module {missing!r} (of target '{self}'); it was looked for in "
                f"{folder} and on Python's path. Write {_FORMS}."
            ) from None
        loaded = getattr(module, "__file__", None)
        if path is not None and (loaded is None or Path(loaded).resolve() != path):
            raise TargetError(
                f"{self.source} cannot be imported as {name!r}: that is the module of "
                f"{loaded or 'Python itself'}. Rename the file."
            )
        return module

    def _check(self, training: Training, backend: str) -> None:
        from crosstrain.engine import DeterministicEngine

        trainer: Any = training.trainer
        if not isinstance(trainer, DeterministicEngine):
            raise TargetError(
                f"{self} returned a trainer of type {type(trainer).__name__}, which does not "
                "resume exactly. Make it by create_supervised_trainer(..., deterministic=True), or "
                "use a DeterministicEngine."
            )
        if trainer.state.iteration:
            raise TargetError(
                f"{self} returned a trainer that is at iteration {trainer.state.iteration}. "
                "Return it before it is run or restored."
            )
        for name in ("max_epochs", "epoch_length"):
            value: object = getattr(training, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "epoch_length" and value is None):
                raise TargetError(f"{self}: {name} is an integer of at least 1, got {value!r}.")
        self._check_saved(trainer, training.to_save)
        self._check_backend(trainer, backend)

    def _check_saved(self, trainer: DeterministicEngine, to_save: Mapping[str, Any]) -> None:
        from crosstrain.engine.checkpoints import check_objects, unsaved_objects

        try:
            for method in ("state_dict", "load_state_dict"):
                check_objects(to_save, method, "to_save")
        except TypeError as error:
            raise TargetError(f"{self}: {error}.") from None
        missing = unsaved_objects(trainer, to_save)
        if missing:
            raise TargetError(
                f"{self}: to_save leaves out {', '.join(map(repr, missing))}, which the trainer "
                "trains. Name it in to_save."
            )

    def _check_backend(self, trainer: DeterministicEngine, backend: str) -> None:
        from crosstrain.backends import get, spec_of

        if backend == "auto":
            return
        asked, found = spec_of(get(backend)), spec_of(trainer.backend)
        # An engine without a backend computes on the CPU as torch does by itself.
        if asked != (found or "cpu:fp32"):
            raise TargetError(
                f"{self} was called with {backend!r}, and its trainer runs on "
                f"{found or 'no backend'}. Pass the argument on: create_supervised_trainer(..., "
                "backend=backend), or DeterministicEngine(step, get(backend).open())."
            )


def _takes_workers(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind("cpu", workers=0)
    except TypeError:
        return False
    return True
