"""The hardware that crosstrain trains on, behind one protocol. Importing this imports no torch."""

if __name__ != "crosstrain.backends":
    raise ImportError(
        "crosstrain's backends were imported as 'backends'. Install the project "
        "(pip install -e .) and use 'import crosstrain.backends'."
    )

from .errors import BackendError, BackendUnavailable, UnknownBackend
from .protocol import Availability, Backend, StepResult, World, spec_of
from .registry import add_backend_argument, default_spec, get, names, probe

__all__ = [
    "Availability",
    "Backend",
    "BackendError",
    "BackendUnavailable",
    "StepResult",
    "UnknownBackend",
    "World",
    "add_backend_argument",
    "default_spec",
    "get",
    "names",
    "probe",
    "spec_of",
]
