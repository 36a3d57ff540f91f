"""Checkpoints as users meet them: saved by handlers, found again, loaded, and resumed from."""

from crosstrain.engine.storage.locations import Location, location_of

from .layouts import PARTS, is_checkpoint, layout_of, list_checkpoints
from .objects import check_objects, unsaved_objects

__all__ = [
    "PARTS",
    "Location",
    "check_objects",
    "is_checkpoint",
    "layout_of",
    "list_checkpoints",
    "location_of",
    "unsaved_objects",
]
