"""What a checkpoint's file holds: a state as plain types, staged, written, read without code."""
