"""The data of a run: its order, its random streams, and how any batch of it is reached directly."""
