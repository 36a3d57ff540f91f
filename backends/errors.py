"""The errors of backend selection, without torch: raised before anything is started."""

from __future__ import annotations

from typing import NamedTuple


class Missing(NamedTuple):
    """Says why something cannot be used here, and what to do about it, each as a sentence."""

    reason: str
    remedy: str


class BackendError(Exception):
    """The base of every error about choosing or starting a backend."""


class UnknownBackend(BackendError):
    """A spec names a backend or an option that does not exist."""


class BackendUnavailable(BackendError):
    """A backend exists but cannot run here.

    Args:
        spec: what was asked for, such as `cuda-amp:bf16`.
        reason: why it cannot run here.
        remedy: what to do so that it can.
    """

    def __init__(self, spec: str, reason: str, remedy: str) -> None:
        super().__init__(spec, reason, remedy)
        self.spec = spec
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"Backend '{self.spec}' is not available: {self.reason} Remedy: {self.remedy}"
