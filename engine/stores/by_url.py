"""Which kind of store a URL leads to; and what the disk of this machine has to offer as one."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Final

from crosstrain.engine.storage.atomic import flush_folder
from crosstrain.engine.storage.errors import CheckpointStoreMissing
from crosstrain.engine.storage.locations import StorePath

from .s3 import S3Store, s3_options
from .store import Store

_AWS: Final = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws"
# What reaches them, and where the credentials are that are not in the URL.
_KNOWN: Final = {
    **dict.fromkeys(("s3", "s3a"), ("s3fs", _AWS)),
    **dict.fromkeys(("gs", "gcs"), ("gcsfs", "GOOGLE_APPLICATION_CREDENTIALS")),
    **dict.fromkeys(("az", "abfs", "abfss"), ("adlfs", "AZURE_STORAGE_CONNECTION_STRING")),
}


def store_of(place: StorePath) -> Store:
    """Opens a folder of a store; nothing is asked of it yet.

    Raises:
        CheckpointStoreMissing: if the package that reaches such a store is not installed.
        ValueError: if there is no such kind of store, or credentials are where they are not looked
            for.
    """
    _, where = _KNOWN.get(place.protocol, (None, None))
    if where and place.secrets:
        raise ValueError(
            f"{place} was given with credentials in the URL, where they are not looked for. Set "
            f"{where}"
        )
    # A process that was forked off cannot use what its parent has opened.
    process = os.getpid()
    if process not in place.opened:
        place.opened[process] = _opened(place)
    filesystem = place.opened[process]
    root = str(filesystem._strip_protocol(place.url)).partition("?")[0]
    kind: type[Store] = Store
    if place.protocol in ("s3", "s3a") and hasattr(filesystem, "call_s3"):
        kind = S3Store
    elif place.protocol in ("file", "local"):
        kind = _DiskStore
    return kind(place, filesystem, root)


def _opened(place: StorePath) -> Any:
    try:
        core: Any = importlib.import_module("fsspec.core")
    except ImportError:
        raise CheckpointStoreMissing(
            f"{place} is reached through fsspec, which is not installed: pip install fsspec"
        ) from None
    try:
        # With options that nobody else has: what it gives us is ours, and its lists are not kept.
        options = s3_options(core.conf) if place.protocol in ("s3", "s3a") else {}
        filesystem, _ = core.url_to_fs(place.url, use_listings_cache=False, **options)
    except ImportError as error:
        package, _ = _KNOWN.get(place.protocol, (None, None))
        remedy = f"pip install {package}" if package else place.hide(str(error))
        raise CheckpointStoreMissing(
            f"{place} cannot be reached: the package for {place.protocol}:// is not installed. "
            f"{remedy}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{place} is no place to save to: {place.hide(str(error))}") from None
    return filesystem


class _DiskStore(Store):
    """The disk of this machine, by `file://`: what is put is flushed, as in a plain folder."""

    def _create(self, name: str, data: bytes) -> None:
        def write(aside: str) -> None:
            with open(aside, "xb") as file:
                file.write(data)

        self._place(name, write, os.link)

    def _rename(self, aside: str, path: str) -> None:
        descriptor = os.open(aside, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(aside, path)
        flush_folder(Path(path).parent)
