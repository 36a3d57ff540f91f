"""The parts of a checkpoint's spread tensors, written and read by `torch.distributed.checkpoint`.

What is used of it is what deals the tensors out and finds the parts that a process needs, whatever
the number of processes was. Its own metadata is a pickle: it is given the index in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save  # pyright: ignore[reportUnknownVariableType]

from .errors import CheckpointCorrupt, CheckpointWriteError
from .sharded_manifest import Chunk, Entry

__all__ = ["read_parts", "write_parts"]

# Its type is known in part only.
_save: Any = save  # pyright: ignore[reportUnknownVariableType]


class _Planner(DefaultSavePlanner):
    """Plans by the tensors, and writes the copies of their parts.

    Args:
        copies: this process's part of each tensor, on the CPU.
    """

    def __init__(self, copies: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Returns the copy of this process's part."""
        return self._copies[index.fqn]


class _Writer(FileSystemWriter):
    """Writes files, flushed, and keeps the index in the process that makes it."""

    index: Metadata | None = None

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Writes torch's own metadata and keeps them."""
        super().finish(metadata, results)
        self.index = metadata

    def storage_meta(self) -> StorageMeta | None:
        """Returns nothing: where the files were written tells nobody anything."""
        return None


def write_parts(
    folder: Path,
    tensors: Mapping[str, Any],
    copies: Mapping[str, torch.Tensor],
    group: Any,
    path: Path,
) -> dict[str, Entry] | None:
    """Writes this process's parts of tensors into a folder; called by all processes together.

    Args:
        folder: an existing, empty folder that all see.
        tensors: the spread tensors by name; their values are not looked at.
        copies: this process's part of each, on the CPU.
        group: the processes; None if this is the only one.
        path: what the folder will be called, for messages.

    Returns:
        In the first process the index, in others None.

    Raises:
        CheckpointWriteError: in all processes, if one fails.
    """
    writer = _Writer(folder, sync_files=True)
    planner = _Planner(copies)
    if group is None:
        try:
            _write_alone(writer, planner, tensors)
        except OSError as error:
            raise CheckpointWriteError.of(path, str(error.strerror or error), error) from error
        return _entries(writer.index)
    try:
        _save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    # An exception of all processes, which torch derives from BaseException.
    except CheckpointException as error:
        failures = error.failures
        why = "; ".join(f"rank {rank}: {failures[rank][0]}" for rank in sorted(failures))
        cause = next((e for e, _ in failures.values() if isinstance(e, OSError)), None)
        raise CheckpointWriteError.of(path, why, cause) from error
    return None if writer.index is None else _entries(writer.index)


def _write_alone(writer: Any, planner: Any, tensors: Mapping[str, Any]) -> None:
    """Takes the steps of `save` for one process, which torch warns of."""
    writer.set_up_storage_writer(True)
    planner.set_up_planner(dict(tensors), None, True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])


def _entries(metadata: Metadata | None) -> dict[str, Entry]:
    assert metadata is not None
    found: dict[str, Entry] = {}
    for name, told in metadata.state_dict_metadata.items():
        assert isinstance(told, TensorStorageMetadata)
        chunks: list[Chunk] = []
        for chunk in told.chunks:
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
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


class _Reader(FileSystemReader):
    """Reads files by an index that was checked; opens no metadata."""

    def __init__(self, folder: Path, index: Mapping[str, Entry]) -> None:
        super().__init__(folder)  # pyright: ignore[reportUnknownMemberType]
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the index in torch's form."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for name, entry in self._index.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                for c in entry.chunks
            ]
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=entry.dtype), torch.Size(entry.size), chunks
            )
            for at, chunk in enumerate(entry.chunks):
                where = MetadataIndex(name, chunk.offsets, at)
                places[where] = _StorageInfo(chunk.file, chunk.at, chunk.length)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def read_parts(
    folder: Path, index: Mapping[str, Entry], targets: Mapping[str, torch.Tensor]
) -> None:
    """Fills tensors, whole ones and this process's parts of spread ones; sends nothing.

    Each part is loaded with `weights_only=True`, and nothing else is.

    Args:
        folder: the checkpoint.
        index: its index, checked.
        targets: tensors of the saved sizes, by name.

    Raises:
        CheckpointCorrupt: if a part is not what the index says.
    """
    if not targets:
        return
    reader: Any = _Reader(folder, {name: index[name] for name in targets})
    planner: Any = DefaultLoadPlanner()
    try:
        # The steps of torch's `load` for one process: nothing here needs the others.
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, True)
        planner.set_up_planner(dict(targets), metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = planner.finish_plan(planner.create_global_plan([plan])[0])
        reader.read_data(plan, planner).wait()
    except Exception as error:
        # torch raises a dozen kinds, from AssertionError to RuntimeError, for damaged files.
        raise CheckpointCorrupt(
            f"{folder} is not a good checkpoint: torch cannot load its parts: "
            f"{type(error).__name__}: {error}"
        ) from error
