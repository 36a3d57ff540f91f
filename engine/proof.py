"""The proof of a resume: what was checked of it, what could not be, and how strict to be.

No list of kinds of data and objects is ever complete, so a resume measures that it goes on as the
run that was saved. Each check notes its result here, and the log says all of it in one line.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from .errors import ResumeError, ResumeWarning, warn_user

Strictness = Literal["error", "warn", "off"]


@dataclass(frozen=True)
class Checks:
    """How strict a resume is about each thing that it measures: `error`, `warn` or `off`.

    Args:
        batch_before: the batch that was consumed last before the state was written is fetched once
            more, and compared.
        read_back: after an object has loaded its state, its `state_dict` is compared with it.
        structure: what no state_dict has is compared: which parameters want gradients, modes of
            modules, parameter groups, non-persistent buffers.
        writer: what a save writes is held to what a load accepts, while it is written.
        unnamed: what the step and handlers refer to is looked through, when a state is first taken,
            for loaders' iterators, other iterators and random generators that are not in `to_save`.
        done_again: iterations that a killed run had done after its last checkpoint are compared
            when they are repeated: a few of them, by their batch, the random states and the
            weights.
        settings: what the script makes models, optimizers, schedulers and the step with is compared
            with what it did when the run was saved, such as a learning rate.
        ignored: names of what `unnamed` tells of and no training depends on, each as its warning
            has it; the rest is told. One stands for all that lies in it, too.

    Raises:
        ValueError: if a check is none of the three words, or `ignored` no collection of names.
    """

    batch_before: Strictness = "error"
    read_back: Strictness = "error"
    structure: Strictness = "error"
    writer: Strictness = "error"
    unnamed: Strictness = "warn"
    done_again: Strictness = "warn"
    settings: Strictness = "warn"
    ignored: Collection[str] = ()

    def __post_init__(self) -> None:
        names: Any = self.ignored
        if isinstance(names, str) or not all(isinstance(one, str) for one in names):
            raise ValueError(
                f"Checks(ignored={names!r}); legal is a list of names as a warning has them, such "
                "as [\"the step, its 'end'\"]."
            )
        object.__setattr__(self, "ignored", tuple(names))
        legal = get_args(Strictness)
        for item in fields(self):
            if item.name == "ignored":
                continue
            value = getattr(self, item.name)
            if value not in legal:
                raise ValueError(
                    f"Checks({item.name}={value!r}); legal values: {', '.join(map(repr, legal))}."
                )


@dataclass
class Proof:
    """What a resume has found out about itself.

    Args:
        checked: what was measured and found equal, each as a phrase.
        unchecked: what could not be measured, each as a phrase with the reason.
        differences: what was found to differ and was let pass, since its check only warns.
    """

    checked: list[str] = field(default_factory=list[str])
    unchecked: list[str] = field(default_factory=list[str])
    differences: list[str] = field(default_factory=list[str])

    def differs(self, message: str, strictness: Strictness) -> None:
        """Deals with a difference, as its message says, as strictly as its check is meant.

        Raises:
            ResumeError: with the message, if the check is an `error`.
        """
        if strictness == "off":
            return
        if strictness == "error":
            raise ResumeError(message)
        self.differences.append(message)
        warn_user(message, ResumeWarning)

    def __str__(self) -> str:
        parts = [
            f"{title}: {'; '.join(phrases)}"
            for title, phrases in (
                ("checked", self.checked),
                ("not checked", self.unchecked),
                ("DIFFERS", self.differences),
            )
            if phrases
        ]
        return ". ".join(parts) or "nothing was checked"
