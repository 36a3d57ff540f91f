"""What the step and handlers use that no checkpoint holds: found while a run goes on, and told."""

from .looks import Unsaved
from .made_again import is_made_beside

__all__ = ["Unsaved", "is_made_beside"]
