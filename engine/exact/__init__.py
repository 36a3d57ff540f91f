"""What makes a resumed run the same run: the snapshot of all that decides its bits."""

from .snapshot import environment

__all__ = ["environment"]
