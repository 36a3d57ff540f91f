"""States as files: whole or absent, verified, and free of code. Knows no engine."""
