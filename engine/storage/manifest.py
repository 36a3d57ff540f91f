"""The manifest: what a checkpoint says of itself, and how it proves that it is whole.

It is part of the checkpoint's own file, as the comment at the end of the zip archive that
`torch.save` writes: `torch.load` passes over it, `unzip -z FILE` prints it. So a checkpoint is one
file with one rename that makes it valid, it can be copied and renamed with its proof, and writing
over a file of the same name leaves no moment at which file and manifest do not fit.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from crosstrain.engine.guards import is_exact_dict

from .errors import CheckpointContentError, CheckpointCorrupt

__all__ = ["MAX_MANIFEST_BYTES", "Manifest", "software_versions"]

MAX_MANIFEST_BYTES = 65_535
_FORMAT = "crosstrain checkpoint"
_SCHEMA = 1
_END_OF_TIME = 2**63
_DIGEST_MARK = b"\nsha256:"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Args:
        file: the name under which the file was written.
        size: the bytes that `sha256` covers: the file without its manifest.
        sha256: their hash, in hexadecimal.
        saved_at_ns: when it was written, in nanoseconds since 1970; never less than that of another
            checkpoint that was in the folder before.
        objects: the names of the saved objects.
        bare: whether the file holds the state of its one object itself, not a dictionary of names.
        iteration: completed iterations of the engine that saved; None where nobody told.
        epoch: its epoch.
        backend: the backend's name; None without one.
        world_size: the number of processes of the run.
        rank: which of them wrote the file.
        versions: of Python and the packages that decide what a state means.
    """

    file: str
    size: int
    sha256: str
    saved_at_ns: int
    objects: tuple[str, ...]
    bare: bool = False
    iteration: int | None = None
    epoch: int | None = None
    backend: str | None = None
    world_size: int = 1
    rank: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def encode(self) -> bytes:
        """Returns the manifest as text in ASCII, closed by its own hash.

        Raises:
            CheckpointContentError: if the names of the objects make it longer than a zip comment
                may be.
        """
        values = {"format": _FORMAT, "schema": _SCHEMA, **asdict(self)}
        text = json.dumps(values, indent=1).encode("ascii")
        encoded = text + _DIGEST_MARK + hashlib.sha256(text).hexdigest().encode("ascii") + b"\n"
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise CheckpointContentError(
                f"The names of {len(self.objects)} objects make a manifest of {len(encoded)} bytes;"
                f" {MAX_MANIFEST_BYTES} is the most. Save fewer objects, each holding several."
            )
        return encoded

    @classmethod
    def decode(cls, encoded: bytes) -> Manifest:
        """Reads what `encode` returned.

        Raises:
            CheckpointCorrupt: if a byte of it is not as it was written, or its schema is newer.
        """
        text, _, digest = encoded.rpartition(_DIGEST_MARK)
        if digest != hashlib.sha256(text).hexdigest().encode("ascii") + b"\n":
            raise CheckpointCorrupt("its manifest is damaged (its own hash does not fit)")
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointCorrupt(f"its manifest is no JSON text ({error})") from None
        return cls(**_checked(values))


_KINDS: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "size": (int,),
    "sha256": (str,),
    "saved_at_ns": (int,),
    "objects": (list,),
    "bare": (bool,),
    "iteration": (int, type(None)),
    "epoch": (int, type(None)),
    "backend": (str, type(None)),
    "world_size": (int,),
    "rank": (int,),
    "versions": (dict,),
}


def _checked(decoded: Any) -> dict[str, Any]:
    values = decoded if is_exact_dict(decoded) else {}
    if values.get("format") != _FORMAT:
        raise CheckpointCorrupt(f"its manifest is not one of a {_FORMAT}")
    if values.get("schema") != _SCHEMA or isinstance(values["schema"], bool):
        raise CheckpointCorrupt(
            f"its manifest has schema {values.get('schema')!r} and this version of crosstrain "
            f"reads schema {_SCHEMA}: install the version that wrote it, or a newer one"
        )
    names = {item.name for item in fields(Manifest)}
    if set(values) != names | {"format", "schema"}:
        wrong = sorted(map(str, set(values) ^ (names | {"format", "schema"})))
        raise CheckpointCorrupt(f"its manifest has missing or unknown entries: {wrong}")
    for name, kinds in _KINDS.items():
        if type(values[name]) not in kinds:
            raise CheckpointCorrupt(f"its manifest's {name!r} is of type {type(values[name])}")
    texts: list[Any] = [*values["objects"], *values["versions"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointCorrupt("its manifest's names and versions are not all text")
    for name in ("size", "saved_at_ns", "iteration", "epoch", "world_size", "rank"):
        if not 0 <= (values[name] or 0) < _END_OF_TIME:
            raise CheckpointCorrupt(f"its manifest's {name!r} is {values[name]}, which cannot be")
    if values["rank"] >= values["world_size"]:
        raise CheckpointCorrupt(
            f"its manifest says rank {values['rank']} of {values['world_size']} processes"
        )
    found = {name: values[name] for name in names}
    return {**found, "objects": tuple(values["objects"])}


def software_versions() -> dict[str, str]:
    """Returns the versions that decide what a saved state means."""
    # torch's own word for its version: it tells builds apart, which a package's metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in ("crosstrain", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def later_than(earlier_ns: int) -> int:
    """Returns the time in nanoseconds, or the next one where the clock has been set back.

    Raises:
        CheckpointContentError: if no manifest may tell a later time than the earlier one.
    """
    if earlier_ns + 1 >= _END_OF_TIME:
        raise CheckpointContentError(
            f"A checkpoint in the folder says that it was saved at {earlier_ns} ns, the end of "
            "all time: nothing can be newer. Nothing was written. Find it with `crosstrain "
            "inspect` and move it elsewhere"
        )
    return max(time.time_ns(), earlier_ns + 1)
