"""A program for torchrun: trains with a trace; where it is told to, one rank kills itself once.

Called with a folder, a backend and the iteration after which rank 1 dies in its first life, or 0.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from trace_runs import build

from crosstrain.ci import TraceRecorder
from crosstrain.engine import Engine, Events, resume_or_start


def main(folder: Path, spec: str, death: int) -> None:
    """Trains 12 iterations, in accumulation windows of 2."""
    training = build(spec, gradient_accumulation_steps=2)
    trainer = training.trainer
    recorder = TraceRecorder(folder / "trace", every_sync=3)
    recorder.attach(trainer)
    to_save = {**training.to_save, "trace": recorder}
    # In the foreground: what is saved is there before the kill.
    run = resume_or_start(trainer, to_save, folder / "saved", every=4, background=False)

    @trainer.on(Events.ITERATION_COMPLETED(once=death or 10**6))
    def die(engine: Engine) -> None:
        assert engine.backend is not None
        if run.resumed_from is None and engine.backend.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    training.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
