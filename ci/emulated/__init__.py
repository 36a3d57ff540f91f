"""An accelerator that needs no hardware: what a real one does to a program, in Python, for tests.

It has memory of its own (a tensor of the CPU in an operation is an error), a random generator of
its own, autocast, a loss scaler, and streams whose work is not done until somebody waits for it:
who reads too early reads poison. It counts what the host reads, and is out of memory on demand.

The backend is called `emulated`. torch takes one device of this kind a process, and never gives it
up: importing this module registers nothing, `register()` and `get("emulated")` do. So tests that
use it run in processes of their own, or ask for it by `--backends emulated`.
"""

from .backend import EmulatedBackend
from .device import COUNT, NAME, host_reads, out_of_memory, register
from .streams import pending

__all__ = ["COUNT", "NAME", "EmulatedBackend", "host_reads", "out_of_memory", "pending", "register"]
