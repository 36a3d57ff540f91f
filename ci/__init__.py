"""The command line of crosstrain, and the rooms that it is made of: ci/README.md is their map.

Imported as ``crosstrain.ci``. It may import ``crosstrain.engine`` and ``crosstrain.backends``;
neither of them may import it.
"""

from __future__ import annotations

if __name__ != "crosstrain.ci":
    raise ImportError(
        f"this package is `crosstrain.ci`, but it was imported as `{__name__}`, which happens when "
        "the repository root is on sys.path. Write `import crosstrain.ci` instead; if that fails, "
        "install the package first: `python -m pip install -e .`"
    )

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosstrain.ci.traces.recorder import TraceRecorder
    from crosstrain.ci.trials.target import Target, TargetError, Training
    from crosstrain.ci.verification.run import Verdict, VerifyError, verify

__all__ = ["Target", "TargetError", "TraceRecorder", "Training", "Verdict", "VerifyError", "verify"]

_HOMES = {
    "Target": "trials.target",
    "TargetError": "trials.target",
    "TraceRecorder": "traces.recorder",
    "Training": "trials.target",
    "Verdict": "verification.run",
    "VerifyError": "verification.run",
    "verify": "verification.run",
}


def __getattr__(name: str) -> Any:
    # On first use: the command line is imported through this package and must stay light.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
