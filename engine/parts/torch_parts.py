"""The parts of a checkpoint's spread tensors, dealt out as `torch.distributed.checkpoint` does.

What is used of it is what deals the tensors out and finds the parts that a process needs, whatever
the number of processes was. Its own metadata is a pickle: it is written for torch's own tools and
never read. The processes talk through their `Writers`, not through a process group.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from crosstrain.engine.formats.safe_load import load_part
from crosstrain.engine.storage.atomic import HashingFile
from crosstrain.engine.storage.errors import CheckpointCorrupt, CheckpointError
from crosstrain.engine.storage.parts_files import PartsHash
from crosstrain.engine.stores.folders import Aside

from .index import Chunk, Entry
from .read import Parts
from .writers import Writers


class _Planner(DefaultSavePlanner):
    """Plans by the tensors, and writes the copies of this process's parts of them, on the CPU."""

    def __init__(self, copies: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Returns the copy of this process's part."""
        return self._copies[index.fqn]


class _HashingFiles(FileSystem):
    """Files whose size and hash are known when they are written: nothing is read back."""

    def __init__(self, aside: Aside) -> None:
        self._aside = aside
        self.found: dict[str, tuple[int, str]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        """Opens a new file, which is hashed."""
        assert mode == "wb", mode
        name, digest = Path(path).name, PartsHash()
        with self._aside.create(name) as file:
            hashing = HashingFile(file.fileno(), digest)
            yield hashing
            hashing.finish()
        self.found[name] = (hashing.size, digest.told())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Renames a file, whose hash goes with it."""
        self._aside.rename(Path(path).name, Path(new_path).name)
        self.found[Path(new_path).name] = self.found.pop(Path(path).name)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Does nothing: where the files go is there."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        """Tells whether a file was written."""
        return Path(path).name in self.found


class _Writer(FileSystemWriter):
    """Writes files, hashed, and flushed where they are to stay."""

    def __init__(self, aside: Aside) -> None:
        super().__init__(aside.root, sync_files=aside.flushes)
        self.fs: Any = _HashingFiles(aside)

    def storage_meta(self) -> StorageMeta | None:
        """Returns nothing: where the files were written tells nobody anything."""
        return None


def write_parts(
    aside: Aside, tensors: Mapping[str, Any], copies: Mapping[str, torch.Tensor], writers: Writers
) -> tuple[dict[str, Entry], dict[str, tuple[int, str]]]:
    """Writes this process's parts of tensors; called by all processes together.

    Args:
        aside: where they go; nothing is there.
        tensors: the spread tensors by name; their values are not looked at.
        copies: this process's part of each, on the CPU.
        writers: the processes.

    Returns:
        In the first process the index, in others nothing; size and hash of each file written here.
    """
    is_first = writers.rank == 0
    writer: Any = _Writer(aside)
    planner: Any = _Planner(copies)
    writer.set_up_storage_writer(is_first)
    planner.set_up_planner(dict(tensors), None, is_first)
    plans = writers.agree(None, writer.prepare_local_plan(planner.create_local_plan()))
    # From the same plans, each process makes the same plan for all.
    plans, metadata = planner.create_global_plan(plans)
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[writers.rank])
    results = writers.together(lambda: writer.write_data(plan, planner).wait())
    writers.first(lambda: writer.finish(metadata, results))
    return _entries(metadata, results) if is_first else {}, writer.fs.found


def _entries(metadata: Metadata, results: Any) -> dict[str, Entry]:
    # From what was written: which object `finish` puts it into depends on torch's version.
    written = {one.index: one.storage_data for of_rank in results for one in of_rank}
    found: dict[str, Entry] = {}
    for name, told in metadata.state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata)
        chunks: list[Chunk] = []
        for chunk in told.chunks:
            info = written.get(MetadataIndex(name, chunk.offsets))
            if info is not None and (chunk.sizes.numel() or len(told.chunks) == 1):
                chunks.append(
                    Chunk(
                        tuple(chunk.offsets),
                        tuple(chunk.sizes),
                        info.relative_path,
                        info.offset,
                        info.length,
                    )
                )
        found[name] = Entry(told.properties.dtype, tuple(told.size), tuple(chunks))
    return found


def _metadata(index: Mapping[str, Entry]) -> Metadata:
    """Returns an index in torch's form."""
    tensors: dict[str, Any] = {}
    for name, entry in index.items():
        chunks = [
            ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks
        ]
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=entry.dtype), torch.Size(entry.size), chunks
        )
    return Metadata(tensors)


def _read(found: Parts, index: Mapping[str, Entry], plan: Any, planner: Any) -> None:
    """Reads each part of a plan once, and copies what is wanted of it."""
    chunks = {(name, chunk.offsets): chunk for name, one in index.items() for chunk in one.chunks}
    wanted: dict[Chunk, list[Any]] = {}
    for item in plan.items:
        at = (item.storage_index.fqn, tuple(item.storage_index.offset))
        wanted.setdefault(chunks[at], []).append(item)
    for chunk, items in sorted(wanted.items(), key=lambda pair: (pair[0].file, pair[0].at)):
        tensor = _load(found, chunk)
        for item in items:
            part = tensor
            for dim, (begin, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(dim, begin, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != part.shape:
                raise CheckpointCorrupt(f"a part has shape {tuple(tensor.shape)}")
            target.copy_(part)
            planner.commit_tensor(item, target)


def _load(found: Parts, chunk: Chunk) -> torch.Tensor:
    with found.files.open(chunk.file) as file:
        tensor: Any = load_part(file, chunk.at, chunk.length, found.files.place / chunk.file)
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes:
        raise CheckpointCorrupt(f"{chunk.file} holds another part at {chunk.at}")
    return tensor


def read_parts(
    found: Parts, index: Mapping[str, Entry], targets: Mapping[str, torch.Tensor]
) -> None:
    """Fills tensors, whole ones and this process's parts of spread ones; sends nothing.

    Each part comes in by the same door as a file: no code is run.

    Args:
        found: the checkpoint.
        index: its index, checked.
        targets: tensors of the saved sizes, by name.

    Raises:
        CheckpointCorrupt: if a part is not what the index says.
        CheckpointUnsafe: if it needs classes that are neither tensors nor plain types.
    """
    if not targets:
        return
    index = {name: index[name] for name in targets}
    planner: Any = DefaultLoadPlanner()
    try:
        # The steps of torch's `load` for one process: nothing here needs the others.
        planner.set_up_planner(dict(targets), _metadata(index), True)
        plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
        _read(found, index, plan, planner)
    except CheckpointError:
        raise
    except Exception as error:
        # torch raises a dozen kinds, from AssertionError to RuntimeError, for damaged files.
        raise CheckpointCorrupt(
            f"{found.path} is not a good checkpoint: torch cannot load its parts: "
            f"{type(error).__name__}: {error}"
        ) from error
