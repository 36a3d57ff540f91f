"""Checkpoints in parts, of states that lie in several processes: each writes what it holds."""
