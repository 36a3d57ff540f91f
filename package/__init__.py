"""One PyTorch training step for every backend, and runs that resume exactly.

What is used is in `crosstrain.engine`, `crosstrain.backends` and `crosstrain.ci`, in the sources
folders beside this one. Here is only what belongs to the name itself: importing it costs nothing.
"""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Read when it is asked for: what is installed is the one place that knows.
    from importlib.metadata import version

    return version(__name__)
