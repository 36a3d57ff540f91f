"""Copying a checkpoint in parts from a disk to a store: each process what it has written."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import IO

from crosstrain.engine.storage.errors import CheckpointError
from crosstrain.engine.storage.manifest import INDEX
from crosstrain.engine.storage.parts_files import check_hash, told_of
from crosstrain.engine.stores.store_folder import StoreFolder

from .read import Parts, writer_of
from .writers import Writers


class PartsToCopy:
    """The files of a checkpoint that this process copies, held open, whatever becomes of them.

    Each is compared with what the manifest tells before any is put: a copy replaces no good one by
    a damaged one. What it meets when it opens them is told when all processes copy, to all of them.
    """

    def __init__(self, path: Path, writers: Writers) -> None:
        self._writers = writers
        self._held = contextlib.ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        self._error: Exception | None = None
        try:
            self._found = Parts.open(path)
            for name in self._found.manifest.files:
                # What is of no process in particular is the first's.
                if writer_of(name) % writers.size == writers.rank:
                    self._files[name] = self._held.enter_context(self._found.files.open(name))
        except (OSError, CheckpointError) as error:
            self._error = error

    def _verify(self) -> None:
        if self._error is not None:
            raise self._error
        found = self._found
        for name, file in self._files.items():
            check_hash(file, found.manifest.files[name], found.files.place / name)
            file.seek(0)

    def _is_told_by(self, folder: StoreFolder) -> bool:
        """Tells whether the store's manifest is that of these files; asked by the first process."""
        # The index has another hash there if these are of an older version.
        index = self._files[INDEX]
        told = told_of(index)
        index.seek(0)
        manifest = self._found.manifest
        return folder.has_manifest(replace(manifest, files={**manifest.files, INDEX: told}))

    def put(self, folder: StoreFolder, *, compare: bool = False) -> None:
        """Puts them; all processes call it together, and return when the checkpoint is whole there.

        If one fails, all raise a CheckpointError, and nothing is there, or what was.

        Args:
            folder: where to.
            compare: of a copy that is there already, puts only what has other bytes.
        """
        writers = self._writers
        with self._held:
            writers.together(self._verify)
            manifest = self._found.manifest
            if compare and writers.first(lambda: self._is_told_by(folder)):
                writers.together(lambda: folder.mend_parts(manifest, self._files))
                return
            index = self._files.pop(INDEX).read() if writers.rank == 0 else b""
            aside = folder.aside(manifest)
            with writers.filling(aside, 0):
                aside.take(self._files)
                writers.together(aside.deliver)
                writers.first(lambda: aside.commit(index, manifest))
