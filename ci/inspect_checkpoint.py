"""``crosstrain inspect``: what a checkpoint holds, and whether it is whole and safe to load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from crosstrain.backends.placement import map_tensors
from crosstrain.engine import CheckpointError, Manifest
from crosstrain.engine.checkpoints import (
    PARTS,
    Location,
    is_checkpoint,
    layout_of,
    list_checkpoints,
    location_of,
)
from crosstrain.engine.shown import shown


@dataclass(frozen=True)
class Part:
    """One saved object: how many tensors it holds, their bytes, and the names of random states."""

    name: str
    tensors: int
    bytes: int
    random_states: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What was found out about one checkpoint.

    Args:
        good: whether it can be loaded.
        files: how many files it is; 0 if it is one file and no folder of them.
    """

    path: Location
    good: bool
    problem: str | None = None
    manifest: Manifest | None = None
    parts: tuple[Part, ...] = ()
    files: int = 0


def examine(path: Location) -> Finding:
    """Verifies and reads a checkpoint."""
    try:
        # All of one in parts is read into memory, as one file's state would be.
        loaded = layout_of(path).read(path)
    except CheckpointError as error:
        return Finding(path, good=False, problem=str(error))
    files = 0 if loaded.manifest is None else len(loaded.manifest.files)
    return Finding(
        path, True, None, loaded.manifest, tuple(_parts(loaded.state, loaded.manifest)), files
    )


def _parts(state: Any, manifest: Manifest | None) -> Iterator[Part]:
    if manifest is not None and manifest.bare and len(manifest.objects) == 1:
        state = {manifest.objects[0]: state}
    if not isinstance(state, Mapping):
        state = {"(the whole file)": state}
    for name, value in state.items():
        tensors: list[torch.Tensor] = []
        map_tensors(value, tensors.append)
        storages = [tensor.untyped_storage() for tensor in tensors]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        states = tuple(dict.fromkeys(_random_states(value)))
        yield Part(shown(name), len(tensors), size, states)


def _random_states(value: Any) -> Iterator[str]:
    """Yields the names of what is stored under a key that speaks of random states."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and ("rng" in key or "random" in key):
                yield from map(shown, _filled(item) if isinstance(item, Mapping) else [key])
            else:
                yield from _random_states(item)


def _filled(states: Mapping[Any, Any]) -> list[Any]:
    return [name for name, one in states.items() if not isinstance(one, Mapping) or one]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``crosstrain inspect``."""
    parser.add_argument(
        "path", type=location_of, help="a checkpoint, or a folder of them; a path, or a URL"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")


def run(args: argparse.Namespace) -> int:
    """Examine the checkpoints and print what was found.

    Returns:
        0 if every file is good; 1 if one is not, or cannot be verified, or there is none.
    """
    path: Location = args.path
    try:
        files = [path] if is_checkpoint(path) else [told.path for told in list_checkpoints(path)]
    except CheckpointError as error:
        _print(shown(error))
        return 1
    findings = [examine(file) for file in files]
    if args.json:
        _print(json.dumps([_as_json(finding) for finding in findings], indent=1))
    elif findings:
        _print("\n\n".join("\n".join(_lines(finding)) for finding in findings))
    else:
        where = shown(path)
        _print(f"There is no checkpoint in {where}: no file there ends with .pt or {PARTS.ending}")
    verified = all(finding.good and finding.manifest is not None for finding in findings)
    return 0 if findings and verified else 1


def _print(text: str) -> None:
    """Prints, escaped, what the output's encoding does not have, too."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _as_json(finding: Finding) -> dict[str, Any]:
    values = asdict(finding)
    return {**values, "path": str(finding.path), "verified": finding.manifest is not None}


def _lines(finding: Finding) -> Iterator[str]:
    manifest = finding.manifest
    if not finding.good:
        yield f"{shown(finding.path)}: BAD"
        yield f"  {shown(finding.problem)}"
        return
    if manifest is None:
        yield f"{shown(finding.path)}: loads, but cannot be verified"
        yield "  no manifest: another program wrote it, and damage in its tensors cannot be found"
    else:
        yield f"{shown(finding.path)}: good"
        yield from _told(manifest, finding.path, finding.files)
    yield from _table(finding.parts)


def _told(manifest: Manifest, path: Location, files: int) -> Iterator[str]:
    saved = datetime.fromtimestamp(manifest.saved_at_ns / 1e9, UTC).isoformat(sep=" ")
    versions: Mapping[str, str] = manifest.versions
    renamed = "" if manifest.file == path.name else f", as {shown(manifest.file)}"
    if files:
        yield f"  verified    {manifest.size:,} bytes in {files} files, each by its hash"
    else:
        yield f"  verified    {manifest.size:,} bytes, sha256 {manifest.sha256}"
    yield f"  saved       {saved[:19]} UTC{renamed}"
    yield f"  iteration   {_or_unknown(manifest.iteration)}, epoch {_or_unknown(manifest.epoch)}"
    yield f"  backend     {_or_unknown(manifest.backend)}"
    written = "all of them" if files else f"rank {manifest.rank}"
    yield f"  world size  {manifest.world_size}, written by {written}"
    yield "  versions    " + ", ".join(
        f"{shown(name)} {shown(text)}" for name, text in versions.items()
    )


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else shown(value)


def _table(parts: tuple[Part, ...]) -> Iterator[str]:
    width = max([len("object"), *(len(part.name) for part in parts)])
    yield f"  {'object':<{width}}  {'tensors':>7}  {'bytes':>15}  random states"
    for part in parts:
        states = ", ".join(part.random_states) or "-"
        yield f"  {part.name:<{width}}  {part.tensors:>7}  {part.bytes:>15,}  {states}"
