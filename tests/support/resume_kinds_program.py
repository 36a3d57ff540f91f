"""A program, for torchrun or alone: goes on from what is in a folder, and saves there.

Called with the folder of what is told, the one of the checkpoints, a backend, and the iteration to
end after, or 0.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from shares_program import Training

from crosstrain.engine import Events, ResumeWarning, resume_or_start


def main(told: Path, folder: str, spec: str, until: int) -> None:
    """Trains, and tells what it went on from, the losses, and the weights at the end."""
    training = Training(spec=spec)
    trainer = training.trainer
    objects = {"model": training.model, "optimizer": training.optimizer}
    with warnings.catch_warnings():
        # Of another backend and number of processes, which is what this is about.
        warnings.simplefilter("ignore", ResumeWarning)
        run = resume_or_start(trainer, objects, folder, every=1, background=until % 2 == 1)
    if until:
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=until), trainer.terminate, goes_on=True
        )
    training.run()
    found = None if run.resumed_from is None else run.resumed_from.name
    text = json.dumps({"from": found, **training.told()})
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    (told / f"{rank}-of-{size}.json").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
