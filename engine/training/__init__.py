"""The training and the evaluation step, written once for every backend."""
