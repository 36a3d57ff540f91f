"""How long training stands still for a checkpoint: ours beside torch's and pytorch-ignite's.

All ways save the same model and Adam state (400 MB by default), in turns, in one run. For each way:

- stall: the time from the call until training may go on, and what the next optimizer step waits;
- least: the shortest stall of all rounds, which other work on the machine disturbs the least;
- whole: how much longer five iterations take with the save than the five before it did, the
  thread's work on the same cores included.

    python benchmarks/checkpoint_stall.py [--megabytes 400] [--rounds 7] [--folder DIR] [--s3]

The state is changed between saves by a training step on every parameter. Needs pytorch-ignite.
With `--s3`, ours saves into a bucket as well, of moto's server on loopback, which takes its share
of the same cores; it needs moto and s3fs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import ignite.handlers
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from crosstrain.engine import DiskSaver
from crosstrain.engine.checkpoints.save_handler import RunFacts

Save = Callable[[dict[str, Any]], None]
ITERATIONS = 5


class Training:
    """A perceptron with Adam whose state has about so many megabytes."""

    def __init__(self, megabytes: int) -> None:
        width = 2048
        layers = max(1, round(megabytes * 2**20 / 3 / 4 / width**2))
        torch.manual_seed(0)
        blocks: list[torch.nn.Module] = []
        for _ in range(layers):
            blocks += [torch.nn.Linear(width, width), torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*blocks)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.batch = torch.randn(8, width)
        self.waiting = 0.0
        self.step()
        self.optimizer.register_step_pre_hook(self._arrive)

    def _arrive(self, *_: object) -> None:
        # The first of the hooks; the last one, which a save may have added, follows it.
        self._arrived = time.perf_counter()

    def step(self) -> None:
        """One iteration; `waiting` is what the optimizer's step waited for before it began."""
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        leave = self.optimizer.register_step_pre_hook(self._leave)
        self.optimizer.step()
        leave.remove()

    def _leave(self, *_: object) -> None:
        self.waiting += time.perf_counter() - getattr(self, "_arrived", time.perf_counter())

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def torch_save(folder: Path) -> Save:
    """A bare torch.save, as most scripts have it."""
    return lambda state: torch.save(state, folder / "checkpoint.pt")


def torch_save_flushed(folder: Path) -> Save:
    """torch.save as it has to be for the file to survive: aside, flushed, renamed, flushed."""

    def save(state: dict[str, Any]) -> None:
        aside = folder / "checkpoint.tmp"
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / "checkpoint.pt")
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    return save


def ignite_disk_saver(folder: Path) -> Save:
    """pytorch-ignite's DiskSaver: aside and renamed, not flushed."""
    saver = ignite.handlers.DiskSaver(folder, require_empty=False)
    return lambda state: saver(state, "checkpoint.pt")


def dcp_async(folder: Path, stager: Any) -> Save:
    """torch.distributed.checkpoint.async_save; waits for the save before it first, as ours."""
    pending: list[Any] = []

    def save(state: dict[str, Any]) -> None:
        if pending:
            pending.pop().result()
        target = folder / f"{time.monotonic_ns()}"
        for old in folder.iterdir():
            shutil.rmtree(old)
        pending.append(
            dcp.async_save(state, checkpoint_id=target, async_stager=stager, no_dist=True)
        )

    return save


def ours(folder: Path | str, training: Training, **how: bool) -> Save:
    """Our DiskSaver: checked free space, hashed, aside, flushed, renamed, flushed; or uploaded."""
    saver = DiskSaver(folder, require_empty=False, **how)
    checkpoint = {"model": training.model, "optimizer": training.optimizer}
    facts = RunFacts(names=tuple(checkpoint), objects=checkpoint)

    def save(state: dict[str, Any]) -> None:
        saver.prepare(facts)
        saver(state, "checkpoint.pt")

    save.wait = saver.wait  # type: ignore[attr-defined]
    return save


@contextlib.contextmanager
def s3_bucket() -> Generator[str]:
    """Runs an S3 server; yields the URL of a bucket."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    access = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    os.environ |= {**dict.fromkeys(access, "none"), "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.1)
            request = urllib.request.Request(f"http://127.0.0.1:{port}/stall", method="PUT")
            urllib.request.urlopen(request, timeout=60).close()
            yield "s3://stall"
        finally:
            server.kill()


def measure(training: Training, save: Save) -> tuple[float, float]:
    """Saves once and trains on; returns the stall and the time of all iterations, in seconds."""
    state = training.state()
    training.waiting = 0.0
    began = time.perf_counter()
    save(state)
    called = time.perf_counter() - began
    for _ in range(ITERATIONS):
        training.step()
    return called + training.waiting, time.perf_counter() - began


def undisturbed(training: Training) -> float:
    """Returns the time of the iterations without a save."""
    began = time.perf_counter()
    for _ in range(ITERATIONS):
        training.step()
    return time.perf_counter() - began


def main() -> None:
    """Measures all ways in turns, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--s3", action="store_true", help="also into a bucket on loopback")
    args = parser.parse_args()
    # torch.distributed.checkpoint warns of what a single process need not heed.
    warnings.filterwarnings("ignore")
    training = Training(args.megabytes)
    place = Path(tempfile.mkdtemp(dir=args.folder))
    # Its defaults need an accelerator; so it copies into memory that it keeps.
    stager = DefaultStager(StagingOptions(False, False, False, False))
    makers: dict[str, Callable[[Path], Save]] = {
        "torch.save": torch_save,
        "torch.save, flushed": torch_save_flushed,
        "ignite DiskSaver": ignite_disk_saver,
        "dcp.async_save": lambda folder: dcp_async(folder, None),
        "dcp.async_save, stager kept": lambda folder: dcp_async(folder, stager),
        "DiskSaver": lambda folder: ours(folder, training),
        "DiskSaver, background": lambda folder: ours(folder, training, background=True),
        "DiskSaver, background, overlap": lambda folder: ours(
            folder, training, background=True, overlap=True
        ),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, place)
        if args.s3:
            url = stack.enter_context(s3_bucket())
            for how in ({"background": True}, {"background": True, "overlap": True}):
                name = ", ".join(("DiskSaver, s3://", *how))
                makers[name] = lambda folder, how=how: ours(f"{url}/{folder.name}", training, **how)
        report(training, makers, place, args.rounds)


def report(
    training: Training, makers: dict[str, Callable[[Path], Save]], place: Path, rounds: int
) -> None:
    """Measures and prints."""
    stalls: dict[str, list[float]] = {name: [] for name in makers}
    wholes: dict[str, list[float]] = {name: [] for name in makers}
    saves: dict[str, Save] = {}
    for name, make in makers.items():
        # Numbers: some names are no good in a URL.
        folder = place / str(len(saves))
        folder.mkdir()
        saves[name] = make(folder)
    size = sum(p.numel() * 12 for p in training.model.parameters())
    alone: list[float] = []
    for number in range(rounds + 1):
        for name, save in saves.items():
            alone.append(undisturbed(training))
            stall, whole = measure(training, save)
            # What is still being written must not disturb the next way.
            getattr(save, "wait", lambda: None)()
            time.sleep(2.0)
            os.sync()
            if number == 0:
                print(f"first save: {name:32} {stall * 1e3:7.1f} ms", flush=True)
                continue
            stalls[name].append(stall)
            wholes[name].append(whole - alone[-1])
    print(
        f"\n{size / 2**20:.0f} MiB of model and Adam state, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {statistics.median(alone) / ITERATIONS * 1e3:.0f} ms "
        f"an iteration; medians of {rounds} saves"
    )
    base = {kind: kind(stalls["torch.save, flushed"]) for kind in (statistics.median, min)}
    titles = ("stall", "of flushed", "least", "of flushed", "whole")
    print(f"{'way':32}", *(f"{title:>10}" for title in titles))
    for name in makers:
        columns = [f"{name:32}"]
        for kind, flushed in base.items():
            stall = kind(stalls[name])
            columns += [f"{stall * 1e3:7.1f} ms", f"{stall / flushed:10.1%}"]
        columns.append(f"{statistics.median(wholes[name]) * 1e3:7.1f} ms")
        print(" ".join(columns))


if __name__ == "__main__":
    main()
