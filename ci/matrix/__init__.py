"""``crosstrain matrix``: every scenario on every backend, and the reports of it."""
