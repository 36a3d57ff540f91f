"""The host of a TPU: what a machine must have for one, told without starting anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .errors import Missing

_BUS = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"

# Google's PCI devices that are TPUs; its network cards have the same vendor.
_CHIPS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU 7x",
}


def versions_of(*packages: str) -> dict[str, str]:
    """Returns the versions of torch and of those of some distributions that are installed."""
    # Not before it is asked for: `import_risk` is.
    import torch

    found = {package: installed_version(package) for package in packages}
    # Its own word: the package's lacks what it was built for.
    return {
        "torch": str(torch.__version__),
        **{package: number for package, number in found.items() if number is not None},
    }


def installed_version(package: str) -> str | None:
    """Returns the version of an installed distribution; None if there is none of that name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_risk() -> Missing | None:
    """Returns why an import of torch would end this process here; None if it would not.

    torch loads torch_tpu by itself, and that one, without libtpu, aborts: no error can be caught.
    """
    if find_spec("torch_tpu") is None or find_spec("libtpu") is not None:
        return None
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return None
    return Missing(
        "torch_tpu is installed without its library libtpu: an import of torch would load it and "
        "abort the process.",
        "Run pip install libtpu, or pip uninstall torch-tpu, or set "
        "TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
    )


def tpu_chips(bus: Path = _BUS) -> list[str]:
    """Returns the kinds of the TPU chips on the PCI bus, one entry a chip."""
    found: list[str] = []
    for device in sorted(bus.glob("*")):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "device").read_text().strip()
        except OSError:
            # A device that is gone, or is not ours to read, is none to compute on.
            continue
        if vendor == _GOOGLE and kind in _CHIPS:
            found.append(_CHIPS[kind])
    return found


def hardware_absence(chips: Sequence[str]) -> Missing | None:
    """Returns what a TPU still needs here besides a library for torch; None if nothing."""
    if not chips:
        return Missing(
            "This machine has no TPU on its PCI bus.",
            "Run on a TPU VM; in a container, pass on /dev/accel* or /dev/vfio, and /sys.",
        )
    if find_spec("libtpu") is None:
        return Missing(
            f"There is a TPU ({', '.join(sorted(set(chips)))}), but its library libtpu is not "
            "installed.",
            "Run pip install libtpu, of the version that the library for torch asks for.",
        )
    return None
