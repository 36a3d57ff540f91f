"""What users are told of each kind of thing that is found, and what to do about it."""

UNNAMED = (
    "A resumed run will draw other values from {}: that has a position or random states of its "
    "own, and no checkpoint holds them. Wrap it in ResumableSource and name that in to_save, or "
    "draw from the global generators. If what it gives is not used in training"
)
FORGOTTEN = (
    "A resumed run will begin without what has changed of {}: the run reads it, and no checkpoint "
    "holds it. Name what has a state_dict, such as a scheduler or an average of the weights, in "
    "to_save; keep other things in an object that has one, or in trainer.state, with their names "
    "in trainer.state_dict_user_keys. If what is trained does not depend on it"
)
ATTACHED = (
    "A resumed run will begin with the handlers, hooks and modules that the script sets up, and "
    "this one has changed {}. Attach handlers and hooks before the run, and have them ask how far "
    "it is (Events.X(after=...), trainer.state), or change the same in a handler of STARTED when "
    "trainer.state.iteration says so. If what is trained does not depend on it, or such a handler "
    "is there"
)
NOT_MADE_AGAIN = (
    "The run that was saved had made hooks, as {} told, and this one has not made them again. "
    "Register them before the run. If what is trained does not depend on it"
)
MADE_OTHERWISE = (
    "The run that was saved had made something for itself that no checkpoint holds, and this one "
    "has made it again with other contents: {}. Keep it in an object that is named in to_save, or "
    "make it before the run. If what is trained does not depend on it"
)
MADE_ANEW = (
    "The script has made {} with other contents than those that the run was saved with: the run "
    "reads it, and no checkpoint holds it. Seed what it is made by, or keep it in an object that "
    "is named in to_save. If what is trained does not depend on it"
)
NOT_MADE_BY_STEP = (
    "The first step of the run that was saved had made {}, and that of this one has not. Make it "
    "before the run. If what is trained does not depend on it"
)
#: What a resumed run has found of itself, which stands in its proof.
FOUND_BY_RESUMED = (NOT_MADE_AGAIN, MADE_OTHERWISE, MADE_ANEW, NOT_MADE_BY_STEP)
LOST = (
    "A resumed run will begin without what has changed of {}: of data, the trainer's state holds "
    "numbers, words, and small lists, dictionaries, arrays and tensors. Keep it in an object that "
    "is named in to_save, or let a handler of EPOCH_STARTED make it anew. If what is trained on "
    "does not depend on it"
)
CLOSED = (
    "Whether a resumed run begins without what has changed of {} cannot be told: looking at it "
    "raised an error. Keep what changes in an object that has a state_dict and is named in "
    "to_save. If what is trained does not depend on it"
)
RACED = (
    "A run gives other batches each time, because {} has been changed while workers fetch: that is "
    "memory which they share, and which batches have it as it was follows from how far ahead they "
    "are. Change it between two passes, in a handler of EPOCH_STARTED or EPOCH_COMPLETED. If what "
    "is fetched does not depend on it"
)
FETCHED = (
    "A resumed run may draw other values once {}, has been iterated over: {}. Go on with that "
    "number of workers, or iterate there over a loader that keeps its num_workers. If nothing is "
    "fetched there: checks=Checks(ignored={!r})."
)
