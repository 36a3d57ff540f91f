"""What the storm over ranks trains, in each process of a world that torchrun starts."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader

from crosstrain.ci.trials.digests import digest
from crosstrain.ci.trials.digits import DigitsDataset, digits_network
from crosstrain.engine import (
    Checkpoint,
    DiskSaver,
    Engine,
    Events,
    create_supervised_trainer,
    manual_seed,
    resume_or_start,
)

__all__ = ["main"]


def _prepared(backend: str, samples: int) -> tuple[Engine, dict[str, Any], Any]:
    """Returns a trainer of a small network on some digits, what to save of it, and its loader."""
    manual_seed(2026)
    loader = DataLoader(DigitsDataset(True, samples), batch_size=12, shuffle=True)
    model = digits_network()
    loss: Any = nn.functional.cross_entropy
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = create_supervised_trainer(model, optimizer, loss, backend=backend, deterministic=True)
    return trainer, {"model": model, "optimizer": optimizer}, loader


def _alarm(seconds: float, name: str) -> None:
    """Has the process send itself a signal."""
    number = signal.Signals[name]

    def send(*_: object) -> None:
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGALRM, send)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-4))


def train(backend: str, folder: Path, iterations: int, kills: int, seed: int) -> None:
    """Trains once, resumes where it was killed, and kills itself in as many of its first lives.

    Args:
        backend: a spec.
        folder: of the checkpoints, and of the lines that each rank writes.
        iterations: how many to train.
        kills: in how many of its lives one rank kills itself.
        seed: of the moments.
    """
    rank = int(os.environ["RANK"])
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    moments = random.Random(f"{seed} {life}")
    victim = moments.randrange(int(os.environ["WORLD_SIZE"]))
    # One in eight while it starts, the others anywhere in or between some iterations.
    starting, after = moments.random() < 0.125, moments.randint(1, 12)
    delay = moments.uniform(0, 0.03)
    doomed = life < kills and victim == rank

    if doomed and starting:
        _alarm(20 * delay, "SIGKILL")
    trainer, objects, loader = _prepared(backend, 300)
    done = 0
    with (folder / f"rank-{rank}").open("a") as lines:

        @trainer.on(Events.ITERATION_COMPLETED)
        def tell() -> None:
            nonlocal done
            print(json.dumps([trainer.state.iteration, trainer.state.output]), file=lines)
            lines.flush()
            done += 1
            if doomed and not starting and done == after:
                _alarm(delay, "SIGKILL")

        run = resume_or_start(trainer, objects, folder / "checkpoints", every=2)
        trainer.run(loader, max_epochs=iterations // len(loader))
    end = {
        "iteration": trainer.state.iteration,
        "weights": digest(objects["model"].state_dict()),
        "optimizer": digest(objects["optimizer"].state_dict()),
        "random": digest(torch.get_rng_state()),
        "exit": run.exit_code,
    }
    (folder / f"end-{rank}.json").write_text(json.dumps(end))


def _disturb(trainer: Engine, moments: random.Random, after: float | None) -> None:
    """Makes iterations of uneven length, and has SIGTERM arrive some seconds after the start."""

    @trainer.on(Events.ITERATION_STARTED)
    def wait() -> None:
        time.sleep(moments.uniform(0, 0.004))

    if after is not None:
        seconds = after

        @trainer.on(Events.ITERATION_STARTED(once=1))
        def stop() -> None:
            _alarm(seconds, "SIGTERM")


def stop_often(backend: str, folder: Path, times: int, seed: int) -> None:
    """Trains many times; each time SIGTERM arrives at a random rank at a random moment.

    Args:
        backend: a spec.
        folder: of the checkpoints; each rank writes there what became of its runs.
        times: how many times.
        seed: of the ranks and moments.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    moments = random.Random(seed)
    told: list[Any] = []
    for number in range(times):
        victim, after = moments.randrange(size), moments.uniform(0.001, 0.15)
        trainer, objects, loader = _prepared(backend, 96)
        place = folder / f"{number}"
        run = resume_or_start(trainer, objects, place, every=10**6)

        _disturb(
            trainer, random.Random(f"{seed} {number} {rank}"), after if rank == victim else None
        )
        begun = time.monotonic()
        trainer.run(loader, max_epochs=1000)
        waited = time.monotonic() - begun - after
        group: Any = distributed
        group.barrier()
        saved = Checkpoint.latest(place).manifest
        told.append(
            [run.exit_code, trainer.state.iteration, saved and saved.iteration, round(waited, 3)]
        )
        saver: Any = run.checkpoint.save_handler
        assert isinstance(saver, DiskSaver)
        saver.close()
    (folder / f"end-{rank}.json").write_text(json.dumps(told))


def main() -> None:
    """Trains, as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stops:
        stop_often(args.backend, args.folder, args.stops, args.seed)
    else:
        train(args.backend, args.folder, args.iterations, args.kills, args.seed)


if __name__ == "__main__":
    main()
