"""Two machines, one cut off and brought back: `python tests/stress/two_machines.py`.

The machines are network namespaces of this one, with a cable of their own (a veth pair), process
ids and host names of their own, and one file system. torchrun on each starts one rank of a training
on gloo. In the middle the cable is cut: no connection is closed, the other side only falls silent.
Both ranks have to end within the timeout. Then the cable is mended and the same command started
again, and the run must end with the bits of one that nobody disturbed.

Needs root on Linux, iproute2 and util-linux; `--check` says what is missing. All traffic stays
within the namespaces, which are removed at the end, however it ends. Exit codes: 0 if shown, 1 if
not, 2 if it cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from forked import ROOM
from rank_storm import losses_of

from crosstrain.ci.trials.digests import leaf_digests
from crosstrain.ci.trials.digits import read_digits
from crosstrain.engine import Checkpoint
from crosstrain.engine.machine import began as is_alive

__all__ = ["Machines", "cut_and_mend", "main", "missing"]

_PREFIX: Final = "crosstrain-"
_CABLE: Final = "cable"
_ADDRESSES: Final = ("10.213.77.1", "10.213.77.2")
_PORT: Final = 29500
# The variable by which the processes of a start are found.
_FOLDER: Final = "CROSSTRAIN_TEST_FOLDER"
_TOOLS: Final = {"ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux"}
# torchrun's ranks name themselves before each line of a traceback.
_CAUSE: Final = re.compile(r"\[rank\d\]: [\w.]*(Error|Failed): ")
# What a rank may take beyond the timeout, in seconds: it gives up the store after 5, and then the
# interpreter ends. Wide, for a busy machine.
_MARGIN: Final = 20.0
# How long one start may take as a whole, and torchrun itself once its rank has ended, in seconds.
_PATIENCE: Final = 300.0
_GRACE: Final = 5.0


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


class _Machine:
    """A machine that runs: `machine.py` in a namespace, which starts one torchrun at a time.

    Args:
        inside: the beginning of a command that runs there.
        number: of the machine.
    """

    def __init__(self, inside: Sequence[str], number: int) -> None:
        program = str(Path(__file__).with_name("machine.py"))
        self._process = subprocess.Popen(
            [*inside, sys.executable, program, f"machine-{number}"],
            env={**os.environ, "OMP_NUM_THREADS": "1", **ROOM},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A Ctrl-C comes to this process only, which then ends them.
            start_new_session=True,
        )
        self._told = b""
        self.returncode: int | None = None

    def _hear(self, seconds: float) -> list[str]:
        """Returns the lines that have come, waiting for some, and notes an exit code."""
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], seconds)[0]:
            some = os.read(self._process.stdout.fileno(), 4096)
            if not some:
                raise RuntimeError("A machine has ended by itself.")
            self._told += some
        *lines, self._told = self._told.split(b"\n")
        for line in lines:
            if line != b"done":
                self.returncode = int(line)
        return [line.decode() for line in lines]

    def _order(self, what: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + _PATIENCE
        while "done" not in self._hear(1):
            if time.monotonic() > deadline:
                raise RuntimeError(f"A machine has not answered within {_PATIENCE:g} s.")

    def start(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        """Starts torchrun.

        Args:
            arguments: its arguments.
            environment: its variables.
            log: where its output goes.
        """
        self.returncode = None
        argv = ["-m", "torch.distributed.run", *arguments]
        self._order({"argv": argv, "env": environment, "log": str(log)})

    def poll(self) -> int | None:
        """Returns the exit code of torchrun, once it has ended."""
        self._hear(0)
        return self.returncode

    def stop(self) -> None:
        """Kills what was started, with all of its children."""
        self._order(None)

    def close(self) -> None:
        """Ends the machine."""
        self._process.kill()
        self._process.communicate()


class Machines:
    """Two network namespaces with a cable between them; a context manager that removes them.

    Raises:
        OSError: if the system does not allow it; names the command and what it said.
    """

    def __init__(self) -> None:
        self.names = [f"{_PREFIX}{os.getpid()}-{number}" for number in range(2)]
        self.running: list[_Machine] = []

    def __enter__(self) -> Machines:
        _remove_left()
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            one, other = self.names
            # Made within the two, so that this machine's own network never has either end.
            ends = ["type", "veth", "peer", "name", _CABLE, "netns", other]
            _ip("-n", one, "link", "add", _CABLE, *ends)
            for name, address in zip(self.names, _ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/30", "dev", _CABLE)
                _ip("-n", name, "link", "set", _CABLE, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the machines, and removes the namespaces."""
        for machine in self.running:
            machine.close()
        self.running.clear()
        for name in self.names:
            with contextlib.suppress(OSError):
                _ip("netns", "delete", name)

    def stop(self) -> None:
        """Kills what was started on both, with all of its children."""
        for machine in self.running:
            machine.stop()

    def inside(self, number: int) -> list[str]:
        """Returns the beginning of a command that runs as the first process of a machine."""
        # A machine's processes die with their first one, that with unshare, that with this one.
        words = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.names[number]]
        return [*words, "unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]

    def boot(self) -> None:
        """Has both machines run."""
        self.running = [_Machine(self.inside(number), number) for number in range(2)]

    def cut(self) -> None:
        """Cuts the second machine off."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "down")

    def mend(self) -> None:
        """Brings it back."""
        _ip("-n", self.names[1], "link", "set", _CABLE, "up")


def _remove_left() -> None:
    """Removes the namespaces that a killed process of this script has left."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(_PREFIX).partition("-")[0]
        ours = name.startswith(_PREFIX) and owner.isdigit()
        if ours and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                _ip("netns", "delete", name)


def missing() -> list[str]:
    """Returns what keeps this machine from playing two, as sentences; it makes two to find out."""
    if not sys.platform.startswith("linux"):
        return [f"Network namespaces are Linux's, and this is {sys.platform}."]
    found = [
        f"`{tool}` is not installed; it is a part of {package}."
        for tool, package in _TOOLS.items()
        if shutil.which(tool) is None
    ]
    if os.geteuid() != 0:
        found.append("It takes root to make a network namespace; run it as root.")
    try:
        read_digits(2)
    except ModuleNotFoundError as error:
        found.append(str(error))
    if not torch.distributed.is_gloo_available():
        found.append(f"This build of torch {torch.__version__} has no gloo.")
    if found:
        return found
    try:
        with Machines() as machines:
            command = [*machines.inside(0), "true"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"The system does not allow it: {error}"]
    if done.returncode:
        said = done.stderr.strip()
        return [f"The system does not allow a process in a namespace of its own: {said}"]
    return []


class _Run:
    """One start of the training on both machines.

    Args:
        machines: where.
        folder: of the checkpoints and of what the ranks write; kept from start to start.
        iterations: how many to train.
        timeout: CROSSTRAIN_TIMEOUT, in seconds.
        start: the number of the start.
    """

    def __init__(
        self, machines: Machines, folder: Path, iterations: int, timeout: float, start: int
    ) -> None:
        self._machines, self._folder = machines, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"machine-{number}-{start}.log" for number in range(2)]
        outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: text for name, text in os.environ.items() if name not in outer}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _CABLE,
            "CROSSTRAIN_TIMEOUT": f"{timeout:g}",
            _FOLDER: str(folder),
        }
        self.agents = machines.running
        for number, (machine, log) in enumerate(zip(self.agents, self.logs, strict=True)):
            command = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)]
            command += ["--master-addr", _ADDRESSES[0], "--master-port", str(_PORT)]
            command += [str(Path(__file__).with_name("rank_training.py")), "--backend", "cpu"]
            command += ["--folder", str(folder), "--iterations", str(iterations)]
            machine.start(command, environment, log)

    def finish(self) -> None:
        """Waits for the end.

        Raises:
            RuntimeError: if it fails, or does not come.
        """
        _await(lambda: all(a.poll() is not None for a in self.agents), "the end", self)
        if codes := [agent.returncode for agent in self.agents if agent.returncode]:
            raise RuntimeError(f"torchrun ended with {codes[0]}:\n{self.said()}")
        self._machines.stop()

    def said(self) -> str:
        """Returns the end of what the machines printed."""
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in self.logs)

    def trained(self) -> int:
        """Returns how many iterations rank 0 has written of."""
        path = self._folder / "rank-0"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def ranks(self) -> list[int]:
        """Returns the process ids of the ranks that are alive, rank 0's first."""
        found: dict[int, int] = {}
        ours = f"{_FOLDER}={self._folder}".encode()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((place / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            for rank in range(2):
                if {ours, b"RANK=%d" % rank} <= variables and is_alive(int(place.name)):
                    found[rank] = int(place.name)
        return [found[rank] for rank in sorted(found)]

    def cause(self, number: int) -> str:
        """Returns the line by which a machine's rank told why it ended."""
        lines = self.logs[number].read_text(errors="replace").splitlines()
        told = [line for line in lines if _CAUSE.match(line)]
        return told[-1].partition(": ")[2] if told else "without a word"


def _await(done: Callable[[], bool], what: str, run: _Run) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"Not within {_PATIENCE:g} s: {what}.\n{run.said()}")
        time.sleep(0.01)


def _silence(machines: Machines, run: _Run, timeout: float, say: Callable[[str], None]) -> bool:
    """Cuts the second machine off and watches both ranks end; tells whether they did in time."""
    ranks = run.ranks()
    if len(ranks) != 2:
        raise RuntimeError(f"{len(ranks)} ranks were alive where the cable was to be cut.")
    machines.cut()
    cut, ended = time.monotonic(), dict[int, float]()
    say(f"machine 1 cut off, at iteration {run.trained()}")
    while len(ended) < 2 and time.monotonic() - cut < timeout + _MARGIN:
        time.sleep(0.05)
        for rank, process in enumerate(ranks):
            if rank not in ended and not is_alive(process):
                ended[rank] = time.monotonic() - cut
                say(f"rank {rank} ended, {ended[rank]:.1f} s after the cut: {run.cause(rank)}")
    for rank in {0, 1} - set(ended):
        say(f"rank {rank} hangs, {timeout + _MARGIN:g} s after the cut")
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and any(a.poll() is None for a in run.agents):
        time.sleep(0.05)
    for number, agent in enumerate(run.agents):
        if agent.poll() is None:
            say(f"torchrun on machine {number} is still there, and is killed")
    machines.stop()
    return len(ended) == 2


def _state(folder: Path) -> dict[str, Any]:
    """Returns all that is compared, by name."""
    found: dict[str, Any] = {}
    for rank in range(2):
        found[f"rank {rank}: losses"] = losses_of(folder, rank)
        for name, value in json.loads((folder / f"end-{rank}.json").read_text()).items():
            found[f"rank {rank}: {name}"] = value
    path = Checkpoint.latest(folder / "checkpoints").path
    if path is None:
        raise RuntimeError(f"There is no good checkpoint in {folder / 'checkpoints'}.")
    return found | leaf_digests(torch.load(path, weights_only=True), "last checkpoint: ")


def cut_and_mend(
    folder: Path, iterations: int, timeout: float, say: Callable[[str], None]
) -> list[str]:
    """Trains undisturbed, and once more with one machine cut off; returns what is wrong.

    Args:
        folder: an empty one, for both.
        iterations: how many to train, a multiple of 25.
        timeout: CROSSTRAIN_TIMEOUT, in seconds.
        say: is told what happens.

    Raises:
        OSError: if the system does not allow it.
        RuntimeError: if a training does not come to where it should.
    """
    with Machines() as machines:
        machines.boot()
        say("two machines, undisturbed")
        _Run(machines, folder / "straight", iterations, timeout, 0).finish()
        say(f"ended at iteration {iterations}; once more")
        cut = _Run(machines, folder / "cut", iterations, timeout, 0)
        _await(lambda: cut.trained() >= iterations // 2, "half of the iterations", cut)
        wrong = [] if _silence(machines, cut, timeout, say) else ["a rank hangs"]
        machines.mend()
        last = Checkpoint.latest(folder / "cut" / "checkpoints").manifest
        say(f"machine 1 back; start again from iteration {last.iteration if last else 0}")
        _Run(machines, folder / "cut", iterations, timeout, 1).finish()
        say(f"ended at iteration {iterations}")
    straight, other = _state(folder / "straight"), _state(folder / "cut")
    names = sorted(straight.keys() | other.keys())
    parted = [f"{name} differs" for name in names if straight.get(name) != other.get(name)]
    say(f"{len(names)} values compared, {len(names) - len(parted)} alike")
    return wrong + parted


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    """Shows it, and says what happened and when; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say only whether it can run here")
    parser.add_argument("--iterations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=12.0, help="seconds; default: %(default)s")
    args = parser.parse_args()
    if args.iterations < 50 or args.iterations % 25:
        parser.error(f"--iterations {args.iterations}: give a multiple of 25, 50 or more")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if reasons := missing():
        print("Two machines cannot be played here. " + " ".join(reasons))
        return 2
    if args.check:
        print("Two machines can be played here.")
        return 0
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:7.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        try:
            wrong = cut_and_mend(Path(place), args.iterations, args.timeout, say)
        except (OSError, RuntimeError) as error:
            wrong = [str(error)]
    print("\n".join(wrong) or "Bit-identical; no rank hung.")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
