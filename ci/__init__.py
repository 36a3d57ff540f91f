"""The hardware matrix of crosstrain and its command line.

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
