"""Another file of a script: a variable, and a function that counts its calls in it."""

from __future__ import annotations

CALLS = 0


def draw() -> float:
    """Returns a factor of about one, by how often it was called."""
    global CALLS
    CALLS += 1
    return 1 + (CALLS * 0.618) % 1.0
