"""``crosstrain demo``: a training is killed and resumed, and nothing differs."""
