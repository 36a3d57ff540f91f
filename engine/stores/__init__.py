"""Object stores, where nothing can be renamed or locked: put, fetched, listed through fsspec."""
