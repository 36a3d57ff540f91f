"""The pytest plugin: tests that run on every backend, by one fixture."""
