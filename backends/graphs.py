"""Graphs of a device: the work of a step, recorded once and done again by one call."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any

import torch

from .errors import Missing


def repeatable(hook: Any) -> Any:
    """Marks a hook of an optimizer's step as one that may run at any time, and more than once.

    Hooks do not run when a graph is replayed. Who replays one calls them before and after; and
    while a step is rehearsed and recorded, only those that are marked run.
    """
    hook.crosstrain_repeatable = True
    return hook


def is_repeatable(hook: Any) -> bool:
    """Tells whether a hook was marked by `repeatable`."""
    return getattr(hook, "crosstrain_repeatable", False)


def graph_class(kind: str) -> Any:
    """Returns the class of graphs of a type of device, such as `torch.cuda.CUDAGraph`, or None.

    torch and the makers of devices name it by the type (`torch.xpu.XPUGraph`), beside a context
    `graph` that records one.
    """
    module: Any = torch.get_device_module(kind)
    found = getattr(module, f"{kind.upper()}Graph", None)
    return found if hasattr(module, "graph") else None


def why_not_captured(
    optimizers: Iterable[torch.optim.Optimizer], *, scales: bool
) -> Missing | None:
    """Returns why the steps of optimizers cannot be part of a graph; None if they can."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if scales and not getattr(optimizer, "_step_supports_amp_scaling", False):
            return Missing(
                f"the loss scaler asks the host before each step of {name}, which does not skip "
                "steps by itself",
                "Make it with fused=True, or use bf16, which needs no scaler.",
            )
        for group in optimizer.param_groups:
            if group.get("capturable", True) is False:
                return Missing(
                    f"{name} with capturable=False decides on the host what its next step is",
                    "Make it with capturable=True.",
                )
            if "capturable" not in group and group.get("fused", True) is not True:
                return Missing(
                    f"{name} reads its learning rate on the host unless it is fused",
                    "Make it with fused=True.",
                )
    return None


@contextmanager
def _no_collection() -> Generator[None, None, None]:
    """Holds Python's collector back: a graph that it frees spoils the one that is recorded."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class DeviceGraphs:
    """Makes graphs on one device; all of them share one pool of memory and one stream.

    Whoever warms up on another stream than the recording's leaves libraries to be started while it
    records, which some refuse: so `rehearsing` is on the same one.

    Args:
        device: the device, with its index.
        options: further arguments of the device module's `graph`.
    """

    def __init__(self, device: torch.device, **options: Any) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._stream: Any = self._module.Stream(device=device)
        self._options = options
        self._pool: Any = None

    @contextmanager
    def rehearsing(self) -> Generator[None, None, None]:
        """Has the work inside done on the side stream, between what came before and comes after."""
        present: Any = self._module.current_stream(self.device)
        self._stream.wait_stream(present)
        try:
            with self._module.stream(self._stream):
                yield
        finally:
            present.wait_stream(self._stream)

    def forget(self) -> None:
        """Has the next graph begin a pool: that of graphs which are gone cannot be taken again."""
        self._pool = None

    @contextmanager
    def recording(self) -> Generator[Any, None, None]:
        """Records what is asked of the device inside; nothing of it is done.

        Yields:
            The graph, whose `replay` does it, on the present stream, with what is in the same
            memory then.
        """
        graph: Any = graph_class(self.device.type)()
        pool = {} if self._pool is None else {"pool": self._pool}
        present: Any = self._module.current_stream(self.device)
        try:
            with (
                _no_collection(),
                self._module.graph(graph, stream=self._stream, **pool, **self._options),
            ):
                yield graph
        except BaseException:
            # A recording that failed leaves its stream the present one.
            torch.accelerator.set_stream(present)
            self._end_failed()
            raise
        if self._pool is None:
            self._pool = graph.pool()

    def _end_failed(self) -> None:
        """Has the device's generator draw again after a recording that failed.

        CUDA's takes itself for recorded until a recording ends well, and refuses to draw. Its state
        belongs to the graphs that were recorded before, so it is not exchanged.
        """
        with warnings.catch_warnings():
            # That the graph is empty is what it is for.
            warnings.simplefilter("ignore")
            # If the device is lost, what is told is what came first.
            with (
                suppress(RuntimeError),
                _no_collection(),
                self._module.graph(
                    graph_class(self.device.type)(), stream=self._stream, **self._options
                ),
            ):
                pass
