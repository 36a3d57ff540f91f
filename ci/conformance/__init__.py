"""The conformance checks: does a backend keep every promise of the step protocol?

On the command line: ``python -m crosstrain.ci.conformance mine:bf16``.
"""

from .case import NonConformance
from .checks import CHECKS
from .command import Finding, applicable, check_backend, main

__all__ = ["CHECKS", "Finding", "NonConformance", "applicable", "check_backend", "main"]
