"""Checkpoints as users meet them: saved by handlers, found again, loaded, and resumed from."""
