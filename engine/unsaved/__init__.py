"""What the step and handlers use that no checkpoint holds: found while a run goes on, and told.

**Where** is looked: in what the user's functions lead to (`functions.py`, `walk.py`), by what their
source says that they do with it (the room `source/`), as it is now (`used.py`).

**What** for, and what it is compared with:

- generators, iterators, second loaders (`drawn_from.py`): with what checkpoints hold;
- values that change and are read again (`changed_values.py`), also what users add to the trainer or
  a model (`added_attributes.py`): by signatures (`signatures.py`; of other packages' objects by
  `data_of_others.py`) with the run's beginning, less what the states of named objects hold
  (`contents_of_states.py`);
- handlers, hooks and modules that came or went (`handlers_and_hooks.py`): with the beginning's;
- what is made only where it is missing, as its source shows: by digests with what a resumed run
  makes (`made_again.py`); so is what is set anew before it is read (`set_anew.py`), and what a
  script makes before the run and nothing changes (`constants.py`);
- loaders that handlers iterate over (`loaders_in_handlers.py`): with the workers they had then.

**When** (`looks.py`): as the run's first epoch begins, all is noted; whenever a state is taken, it
is compared, and each thing is told once; after the first two steps of a resumed run, what these
have made is compared with what the run before had made. `messages.py` has what is told.
"""

from .looks import Unsaved
from .used import Used

__all__ = ["Unsaved", "Used"]
