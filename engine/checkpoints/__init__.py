"""Checkpoints as users meet them: saved by handlers, found again, loaded, and resumed from."""

from crosstrain.engine.storage.places import Place, place_of

from .layouts import PARTS, is_checkpoint, layout_of, list_checkpoints
from .objects import check_objects, unsaved_objects

__all__ = [
    "PARTS",
    "Place",
    "check_objects",
    "is_checkpoint",
    "layout_of",
    "list_checkpoints",
    "place_of",
    "unsaved_objects",
]
