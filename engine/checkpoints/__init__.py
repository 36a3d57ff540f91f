"""Checkpoints as users meet them: saved by handlers, found again, loaded, and resumed from."""

from .layouts import PARTS, layout_of, list_checkpoints
from .objects import check_objects, unsaved_objects

__all__ = ["PARTS", "check_objects", "layout_of", "list_checkpoints", "unsaved_objects"]
