"""A program for torchrun: the last process cannot write its part of a sharded checkpoint.

Called with a folder and `background` or `foreground`. It saves at each third iteration; after the
fifth, no file of the last process may be larger than 64 bytes, as where its disk is full.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from sharded_program import build, trainer

from crosstrain.backends import get
from crosstrain.engine import Checkpoint, DiskSaver, Engine, Events


def newest(folder: Path) -> str | None:
    path = Checkpoint.latest(folder).path
    return None if path is None else path.name


def main(folder: Path, background: bool) -> None:
    """Trains until a save fails, then saves again where it does not."""
    with get("cpu:fsdp") as backend:
        rank = backend.world.rank
        objects = build(backend)
        engine = trainer(backend, objects)
        saver = DiskSaver(folder / "saved", background=background, parts=True)
        handler = Checkpoint({**objects, "trainer": engine}, saver, n_saved=1)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        told: dict[str, Any] = {}

        @engine.on(Events.ITERATION_COMPLETED(once=5))
        def fill() -> None:
            handler.wait()
            if rank == backend.world.size - 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))

        engine.add_event_handler(Events.ITERATION_COMPLETED(every=3), handler)

        @engine.on(Events.EXCEPTION_RAISED)
        def note(_: Engine, error: BaseException) -> None:
            told.update(error=f"{type(error).__name__}: {error}", iteration=engine.state.iteration)
            engine.terminate()

        engine.run([None] * 20, max_epochs=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told["after"] = newest(saver.dirname)
        engine.state.iteration = 7
        handler(engine)
        saver.close()
        # Rank 0 removes the checkpoint before; then all look.
        torch.distributed.barrier()
        told["again"] = newest(saver.dirname)
        told["left"] = sorted(path.name for path in saver.dirname.iterdir())
        (folder / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "background")
