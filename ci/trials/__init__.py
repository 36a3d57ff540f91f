"""Trials: a training that is run in processes of its own, interrupted, killed and resumed."""
