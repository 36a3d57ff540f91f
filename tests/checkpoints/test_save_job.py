"""Work in a thread, and what interrupts whoever waits for it."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import pytest

from crosstrain.engine.checkpoints.save_job import JointJob


def test_a_wait_that_is_interrupted_can_be_gone_on_with() -> None:
    """Python's `Thread.join` takes the thread for ended then, and does not wait for it at exit."""
    go_on, done = threading.Event(), []

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    job = JointJob(lambda: done.append(go_on.wait(20)), "work")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            job.finish()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert job.running
    assert any(thread.name == "work" for thread in threading.enumerate())
    go_on.set()
    job.finish()
    assert done == [True]
    assert not job.running
