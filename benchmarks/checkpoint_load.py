"""How long it takes to load a checkpoint into objects, and with how much memory beyond theirs.

All ways load the same model and AdamW state into freshly made objects, in turns, in one run, each
in a process of its own, from the page cache:

- crosstrain: `Checkpoint.load_objects`, every byte verified, and each object read back;
- torch: `torch.load` and `load_state_dict`, nothing verified;
- torch mapped: the same with `mmap=True`: the optimizer's state then stays in the file's memory,
  and is neither read nor copied yet;
- safetensors: `load_file`, the optimizer's state by flat names, and `load_state_dict`; likewise;
- dcp: `torch.distributed.checkpoint.load` into the objects' states, and `set_state_dict`.

For each: the median and the least time of all rounds, the least of the processor's time, the
ratio of the medians to torch's, and the memory at its peak above what the objects take in the end,
as a part of the file: the process's own memory, sampled each millisecond from outside; pages of the
file are the system's.

    python benchmarks/checkpoint_load.py [--megabytes 384 2048] [--rounds 7] [--folder DIR]

safetensors is left out where it is not installed. Linux only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

Objects = tuple[torch.nn.Module, torch.optim.Optimizer]
WIDTH = 2048


def make(megabytes: int) -> Objects:
    """Returns a perceptron and its AdamW; with the optimizer's state so many megabytes in all."""
    layers = max(1, round(megabytes * 2**20 / 3 / 4 / WIDTH**2))
    with torch.device("meta"):
        model = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)])
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    return model, torch.optim.AdamW(model.parameters())


def write(folder: Path, megabytes: int) -> None:
    """Writes the checkpoint in all forms."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from crosstrain.engine import DiskSaver

    model, optimizer = make(megabytes)
    for parameter in model.parameters():
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with DiskSaver(folder) as saver:
        saver(state, "ours.pt")
    torch.save(state, folder / "torch.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_state_dict(model, optimizer)
        dcp.save({"model": theirs[0], "optimizer": theirs[1]}, checkpoint_id=folder / "dcp")
    if importlib.util.find_spec("safetensors"):
        from safetensors.torch import save_file

        flat = {f"model/{name}": value for name, value in state["model"].items()}
        for index, values in state["optimizer"]["state"].items():
            flat |= {f"optimizer/{index}/{key}": value for key, value in values.items()}
        save_file(flat, folder / "flat.safetensors")


def load_ours(folder: Path, objects: Objects) -> None:
    """Our own way."""
    from crosstrain.engine import Checkpoint

    Checkpoint.load_objects({"model": objects[0], "optimizer": objects[1]}, folder / "ours.pt")


def load_torch(folder: Path, objects: Objects, mapped: bool = False) -> None:
    """The way of torch."""
    state = torch.load(folder / "torch.pt", map_location="cpu", mmap=mapped, weights_only=True)
    objects[0].load_state_dict(state["model"])
    objects[1].load_state_dict(state["optimizer"])


def load_torch_mapped(folder: Path, objects: Objects) -> None:
    """The way of torch, from the mapped file."""
    load_torch(folder, objects, mapped=True)


def load_safetensors(folder: Path, objects: Objects) -> None:
    """safetensors', which has no nests and no numbers beside tensors."""
    from safetensors.torch import load_file

    model, optimizer = objects
    flat = load_file(folder / "flat.safetensors")
    weights: dict[str, torch.Tensor] = {}
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in flat.items():
        kind, key, *more = name.split("/")
        if kind == "model":
            weights[key] = value
        else:
            states.setdefault(int(key), {})[more[0]] = value
    del flat
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def load_dcp(folder: Path, objects: Objects) -> None:
    """torch.distributed.checkpoint's, as its tutorial has it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = objects
    states = get_state_dict(model, optimizer)
    state = {"model": states[0], "optimizer": states[1]}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


WAYS: dict[str, Callable[[Path, Objects], None]] = {
    "crosstrain": load_ours,
    "torch": load_torch,
    "torch mapped": load_torch_mapped,
    "safetensors": load_safetensors,
    "dcp": load_dcp,
}


def own_memory(process: int) -> int:
    """Returns the bytes that are a process's own, without pages of files."""
    resident, shared = Path(f"/proc/{process}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Server:
    """A process that loads in one way."""

    def __init__(self, way: str, folder: Path, megabytes: int) -> None:
        program = [sys.executable, __file__, "--serve", way, str(folder)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*program, "--megabytes", str(megabytes)],
            stdin=pipe,
            stdout=pipe,
            text=True,
            # Memory comes fresh, as in a process that loads once.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        )
        self._most = 0
        self._over = threading.Event()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self._most = max(self._most, own_memory(self._process.pid))

    def _ask(self) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told: list[float] = json.loads(self._process.stdout.readline())
        return told

    def load(self) -> tuple[float, float, float]:
        """Loads once; returns the seconds, those of the processor, and the memory above."""
        self._ask()
        self._most = 0
        self._over.clear()
        watch = threading.Thread(target=self._watch)
        watch.start()
        took, busy = self._ask()
        self._over.set()
        watch.join()
        above = max(0, self._most - own_memory(self._process.pid))
        self._ask()
        return took, busy, above

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(way: str, folder: Path, megabytes: int) -> None:
    """Makes objects, loads, and drops the objects; each at a line of its input."""
    warnings.simplefilter("ignore")
    while sys.stdin.readline():
        objects = make(megabytes)
        print("[]", flush=True)
        sys.stdin.readline()
        began, busy = time.perf_counter(), time.process_time()
        WAYS[way](folder, objects)
        took, busy = time.perf_counter() - began, time.process_time() - busy
        print(json.dumps([took, busy]), flush=True)
        sys.stdin.readline()
        del objects
        print("[]", flush=True)


def measure(megabytes: int, rounds: int, folder: Path) -> None:
    """Loads in turns, and prints the table."""
    program = [sys.executable, __file__, "--write", str(folder)]
    subprocess.run([*program, "--megabytes", str(megabytes)], check=True)
    size = (folder / "ours.pt").stat().st_size
    ways = [way for way in WAYS if way != "safetensors" or importlib.util.find_spec(way)]
    servers = {way: Server(way, folder, megabytes) for way in ways}
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for way, server in servers.items():
            told = server.load()
            # The first one imports and warms up.
            if turn:
                found[way].append(told)
    for server in servers.values():
        server.close()
    theirs = statistics.median(took for took, _, _ in found["torch"])
    load = os.getloadavg()[0]
    print(f"\n{size:,} bytes, {rounds} rounds, load {load:.1f}, torch {torch.__version__}")
    print(f"{'':<14}{'median s':>9}{'least s':>9}{'busy s':>9}{'x torch':>9}{'memory above':>14}")
    for way, values in found.items():
        median = statistics.median(took for took, _, _ in values)
        least = min(took for took, _, _ in values)
        busy = min(busy for _, busy, _ in values)
        above = statistics.median(most for _, _, most in values) / size
        times = f"{median:>9.3f}{least:>9.3f}{busy:>9.3f}{median / theirs:>9.2f}"
        print(f"{way:<14}{times}{above:>14.2f}")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[384, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the files are written; temporary by default")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(Path(given.write), given.megabytes[0])
    elif given.serve:
        serve(given.serve[0], Path(given.serve[1]), given.megabytes[0])
    else:
        for megabytes in given.megabytes:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                measure(megabytes, given.rounds, Path(folder))


if __name__ == "__main__":
    main()
