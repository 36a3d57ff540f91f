"""What the source of a user's functions shows: read as a syntax tree, and nothing of it is run.

Each file answers one question, of functions that it is given; which these are, it does not know.

- what a function is, and what its code names (`functions.py`, `tree.py`);
- what is done with its variables, and with attributes (`uses.py`);
- whether something is made only where it is missing (`made_where_missing.py`, by what single
  functions do with it: `makers.py`, and what statements do beside: `side_effects.py`);
- whether it is set before it is read (`set_first.py`);
- whether it comes to nothing but a line that is printed or logged (`only_shown.py`).

What is not understood may do anything: in doubt the answer is the one that has more told.
"""
