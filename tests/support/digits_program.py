"""Runs examples/digits.py as it is, in a child of a fork server; writes what its trainer does."""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import resume_harness as harness

import crosstrain.engine
from crosstrain.engine import Events, create_supervised_trainer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "digits.py"
EPOCHS = 2
ITERATIONS = 60


def run_example(
    folder: str, report: str, spec: str, workers: int, stop: dict[str, str], environment: Any
) -> None:
    """Runs the script; appends a line of JSON for each iteration, and one at the end.

    Args:
        folder: of the checkpoints.
        report: the file for the lines.
        spec: the backend.
        workers: of the loader.
        stop: from an iteration to the signal that the process sends itself there.
        environment: variables to set before.
    """
    os.environ.update(environment)
    with open(report, "a") as lines:

        def watched(*arguments: Any, **settings: Any) -> Any:
            trainer = create_supervised_trainer(*arguments, **settings)

            @trainer.on(Events.ITERATION_COMPLETED)
            def note() -> None:
                state = trainer.state
                row = [state.iteration, harness.digest(state.batch), state.output.hex()]
                print(json.dumps(row), file=lines, flush=True)
                if name := stop.get(str(state.iteration)):
                    os.kill(os.getpid(), getattr(signal, name))

            @trainer.on(Events.COMPLETED)
            def end() -> None:
                model = arguments[0].state_dict()
                print(json.dumps(["end", harness.digest(model)]), file=lines, flush=True)

            return trainer

        # The script imports this name; not a line of it is changed.
        crosstrain.engine.create_supervised_trainer = watched
        sys.argv = [str(SCRIPT), "--backend", spec, "--epochs", str(EPOCHS)]
        sys.argv += ["--workers", str(workers), "--out", folder]
        code: Any = None
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        assert code == (128 + signal.SIGTERM if "SIGTERM" in stop.values() else 0), code
